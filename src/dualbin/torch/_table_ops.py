"""What torch's own code does with a table as with any parameter: copies, moves, casts, ranges of rows, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from dualbin._checks import check_same_planes
from dualbin.torch._offload import give_tables_inside
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_checks import check_dtype

aten = torch.ops.aten


@BinaryTable.handles(aten.detach.default, aten.alias.default)
def _detach(func: Any, table: BinaryTable) -> BinaryTable:
    return return_and_correct_aliasing(func, (table,), {}, _map(table, func))


@BinaryTable.handles(aten.view.default)
def _view(func: Any, table: BinaryTable, size: Sequence[int]) -> BinaryTable:
    """To its own shape only, as torch does to find the node of a parameter in the graph."""
    if tuple(size) != tuple(table.shape):
        raise BinaryTable._dense(func, "with another shape")
    return return_and_correct_aliasing(func, (table, size), {}, _map(table, aten.alias.default))


@BinaryTable.handles(aten.clone.default)
def _clone(_func: Any, table: BinaryTable, **_: Any) -> BinaryTable:
    return _map(table, lambda array: array.clone(memory_format=torch.contiguous_format))


@BinaryTable.handles(aten._to_copy.default)
def _to_copy(_func: Any, table: BinaryTable, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> BinaryTable:
    """Only the dtype of looked-up rows changes: bits stay uint8 and the scale stays float32."""
    dtype = table.dtype if dtype is None else check_dtype("dtype of a BinaryTable", dtype)
    new = _map(table, lambda array: array.to(device=device, non_blocking=non_blocking, copy=True), dtype)
    if new.is_meta and not table.is_meta:
        give_tables_inside(new)
    return new


@BinaryTable.handles(aten._pin_memory.default)
def _pin_memory(_func: Any, table: BinaryTable, *_: Any) -> BinaryTable:
    return _map(table, lambda array: array.pin_memory())


@BinaryTable.handles(aten.is_pinned.default)
def _is_pinned(_func: Any, table: BinaryTable, *_: Any) -> bool:
    return table.bits.is_pinned() and table.scale.is_pinned()


@BinaryTable.handles(aten.copy_.default)
def _copy_(func: Any, table: Any, source: Any, non_blocking: bool = False) -> BinaryTable:
    if not (isinstance(table, BinaryTable) and isinstance(source, BinaryTable)):
        msg = (
            f"{func} between a BinaryTable and a dense tensor: pack a float table with BinaryTable.from_float, unpack with .dequantize(), "
        )
        msg += "and give fully_shard ignored_params=set(dualbin.torch.prepare_ddp(module))"
        raise NotImplementedError(msg)
    if table.shape != source.shape:
        msg = f"source must have the shape {tuple(table.shape)} of the table, got {tuple(source.shape)}"
        raise ValueError(msg)
    check_same_planes("the table and source", table.planes, source.planes)
    table.bits.copy_(source.bits, non_blocking=non_blocking)
    table.scale.copy_(source.scale, non_blocking=non_blocking)
    return table


@BinaryTable.handles(aten.empty_like.default)
def _empty_like(_func: Any, table: BinaryTable, *, dtype: Any = None, device: Any = None, **_: Any) -> BinaryTable:
    dtype = table.dtype if dtype is None else check_dtype("dtype of a BinaryTable", dtype)
    return _map(table, lambda array: torch.zeros_like(array, device=device), dtype)  # zeros: padding bits must be 0 in any table


@BinaryTable.handles(aten.zeros_like.default)
def _zeros_like(_func: Any, table: BinaryTable, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> RowGrad:
    """The zero gradient: what torch makes of a parameter to initialise an optimizer, or to stand for a gradient that there is not."""
    ids = torch.empty(0, dtype=torch.int64, device=device or table.device)
    rows = torch.empty(0, table.shape[1], dtype=check_dtype("dtype", dtype or table.dtype), device=ids.device)
    return RowGrad._wrap(ids, rows, table.shape)


@BinaryTable.handles(aten.slice.Tensor)
def _slice(func: Any, table: BinaryTable, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> BinaryTable:
    if dim != 0 or step != 1:
        raise BinaryTable._dense(func, "other than of consecutive rows")
    return return_and_correct_aliasing(func, (table,), {}, _row_range(table, start, end))


@BinaryTable.handles(aten.split.Tensor)
def _split(func: Any, table: BinaryTable, size: int, dim: int = 0) -> list[BinaryTable]:
    if dim != 0:
        raise BinaryTable._dense(func, "along its columns")
    return [_row_range(table, start, start + size) for start in range(0, table.shape[0], size)]


@BinaryTable.handles(aten.equal.default)
def _equal(_func: Any, table: Any, other: Any) -> bool:
    if not (isinstance(table, BinaryTable) and isinstance(other, BinaryTable)):
        return False
    return table.shape == other.shape and torch.equal(table.bits, other.bits) and torch.equal(table.scale, other.scale)


def _row_range(table: BinaryTable, start: int | None, end: int | None) -> BinaryTable:
    """Consecutive rows, in the same memory; those of a shard keep their place in the whole table."""
    first_row = None if table.first_row is None else table.first_row + slice(start, end).indices(table.shape[0])[0]
    return BinaryTable._wrap(table.bits[start:end], table.scale[start:end], table.shape[1], table.dtype, first_row)


def _map(table: BinaryTable, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> BinaryTable:
    dtype = table.dtype if dtype is None else dtype
    new = BinaryTable._wrap(change(table.bits), change(table.scale), table.shape[1], dtype, table.first_row)
    if table.frozen is not None:  # the meta device would forget it
        new.frozen = table.frozen if new.bits.is_meta else table.frozen.to(new.bits.device)
    return new
