"""One training run of the task "clicks", in PyTorch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualbin.torch as dbt
from _clicks import auc
from _flights import Flights
from _quality.clicks import ClickTask, batches
from _quality.torch_tables import Finished, made_smaller
from _quality.variants import Variant
from _tables import state_bytes
from dualbin.rules import Counter

_INITIAL_FLOAT = 0.05  # standard deviation of fp32 rows
_INITIAL_SCALE = 0.1
_CHUNK = 16384  # examples that are predicted at a time
_ROUNDED = (4, 2, 1)  # bits of the integers to which finished fp32 rows are rounded
_RULE = {field.name for field in fields(Counter)}


class Runner:
    """Keeps the data on the device for many runs.

    Args:
        flights: the data.
        device: "cpu" or "cuda".
        threads: threads of the CPU.
    """

    def __init__(self, flights: Flights, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default, which Adagrad warns about
        self._flights, self._device = flights, torch.device(device)
        self._ids = torch.from_numpy(flights.ids.astype(np.int64)).to(self._device)
        self._late = torch.from_numpy(flights.late).to(self._device, torch.float32)

    def run(self, task: ClickTask, variant: Variant, seed: int) -> dict[str, Any]:
        """Train, and return 1 - AUC on both held-out parts, and bytes.

        Raises:
            FloatingPointError: a prediction is not finite.
        """
        table = _make_table(task, variant, self._flights.rows, seed)
        torch.manual_seed(seed)
        model = ClickModel(task, self._flights.ids.shape[1], table.width).to(self._device)
        table.to(self._device)
        optimizer = torch.optim.Adam([*model.parameters(), *table.dense_parameters()], lr=task.lr)
        parts = self._flights.parts
        losses = []
        for batch in batches(task, parts[0].stop, variant.options.get("passes", 1), seed):
            chosen = torch.from_numpy(batch).to(self._device)
            loss = F.binary_cross_entropy_with_logits(model(table.lookup(self._ids[chosen])), self._late[chosen])
            optimizer.zero_grad()
            table.zero_grad()
            loss.backward()
            optimizer.step()
            table.step()
            losses.append(loss.detach())
        last = losses[-max(1, len(losses) // 10) :]
        outcome = self._losses(model, table.lookup) | {"train": float(torch.stack(last).mean()), "mode": "eager"} | table.memory()
        outcome["rows"] = self._flights.rows
        if isinstance(table, FloatTable):
            outcome["finished"] = {name: self._losses(model, found) | {"served_bytes": size} for name, found, size in table.finished()}
        return outcome

    @torch.no_grad()
    def _losses(self, model: nn.Module, lookup: Callable[[Tensor], Tensor]) -> dict[str, float]:
        _, *held_out = self._flights.parts
        found = {}
        for name, part in zip(("selection", "report"), held_out, strict=True):
            scores = torch.cat([model(lookup(ids)) for ids in self._ids[part].split(_CHUNK)]).double().cpu().numpy()
            if not np.isfinite(scores).all():
                msg = "a prediction for the held-out flights is not finite"
                raise FloatingPointError(msg)
            found[name] = 1 - auc(scores, self._flights.late[part])
        return found


class ClickModel(nn.Module):
    """From rows `[batch, fields, width]` to logits `[batch]`: a perceptron over the rows and the products of every two of them."""

    pairs: Tensor

    def __init__(self, task: ClickTask, count: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.triu_indices(count, count, 1))
        widths = [count * width + count * (count - 1) // 2, *task.hidden]
        layers = [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, rows: Tensor) -> Tensor:
        products = (rows @ rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.layers(torch.cat([rows.flatten(1), products], 1)).squeeze(1)


# ---- the tables --------------------------------------------------------------------------------------------------------------------------


class ClickTable(ABC):
    """A table with its own optimizer, and perhaps a projection behind it that is trained with the dense weights.

    Attributes:
        width: of the rows that the model gets.
    """

    width: int

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the table and make its optimizer; before anything else is called."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor: ...

    @abstractmethod
    def dense_parameters(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def step(self) -> None: ...

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """`training_bytes` and `served_bytes`, from the tensors; of a projection with the two moments that Adam keeps."""


def _make_table(task: ClickTask, variant: Variant, rows: int, seed: int) -> ClickTable:
    kinds: dict[str, Callable[..., ClickTable]] = {"fp32": FloatTable, "xor": PackedTable}
    return kinds[variant.kind](task, variant, rows, torch.Generator().manual_seed(seed))


class PackedTable(ClickTable):
    """A 1-bit table of dualbin, trained by XOR with a counter. Options that are not the counter's go to BinaryEmbedding."""

    def __init__(self, task: ClickTask, variant: Variant, rows: int, generator: torch.Generator) -> None:
        options = {name: value for name, value in variant.options.items() if name != "passes"}
        self._rule = Counter(**{name: options.pop(name) for name in list(options) if name in _RULE})
        self._scale_lr = {"scale_lr": options.pop("scale_lr")} if "scale_lr" in options else {}
        width = options.pop("width", task.width)
        self._seed = generator.initial_seed()
        self._embedding = dbt.BinaryEmbedding(rows, width, generator=generator, scale=_INITIAL_SCALE, **options)
        self.width = options.get("projection", width)

    def to(self, device: torch.device) -> None:
        self._embedding.to(device)
        self._optimizer = dbt.XOR([self._embedding.weight], rule=self._rule, seed=self._seed, **self._scale_lr)

    def lookup(self, ids: Tensor) -> Tensor:
        return self._embedding(ids)

    def dense_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._embedding.parameters() if not isinstance(parameter, dbt.BinaryTable)]

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._optimizer.step()

    def memory(self) -> dict[str, int]:
        table: Any = self._embedding.weight
        dense = sum(parameter.nbytes for parameter in self.dense_parameters())
        served = table.bits.nbytes + table.scale.nbytes
        return {"served_bytes": served + dense, "training_bytes": served + state_bytes(self._optimizer, table) + 3 * dense}


