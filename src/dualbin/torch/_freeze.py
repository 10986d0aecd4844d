"""Rows of a table that stay as they are while the others train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualbin.torch._ids import check_ids, check_range
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_module import TableModule


def freeze_rows(module: TableModule | BinaryTable, ids: Tensor | Sequence[int]) -> None:
    """Leave rows of a table alone, until :func:`unfreeze_rows`: :class:`XOR` changes neither their bits and scale nor their state.

    Their rows of the gradient are zeros, so norms do not see them. An open window of `every=K` drops what it holds of them. Rows that are
    frozen already stay frozen. To freeze a whole table use `requires_grad_(False)`, which is as little saved in a state_dict as this is:
    freeze the rows again after loading into a new module. Copies, `.to(...)` and `load_state_dict` keep them frozen.

    Args:
        module: a :class:`BinaryEmbedding`, :class:`BinaryEmbeddingBag` or :class:`ShardedBinaryEmbedding` (every rank must call it), or a
            table.
        ids: int32 or int64 tensor of any shape, or a sequence of ints, in [0, V); of a sharded module rows of the whole table.

    Raises:
        TypeError, IndexError: an argument has the wrong type or is out of range. Nothing has changed then.
    """
    table, rows = _rows_here("freeze_rows", module, ids)
    mask = torch.zeros(table.shape[0], dtype=torch.bool) if table.frozen is None else table.frozen.clone()
    mask[rows.to(mask.device)] = True
    table.frozen = mask if table.is_meta else mask.to(table.device)
    table.zero_frozen_gradients()


def unfreeze_rows(module: TableModule | BinaryTable, ids: Tensor | Sequence[int] | None = None) -> None:
    """Let rows train again that :func:`freeze_rows` froze.

    Args:
        module: as there.
        ids: as there; None for all rows.

    Raises:
        TypeError, IndexError: an argument has the wrong type or is out of range. Nothing has changed then.
    """
    table, rows = _rows_here("unfreeze_rows", module, [] if ids is None else ids)
    mask = None if ids is None or table.frozen is None else table.frozen.clone()
    if mask is not None:
        mask[rows.to(mask.device)] = False
    table.frozen = mask
    table.zero_frozen_gradients()


def without_frozen(table: BinaryTable, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A row gradient without the frozen rows. On a GPU, where the number of the others is not known, their ids become V: padding."""
    if table.frozen is None:
        return ids, rows
    known = ids.clamp(0, table.shape[0] - 1).long()  # bad ids have been reported
    if ids.is_cpu:
        trained = ~table.frozen[known]
        return ids[trained], rows[trained]
    return torch.where(table.frozen[known], table.shape[0], ids), rows


def _rows_here(function: str, module: Any, ids: Any) -> tuple[BinaryTable, Tensor]:
    """The table, and which of its own rows `ids` are."""
    table = module.weight if isinstance(module, TableModule) else module
    if not isinstance(table, BinaryTable):
        msg = f"module of {function} must be one of dualbin's embedding modules or a BinaryTable, got a {type(module).__name__}"
        raise TypeError(msg)
    if not isinstance(ids, Tensor):
        if not isinstance(ids, Iterable):
            msg = f"ids must be a tensor or integers, got a {type(ids).__name__}"
            raise TypeError(msg)
        ids = torch.tensor([_as_int(row) for row in ids], dtype=torch.int64)
    check_ids(ids, ids.device)
    if ids.is_meta:
        msg = "ids must have values, got a tensor on meta"
        raise ValueError(msg)
    ids = ids.detach().reshape(-1).cpu().long()
    whole = isinstance(module, TableModule)
    check_range(ids, module.num_embeddings if whole else table.shape[0])
    if whole and table.first_row is not None:
        ids = ids - table.first_row
        ids = ids[(ids >= 0) & (ids < table.shape[0])]
    return table, ids


def _as_int(row: object) -> int:
    if isinstance(row, bool) or not isinstance(row, int):
        msg = f"ids must be integers, got {row!r}"
        raise TypeError(msg)
    return row
