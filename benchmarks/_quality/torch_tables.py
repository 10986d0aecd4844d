"""The input tables that are compared, in PyTorch, behind one interface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dualbin.torch as dbt
from _quality.data import INITIAL_SCALE, Task, initial_bits, initial_floats
from _quality.variants import Variant
from _tables import rounded, rounded_bytes

#: a table that was made smaller when training was over: what it became, its lookup, its bytes
Finished = tuple[str, Callable[[Tensor], Tensor], int]


@dataclass(frozen=True)
class Rates:
    """float32 tensors without dimensions on the device, refilled before every step: the base rate, and its share of the full rate."""

    base: Tensor
    share: Tensor


@dataclass
class Memory:
    """Bytes of a table, taken from the tensors that hold it.

    Attributes:
        served: what has to be kept to look rows up after training.
        weights: what stands for the weights in training: packed bits or floats, with a projection, without scales.
        rule: state of the weights' update rule; of `every=K` with its window at its largest.
        scale: the scales of the rows, and the state that trains them.
    """

    served: int
    weights: int
    rule: int
    scale: int = 0

    def as_dict(self) -> dict[str, int]:
        return {f"{name}_bytes": value for name, value in asdict(self).items()}


class Table(ABC):
    """An input table with its own optimizer."""

    #: `step` may be part of a captured CUDA graph; if not it is called after each replay
    capturable = True

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Rows `[..., D]` of int64 ids."""

    @abstractmethod
    def zero_grad(self) -> None: ...

    @abstractmethod
    def step(self, share: float) -> None:
        """Train on the gradient. `share` of the full rate is for tables that are not capturable; the others read `Rates`."""

    @abstractmethod
    def memory(self) -> Memory: ...


def make_table(task: Task, variant: Variant, seed: int, rates: Rates) -> Table:
    """The table of a variant on the device of `rates`."""
    kinds: dict[str, type[FloatTable | ProjectedTable | StraightThrough | PackedTable]] = {
        "fp32": FloatTable,
        "projected": ProjectedTable,
        "straight-through": StraightThrough,
        "xor": PackedTable,
    }
    return kinds[variant.kind](task, variant, seed, rates)


def size(*tensors: Tensor) -> int:
    """Bytes of the memory that tensors hold, not only of the part that they show."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class _DenseLookup(torch.autograd.Function):
    """F.embedding whose dense gradient is made without waiting for the device, as a CUDA graph needs it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return _scattered(ctx.shape, ids, gradient), None


def _scattered(shape: torch.Size, ids: Tensor, rows: Tensor) -> Tensor:
    """The dense float32 gradient of a table: the sum of the rows at each id."""
    return torch.zeros(shape, device=rows.device).index_add_(0, ids.reshape(-1), rows.reshape(-1, shape[1]).float())


def _signs(x: Tensor) -> Tensor:
    return (x >= 0).float() * 2 - 1


class PackedTable(Table):
    """A table of dualbin, trained by XOR."""

    def __init__(self, task: Task, variant: Variant, seed: int, rates: Rates) -> None:
        device = rates.base.device
        rule = variant.rule()
        self.capturable = rule.every == 1
        planes = variant.options.get("planes", 1)
        self.embedding = dbt.BinaryEmbedding(task.vocabulary, task.width, device=device, planes=planes)
        scale = torch.full((task.vocabulary, 1), INITIAL_SCALE)
        bits = torch.from_numpy(initial_bits(task, seed, variant.options.get("spread", 0.5), planes))
        self.embedding.load_state_dict({"weight.bits": bits, "weight.scale": scale})
        self.optimizer = dbt.XOR(
            [self.embedding.weight],
            lr=rates.share if self.capturable else 1.0,
            rule=rule,
            scale_lr=task.scale_lr,
            seed=seed,
            capturable=self.capturable,
        )
        self._window = 0

    def lookup(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, share: float) -> None:
        if not self.capturable:
            self.optimizer.param_groups[0]["lr"] = share
        self.optimizer.step()
        if not self.capturable:  # the sizes are known without waiting for the device
            state = self.optimizer.state[self.embedding.weight]
            self._window = max(self._window, size(state["pending_ids"], state["pending_rows"]))

    def memory(self) -> Memory:
        table, state = self.embedding.weight, self.optimizer.state[self.embedding.weight]
        rule = size(*(state[name] for name in ("counter", "ema") if name in state)) + self._window
        scale = size(table.scale, *(state[name] for name in ("record", "count", "squares") if name in state))
        return Memory(served=size(table.bits, table.scale), weights=size(table.bits), rule=rule, scale=scale)

    def with_planes(self, planes: int) -> dbt.BinaryEmbedding:
        """The finished table, served at fewer planes."""
        table: Any = self.embedding.weight
        fewer = dbt.BinaryEmbedding(*table.shape, device=table.device, planes=planes)
        fewer.weight = torch.nn.Parameter(table.detach().with_planes(planes))
        return fewer

    def telemetry(self) -> dict[str, float]:
        """What the last update did, as shares; waits for the device."""
        stats = self.optimizer.stats()
        weights = max(1, stats["rows"]) * self.embedding.embedding_dim
        return {"flipped": stats["flips"] / weights, "clipped": stats["clipped"] / weights, "skipped": float(stats["skipped"])}


