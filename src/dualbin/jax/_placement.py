"""Where the arrays of tables and states belong on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from dualbin.jax._active import ActiveTable
from dualbin.jax._rowgrad import is_place
from dualbin.jax._state import TableState
from dualbin.jax._table import BinaryTable, table_like

_REPLICATED = PartitionSpec()


def partition_specs(tree: Any, axis: str | tuple[str, ...] | None = None) -> Any:
    """The `PartitionSpec` of every array in a tree of parameters, gradients or optimizer state, for `shard_map` and `NamedSharding`.

    Args:
        tree: a pytree with tables or their states in it.
        axis: the mesh axis, or several, over which the rows of tables are sharded. None: each table's own `axis`, and for states, none.

    Returns:
        A tree of the same structure: rows of tables and of their states over `axis`, everything else on every device.
    """
    return jax.tree.map(lambda x: _specs(x, axis), tree, is_leaf=lambda x: isinstance(x, BinaryTable | TableState))


def _specs(x: Any, axis: str | tuple[str, ...] | None) -> Any:
    if is_place(x):
        return jax.tree.map(lambda _: _REPLICATED, x)
    if isinstance(x, BinaryTable):
        rows = _over_rows(x.axis if axis is None else axis, getattr(x.bits, "ndim", 2) - 2)
        if isinstance(x, ActiveTable):
            return ActiveTable.tree_unflatten((x.dim, x.planes, x.axis), (rows, rows, _REPLICATED, _REPLICATED))
        return table_like(x, rows, rows)
    if isinstance(x, TableState):
        rows = _over_rows(axis, np.ndim(x.step))
        everywhere: Any = jax.tree.map(lambda _: _REPLICATED, x)
        return everywhere._replace(arrays={name: rows for name in x.arrays})
    return _REPLICATED


def _over_rows(axis: str | tuple[str, ...] | None, stack: int) -> PartitionSpec:
    """Of an array with rows behind as many axes of a stack."""
    return PartitionSpec(*[None] * stack, axis)
