"""One training run in PyTorch. On a GPU a step is a CUDA graph and nothing waits for the device until the run is over."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from _quality.cross_entropy import cross_entropy
from _quality.data import Task, Text, Windows, held_out_windows, initial_weights, schedule, training_windows
from _quality.torch_model import Projection, make_model
from _quality.torch_tables import FloatTable, Memory, PackedTable, Rates, Table, make_table, size
from _quality.variants import Variant

_WARM_UP_STEPS = 4  # ordinary steps before one is captured; they count


class Runner:
    """Keeps the text on the device for many runs.

    Args:
        text: the token ids.
        device: "cpu" or "cuda".
        threads: threads of the CPU.
    """

    def __init__(self, text: Text, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = True
        self._text, self._device = text, torch.device(device)
        self._train, self._valid = (torch.from_numpy(part).to(self._device) for part in (text.train, text.valid))

    def run(self, task: Task, variant: Variant, seed: int) -> dict[str, Any]:
        """Train, and return losses on both halves of the held-out text, bytes, and how it was done.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        torch.manual_seed(1000 + seed)
        training = _Training(task, variant, seed, self._text, self._train)
        try:
            mode = training.run()
            return self._outcome(task, training) | {"mode": mode}
        finally:
            del training  # a graph keeps its memory as long as it lives
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _outcome(self, task: Task, training: _Training) -> dict[str, Any]:
        table, model = training.table, training.model
        selection, report = self._losses(task, model, table.lookup)
        outcome: dict[str, Any] = {"selection": selection, "report": report, "train": training.final_loss(), **training.memory().as_dict()}
        if isinstance(table, FloatTable):
            outcome["finished"] = {}
            for name, lookup, served in table.finished():
                selection, report = self._losses(task, model, lookup)
                outcome["finished"][name] = {"selection": selection, "report": report, "served_bytes": served}
        if isinstance(table, PackedTable):
            outcome["last_update"] = table.telemetry()
            served = {}
            for planes in (1, 2, 4):
                if planes < table.embedding.weight.planes:
                    selection, report = self._losses(task, model, table.with_planes(planes))
                    served[str(planes)] = {"selection": selection, "report": report}
            outcome["fewer_planes"] = served
        return outcome

    @torch.no_grad()
    def _losses(self, task: Task, model: nn.Module, lookup: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        model.eval()
        found = []
        for windows in held_out_windows(task, self._valid.numel()):
            losses = []
            for ids, targets in _batches(task, self._valid, windows):
                with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda):
                    logits = model(lookup(ids))
                losses.append(cross_entropy(logits, targets))
            found.append(float(torch.stack(losses).mean()))
        selection, report = found
        if not (math.isfinite(selection) and math.isfinite(report)):
            msg = f"the loss on the held-out text is {selection} and {report}"
            raise FloatingPointError(msg)
        return selection, report


class _Training:
    """State of a run; everything that a step reads is on the device."""

    def __init__(self, task: Task, variant: Variant, seed: int, text: Text, tokens: Tensor) -> None:
        device = tokens.device
        self._task, self._tokens = task, tokens
        windows = training_windows(task, tokens.numel(), seed)
        self._source, self._target = (torch.from_numpy(part).to(device) for part in (windows.source, windows.target))
        self._shares = schedule(task.steps)
        self._device_shares = torch.from_numpy(self._shares).to(device)
        self._rates = Rates(torch.zeros((), device=device), torch.zeros((), device=device))
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._losses = torch.zeros(task.steps, device=device)
        self.table: Table = make_table(task, variant, seed, self._rates)
        self.model = make_model(task)
        weights = initial_weights(task, text, seed)
        self.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})  # copies
        self._projection = Projection(task) if variant.options.get("projection") else None
        if self._projection is not None:
            self.model = nn.Sequential(self._projection, self.model)
        self.model.to(device).train()
        fast = {"fused": True, "capturable": True} if device.type == "cuda" else {"foreach": False}
        self._adamw = torch.optim.AdamW(self.model.parameters(), lr=self._rates.base, betas=(0.9, 0.99), weight_decay=0.01, **fast)

    def run(self) -> str:
        """All steps; returns "graph", or "eager" with the reason why a step could not be captured."""
        steps = self._task.steps
        if self._tokens.device.type != "cuda":
            for step in range(steps):
                self._eager_step(step)
            return "eager"
        first = min(_WARM_UP_STEPS, steps)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in range(first):
                self._eager_step(step)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph, mode = self._capture()
        for step in range(first, steps):
            if graph is None:
                self._eager_step(step)
                continue
            graph.replay()
            if not self.table.capturable:
                self.table.step(float(self._shares[step]))
        torch.cuda.synchronize()
        return mode

    def memory(self) -> Memory:
        """Of the table and of the projection behind it, which AdamW trains with two moments."""
        memory = self.table.memory()
        if self._projection is not None:
            matrix = size(self._projection.weight)
            memory = replace(memory, served=memory.served + matrix, weights=memory.weights + matrix, rule=memory.rule + 2 * matrix)
        return memory

    def final_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        return float(self._losses[-max(1, self._task.steps // 10) :].mean())

    def _capture(self) -> tuple[torch.cuda.CUDAGraph | None, str]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._device_step()
        except RuntimeError as error:
            torch.cuda.synchronize()
            return None, f"eager, because capture failed: {error}"[:300]
        return graph, "graph"

    def _eager_step(self, step: int) -> None:
        self._device_step()
        if not self.table.capturable:
            self.table.step(float(self._shares[step]))

    def _device_step(self) -> None:
        """Everything of a step but the update of a table that is not capturable; that table keeps its gradient."""
        share = self._device_shares[self._step].squeeze(0)
        self._rates.share.copy_(share)
        self._rates.base.copy_(share * self._task.lr)
        source, target = (part[self._step].squeeze(0) for part in (self._source, self._target))
        ids, targets = _windows_of(self._task, self._tokens, source, target)
        self._adamw.zero_grad(set_to_none=True)
        self.table.zero_grad()
        # without the cache of casts: a graph must not read one that was made outside of it
        with torch.autocast("cuda", torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
            logits = self.model(self.table.lookup(ids))
        loss = cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._adamw.step()
        if self.table.capturable:
            self.table.step(0.0)
        self._losses.index_copy_(0, self._step, loss.detach().reshape(1))
        self._step.add_(1)


def _batches(task: Task, tokens: Tensor, windows: Windows) -> list[tuple[Tensor, Tensor]]:
    parts = [torch.from_numpy(part).to(tokens.device) for part in (windows.source, windows.target)]
    return [_windows_of(task, tokens, source, target) for source, target in zip(*parts, strict=True)]


def _windows_of(task: Task, tokens: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ids and targets `[batch, context]` of the windows that start at `source` and `target`."""
    places = torch.arange(task.context, device=tokens.device)
    return tokens[source[:, None] + places].long(), tokens[target[:, None] + places].long()
