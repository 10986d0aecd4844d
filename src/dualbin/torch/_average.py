"""The average of two tables: `average`, and what `torch.lerp` and its kin do, which EMA and SWA are made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualbin._average_step import default_step, hash_rows
from dualbin._checks import check_float, check_int, check_same_planes
from dualbin.torch import _native_call
from dualbin.torch._table import BinaryTable

aten = torch.ops.aten

_MAX_WORD = 2**64 - 1
_count = itertools.count()  #: calls of torch.lerp so far, which takes no step: each has random numbers of its own
_PART = 1 << 22  #: bytes of a table that are widened at a time


def average(a: BinaryTable, b: BinaryTable, weight: float | Tensor, *, step: int | None = None, seed: int = 0) -> BinaryTable:
    """`(1 - weight) * a + weight * b` of two tables, in expectation.

    A packed weight cannot be between two levels. Where those of a and b differ, it goes the share `weight` of the way from one to the
    other, rounded up or down to a level at random such that the expected value is the average; a scale is the average of magnitudes
    (`dualbin.reference.average`). So an average of many small steps follows its tables, and a weight on which both agree stays.

    `torch.lerp(a, b, weight)` is the same, and `a.lerp_(b, weight)` and `torch._foreach_lerp_` do it in place; so
    `AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))` and `ema_pytorch.EMA` average tables, too. These take no step: they use
    the number of such calls in this process so far.

    Args:
        a, b: tables of one shape, device and number of planes; shards of one place.
        weight: of b, in [0, 1]; rounded to float32.
        step: chooses the random numbers, 0 to 2**64 - 1: averages that follow each other need different ones. None: from what both tables
            hold, for one more pass over them; so an average of the same tables is the same again. A shard needs a step.
        seed: likewise.

    Returns:
        A new table of a's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    _check("average", a, b)
    if step is None and a.first_row is not None:
        msg = "step must be given for a shard of a table: its shards have to agree on the random numbers"
        raise ValueError(msg)
    return _new_average(a, b, weight, step, seed)


def _new_average(a: BinaryTable, b: BinaryTable, weight: Any, step: int | None, seed: int) -> BinaryTable:
    with torch.no_grad():
        out = BinaryTable._wrap(torch.empty_like(a.bits), torch.empty_like(a.scale), a.shape[1], a.dtype, a.first_row)
    _average(a, b, weight, out, step, seed)
    return out


def _average(a: BinaryTable, b: BinaryTable, weight: Any, out: BinaryTable, step: int | None, seed: int = 0) -> None:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            msg = f"weight must be a number in [0, 1] for a whole table, got a tensor of shape {list(weight.shape)}"
            raise ValueError(msg)
        weight = weight.item()
    weight = check_float("weight", weight, low=0.0, high=1.0)
    if step is not None:
        step = check_int("step", step, low=0, high=_MAX_WORD)
    seed = check_int("seed", seed, low=0, high=_MAX_WORD)
    if a.bits.is_meta:
        return
    with torch._C.DisableTorchFunctionSubclass():
        arrays = [(table.bits.detach(), table.scale.detach()) for table in (a, b, out)]
        if step is None:
            number = default_step(_hash(*arrays[0]), _hash(*arrays[1]))
            template = _native_call.context_template(a.device, seed, a.first_row or 0, weight, 0.0)
            context = _native_call.device_context(template, number, weight)
        else:
            context = _native_call.host_context(a.device, seed, step, a.first_row or 0, weight, 0.0)
        _native_call.run("average", *arrays[0], *arrays[1], a.shape[1], context, *arrays[2])
        torch.autograd.graph.increment_version((out, out.bits, out.scale))


def _hash(bits: Tensor, scale: Tensor) -> Tensor:
    """`hash_rows` of a table, int64 on its device, with the memory of a part of it."""
    words = scale.reshape(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rows, columns = (torch.arange(size, device=bits.device) for size in bits.shape)
    count = max(1, _PART // bits.shape[1])
    parts = zip(bits.split(count), words.split(count), rows.split(count), strict=True)
    return sum(hash_rows(part.to(torch.int64), scales, columns, places) for part, scales, places in parts)


def _check(function: str, a: Any, b: Any) -> None:
    for name, table in (("a", a), ("b", b)):
        if not isinstance(table, BinaryTable):
            msg = f"{name} of {function} must be a BinaryTable as the other, got a {type(table).__name__}: pack floats with from_float"
            raise TypeError(msg)
    check_same_planes(f"a and b of {function}", a.planes, b.planes)
    if a.shape != b.shape or a.device != b.device or a.first_row != b.first_row:
        told = [f"{tuple(t.shape)} on {t.device}" + ("" if t.first_row is None else f" from row {t.first_row}") for t in (a, b)]
        msg = f"a and b of {function} must have the same shape, device and place, got {told[0]} and {told[1]}"
        raise ValueError(msg)


# ---- torch.lerp --------------------------------------------------------------------------------------------------------------------------


@BinaryTable.handles(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(_func: Any, a: Any, b: Any, weight: Any) -> BinaryTable:
    _check("lerp", a, b)
    return _new_average(a, b, weight, next(_count), 0)


@BinaryTable.handles(aten.lerp_.Scalar, aten.lerp_.Tensor)
def _lerp_(_func: Any, a: Any, b: Any, weight: Any) -> BinaryTable:
    _check("lerp_", a, b)
    _average(a, b, weight, a, next(_count))
    return a


@BinaryTable.handles(aten._foreach_lerp_.Scalar, aten._foreach_lerp_.ScalarList, aten._foreach_lerp_.List)
def _foreach_lerp_(_func: Any, a: Sequence[Tensor], b: Sequence[Tensor], weights: Any) -> None:
    each = weights if isinstance(weights, (list, tuple)) else itertools.repeat(weights, len(a))
    for mine, other, weight in zip(a, b, each, strict=True):
        mine.lerp_(other, weight)


@BinaryTable.handles(aten._foreach_copy_.default)
def _foreach_copy_(_func: Any, a: Sequence[Tensor], b: Sequence[Tensor], non_blocking: bool = False) -> None:
    for mine, other in zip(a, b, strict=True):
        mine.copy_(other, non_blocking)