class FloatTable(Table):
    """fp32 rows, trained by Adam at `lr` times the base rate, or by Adagrad at `lr` times the share."""

    def __init__(self, task: Task, variant: Variant, seed: int, rates: Rates) -> None:
        weight = initial_floats((task.vocabulary, task.width), 0.1, seed, stream=0)
        self.weight = torch.nn.Parameter(torch.from_numpy(weight).to(rates.base.device))
        optimizers = {"adam": _Adam, "adagrad": _Adagrad}
        self._optimizer = optimizers[variant.options["optimizer"]]([self.weight], variant.options["lr"], rates)

    def lookup(self, ids: Tensor) -> Tensor:
        return _DenseLookup.apply(self.weight, ids)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self, share: float) -> None:  # noqa: ARG002  (the rate is read from the device)
        self._optimizer.step()

    def memory(self) -> Memory:
        return Memory(served=size(self.weight), weights=size(self.weight), rule=self._optimizer.bytes())

    def finished(self) -> list[Finished]:
        """What may become of the table when training is over."""
        return made_smaller(self.weight.detach(), (8, 4))


class ProjectedTable(Table):
    """Narrow rows, times a trained fp32 projection to the width of the model; trained by Adam at `lr` times the base rate.

    With `bits` of 8 or 4 the forward pass sees rows that are rounded to integers with one fp32 scale for each row (its largest magnitude);
    the gradient passes the rounding unchanged and the rows are fp32 in training. Bytes served are those of the integers and scales.
    """

    def __init__(self, task: Task, variant: Variant, seed: int, rates: Rates) -> None:
        width, self._bits = variant.options["width"], variant.options["bits"]
        device = rates.base.device
        rows = initial_floats((task.vocabulary, width), 1.0, seed, stream=0)
        projection = initial_floats((width, task.width), 0.1 / width**0.5, seed, stream=1)
        self.rows = torch.nn.Parameter(torch.from_numpy(rows).to(device))
        self.projection = torch.nn.Parameter(torch.from_numpy(projection).to(device))
        self._adam = _Adam([self.rows, self.projection], variant.options["lr"], rates)

    def lookup(self, ids: Tensor) -> Tensor:
        rows = _DenseLookup.apply(self.rows, ids)
        if self._bits < 32:
            rows = rows + (self._rounded(rows.detach()) - rows.detach())
        return rows @ self.projection

    def _rounded(self, rows: Tensor) -> Tensor:
        levels = 2 ** (self._bits - 1) - 1
        unit = rows.abs().amax(-1, keepdim=True) / levels + 1e-12
        return (rows / unit).round() * unit

    def zero_grad(self) -> None:
        self._adam.zero_grad()

    def step(self, share: float) -> None:  # noqa: ARG002  (the rate is read from the device)
        self._adam.step()

    def memory(self) -> Memory:
        count, width = self.rows.shape
        scales = 4 * count if self._bits < 32 else 0
        served = count * -(-width * self._bits // 8) + scales + size(self.projection)
        return Memory(served=served, weights=size(self.rows, self.projection), rule=self._adam.bytes())


class StraightThrough(Table):
    """Latent fp32 weights in [-1, 1]; the forward pass sees their signs times a scale for each row.

    The gradient of a sign goes to its latent weight unchanged. `optimizer` is "adam" (the moments of a row change only when it occurs) or
    "sgd" on the gradient over its rms in the row. The scales are trained as those of a 1-bit table. Every operation is over the whole
    table, so that a CUDA graph can hold it.
    """

    def __init__(self, task: Task, variant: Variant, seed: int, rates: Rates) -> None:
        device = rates.base.device
        self._adam = variant.options["optimizer"] == "adam"
        self._lr, self._scale_lr, self._rates = variant.options["lr"], task.scale_lr, rates
        spread = 0.01 if self._adam else 0.004
        signs = torch.from_numpy(initial_bits(task, seed)).to(device)
        signs = (signs[:, :, None] >> torch.arange(8, device=device) & 1).view(task.vocabulary, task.width).float() * 2 - 1
        generator = torch.Generator(device=device).manual_seed(seed)
        self.latent = signs * torch.rand(signs.shape, generator=generator, device=device) * spread
        self.scale = torch.full((task.vocabulary, 1), INITIAL_SCALE, device=device)
        self._count = torch.zeros_like(self.scale)
        self._scale_m, self._scale_v = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        self._m = torch.zeros_like(self.latent) if self._adam else None
        self._v = torch.zeros_like(self.latent) if self._adam else None
        self._ids = self._rows = torch.empty(0, device=device)

    def lookup(self, ids: Tensor) -> Tensor:
        rows = _signs(F.embedding(ids, self.latent)) * F.embedding(ids, self.scale)
        if torch.is_grad_enabled():
            self._ids, self._rows = ids, rows.requires_grad_()
        return rows

    def zero_grad(self) -> None:
        self._rows.grad = None

    @torch.no_grad()
    def step(self, share: float) -> None:  # noqa: ARG002  (the rate is read from the device)
        ids, rows = self._ids.reshape(-1), self._rows.grad
        assert rows is not None
        gradient = _scattered(self.latent.shape, ids, rows)
        used = torch.zeros_like(self.scale).index_fill_(0, ids, 1.0).bool()
        self._count.add_(used)
        along = (gradient * _signs(self.latent)).sum(1, keepdim=True)
        move = self._adam_move(along, used, self._scale_m, self._scale_v, 0.99)
        self.scale.copy_(torch.where(used, (self.scale - self._rates.share * self._scale_lr * move).clamp_min(1e-4), self.scale))
        if self._m is not None and self._v is not None:
            move = self._adam_move(gradient, used, self._m, self._v, 0.999)
        else:
            move = gradient / (gradient.square().mean(1, keepdim=True).sqrt() + 1e-20)
        self.latent.copy_(torch.where(used, (self.latent - self._rates.share * self._lr * move).clamp(-1, 1), self.latent))

    def _adam_move(self, gradient: Tensor, used: Tensor, m: Tensor, v: Tensor, beta: float) -> Tensor:
        """Direction of Adam, with bias corrections from the count of each row; moments change in used rows only."""
        m.copy_(torch.where(used, 0.9 * m + 0.1 * gradient, m))
        v.copy_(torch.where(used, beta * v + (1 - beta) * gradient.square(), v))
        count = self._count.clamp_min(1)
        bias_m, bias_v = (1 - torch.exp(count * math.log(decay)) for decay in (0.9, beta))
        return (m / bias_m) / ((v / bias_v).sqrt() + 1e-12)

    def memory(self) -> Memory:
        rows, width = self.latent.shape
        moments = [moment for moment in (self._m, self._v) if moment is not None]
        scale = size(self.scale, self._count, self._scale_m, self._scale_v)
        return Memory(served=rows * -(-width // 8) + size(self.scale), weights=size(self.latent), rule=size(*moments), scale=scale)


class _Adam:
    """Dense Adam whose rate is a multiple of the base rate, on the device."""

    def __init__(self, parameters: list[torch.nn.Parameter], multiple: float, rates: Rates) -> None:
        self._rates, self._multiple = rates, multiple
        self._lr = torch.zeros_like(rates.base)
        self._parameters = parameters
        fast = {"fused": True, "capturable": True} if rates.base.is_cuda else {"foreach": False}
        self._optimizer = torch.optim.Adam(parameters, lr=self._lr, betas=(0.9, 0.99), **fast)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self._lr.copy_(self._rates.base * self._multiple)
        self._optimizer.step()

    def bytes(self) -> int:
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        return size(*(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")))


class _Adagrad:
    """Dense Adagrad with a sum for every element, at `rate` times the share of the full rate, which is on the device.

    Without weight decay it leaves rows that a step did not use as they are, as sparse Adagrad does.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], rate: float, rates: Rates) -> None:
        self._parameters, self._rate, self._rates = parameters, rate, rates
        self._sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            total.addcmul_(gradient, gradient)
            parameter.sub_(gradient / total.sqrt().add_(1e-10) * (self._rates.share * self._rate))

    def bytes(self) -> int:
        return size(*self._sums)


def made_smaller(weight: Tensor, integers: Sequence[int]) -> list[Finished]:
    """A finished table as integers of so many bits, and as signs with a scale for each row."""
    found: list[Finished] = []
    for bits in integers:
        found.append((f"int{bits}", torch.nn.Embedding.from_pretrained(rounded(weight, bits)), rounded_bytes(weight, bits)))
    packed: Any = dbt.BinaryEmbedding.from_float(weight)
    return [*found, ("signs", packed, packed.weight.bits.nbytes + packed.weight.scale.nbytes)]