class FloatTable(ClickTable):
    """fp32 rows, trained by PyTorch's Adagrad or SparseAdam on sparse gradients."""

    def __init__(self, task: ClickTask, variant: Variant, rows: int, generator: torch.Generator) -> None:
        width = variant.options.get("width", task.width)
        self.width = variant.options.get("projection", width)
        self._variant = variant
        weight = _INITIAL_FLOAT * torch.randn(rows, width, generator=generator)
        self._embedding = nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
        matrix = torch.randn(width, self.width, generator=generator) / math.sqrt(width)
        self._projection = nn.Parameter(matrix) if "projection" in variant.options else None

    def to(self, device: torch.device) -> None:
        self._embedding.to(device)
        if self._projection is not None:
            self._projection.data = self._projection.data.to(device)
        options = self._variant.options
        optimizer = {"adagrad": torch.optim.Adagrad, "sparse adam": torch.optim.SparseAdam}[options["optimizer"]]
        self._optimizer = optimizer([self._embedding.weight], lr=options["lr"])

    def lookup(self, ids: Tensor) -> Tensor:
        rows = self._embedding(ids)
        return rows if self._projection is None else rows @ self._projection

    def dense_parameters(self) -> list[nn.Parameter]:
        return [] if self._projection is None else [self._projection]

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._optimizer.step()

    def memory(self) -> dict[str, int]:
        weight = self._embedding.weight
        dense = sum(parameter.nbytes for parameter in self.dense_parameters())
        return {
            "served_bytes": weight.nbytes + dense,
            "training_bytes": weight.nbytes + state_bytes(self._optimizer, weight) + 3 * dense,
        }

    def finished(self) -> list[Finished]:
        """What may become of the rows when training is over. Without a projection only."""
        return [] if self._projection is not None else made_smaller(self._embedding.weight.detach(), _ROUNDED)
