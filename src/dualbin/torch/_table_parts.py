"""What is made from a table: its parts, its address, and plain tensors of its dtype and device (`new_zeros` and its kin)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_int
from dualbin.torch._refusals import refusal
from dualbin.torch._table import BinaryTable

aten = torch.ops.aten


def _options(table: BinaryTable, dtype: Any, device: Any, pin_memory: Any) -> dict[str, Any]:
    return {"dtype": dtype or table.dtype, "device": table.device if device is None else device, "pin_memory": bool(pin_memory)}


@BinaryTable.handles(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
def _new(
    func: Any, table: BinaryTable, size: Sequence[int], *, dtype: Any = None, device: Any = None, pin_memory: Any = None, **_: Any
) -> Tensor:
    make: Any = {aten.new_empty.default: torch.empty, aten.new_zeros.default: torch.zeros, aten.new_ones.default: torch.ones}[func]
    return make(size, **_options(table, dtype, device, pin_memory))


@BinaryTable.handles(aten.new_full.default)
def _new_full(
    _func: Any,
    table: BinaryTable,
    size: Sequence[int],
    value: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    **_: Any,
) -> Tensor:
    return torch.full(size, value, **_options(table, dtype, device, pin_memory))


@BinaryTable.handles(torch.split, Tensor.split)
def _split_into_slices(func: Any, table: BinaryTable, size: int | Sequence[int], dim: int = 0) -> tuple[BinaryTable, ...]:
    """As Tensor.split. In the gradient of torch's own, parts that were not looked up would be dense zeros."""
    if dim not in {0, -2}:
        raise refusal(func, "along its columns")
    rows = table.shape[0]
    sizes = [min(size, rows - start) for start in range(0, rows, size)] if isinstance(size, int) else list(size)
    if sum(sizes) != rows:
        msg = f"split sizes must add up to the {rows} rows of the table, got {sizes}"
        raise ValueError(msg)
    ends = itertools.accumulate(sizes)
    return tuple(table[end - length : end] for length, end in zip(sizes, ends, strict=True))  # type: ignore[misc]


@BinaryTable.handles(torch.chunk, Tensor.chunk)
def _chunk_into_slices(func: Any, table: BinaryTable, chunks: int, dim: int = 0) -> tuple[BinaryTable, ...]:
    return _split_into_slices(func, table, -(-table.shape[0] // check_int("chunks", chunks, low=1)), dim)


@BinaryTable.handles(Tensor.data_ptr)
def _data_ptr(_func: Any, table: BinaryTable) -> int:
    """Of the bits. Torch's own is 0 for every table, and code that finds tied parameters by it would take all tables for one."""
    return table.bits.data_ptr()
