"""Sums over the occurrences of rows, and over row gradients of several backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualbin.torch import _native_call
from dualbin.torch._ids import check_range

#: so many sums of a row can be added in one pass: a block of the row sum, which adds in order
_BLOCK = 64


class _Reduce(torch.autograd.Function):
    """Sums by rows, differentiable: an occurrence has the gradient of its sum."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, rows: Tensor, table_rows: int, wait: bool) -> tuple[Tensor, Tensor]:
        out_ids, sums = _native_call.reduce_rows(ids, rows, table_rows, wait=wait)
        ctx.save_for_backward(ids, out_ids)
        ctx.mark_non_differentiable(out_ids)
        return out_ids, sums

    @staticmethod
    def backward(ctx: Any, _: Any, d_sums: Tensor) -> tuple[None, Tensor | None, None, None]:
        ids, out_ids = ctx.saved_tensors
        if out_ids.numel() == 0:  # none of the ids is a row of the table
            return None, None, None, None
        where = torch.searchsorted(out_ids, ids.long()).clamp(max=out_ids.shape[0] - 1)
        return None, d_sums[where] * (out_ids[where] == ids).unsqueeze(1), None, None


def reduce_rows(ids: Tensor, rows: Tensor, table_rows: int, *, wait: bool = True) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids and the float32 sums of their rows, a part of the graph where `rows` are; `wait` as in `_native_call`."""
    check_range(ids, table_rows)
    if rows.requires_grad and torch.is_grad_enabled():
        return _Reduce.apply(ids, rows.float(), table_rows, wait)
    return _native_call.reduce_rows(ids, rows.detach(), table_rows, wait=wait)


class RowSum:
    """The running sum of row gradients of one table, in the order that `docs/design.md` fixes: each is summed by rows, and these sums are
    added one after the other in float32.

    They are kept beside each other until they have more rows than the table, and from then on added to one array `[V, D]`: neither
    changes a bit, and the memory stays that of a dense gradient. On a GPU nothing waits for a count: unused slots have the id V.
    """

    def __init__(self, rows: int, dim: int) -> None:
        self._rows, self._dim = rows, dim
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._all: Tensor | None = None  #: [V + 1, D], the last row for unused slots
        self._seen: Tensor | None = None  #: bool [V + 1], the rows that have occurred

    def add(self, ids: Tensor, rows: Tensor) -> None:
        """Add the gradient (ids [N], rows [N, D]); neither is kept or changed."""
        check_range(ids, self._rows)
        self._parts.append(_native_call.reduce_rows(ids, rows.detach(), self._rows, wait=ids.is_cpu))
        if self._all is not None or sum(part[0].shape[0] for part in self._parts) > self._rows:
            self._add_to_all()
        elif len(self._parts) == _BLOCK:
            self._merge()

    def result(self) -> tuple[Tensor, Tensor]:
        """Distinct int64 ids and float32 rows; not to be added to any more."""
        if self._all is None or self._seen is None:
            if len(self._parts) > 1:
                self._merge()
            return self._parts[0]
        rows, seen = self._all[:-1], self._seen[:-1]
        if not rows.is_cpu:
            return torch.arange(self._rows, device=rows.device).masked_fill_(~seen, self._rows), rows
        ids = seen.nonzero().squeeze(1)
        return ids, rows if ids.shape[0] == self._rows else rows[ids]

    def _merge(self) -> None:
        ids, rows = (torch.cat(arrays) for arrays in zip(*self._parts, strict=True))
        self._parts = [_native_call.reduce_rows(ids, rows, self._rows, wait=ids.is_cpu)]

    def _add_to_all(self) -> None:
        device = self._parts[0][1].device
        if self._all is None or self._seen is None:
            self._all = torch.zeros(self._rows + 1, self._dim, device=device)
            self._seen = torch.zeros(self._rows + 1, dtype=torch.bool, device=device)
        for ids, rows in self._parts:
            if device.type == "cpu":  # each is several times faster on its device than the other; ids are distinct but for V, with zeros
                self._all.index_put_((ids,), rows, accumulate=True)
            else:
                self._all.index_add_(0, ids, rows)
            self._seen.index_fill_(0, ids, value=True)
        self._parts = []
