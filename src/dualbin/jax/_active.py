"""`activate`: the rows that a step may use, declared before its loss is differentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualbin._checks import check_int
from dualbin.jax import _ops, _slots
from dualbin.jax._ids import row_dtype, to_declared_ids
from dualbin.jax._link import Link
from dualbin.jax._table import BinaryTable, all_rows, check_table


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class ActiveTable(BinaryTable):
    """A table whose rows of a step are declared: what :func:`activate` returns.

    Args:
        bits, scale, dim, planes, axis: as of :class:`BinaryTable`.
        slots: float32 `[U, k]`, the declared rows in a form of this library; :attr:`row_ids` are their numbers.
        tap: float32 `[U, D]` zeros that no one reads. The gradient with respect to it is the row gradient.
    """

    slots: Any = None
    tap: Any = None

    def __post_init__(self) -> None:
        """Nothing: the table was checked when it was made, and `dataclasses.replace` is in every step."""

    @property
    def row_ids(self) -> Array:
        """The declared rows, int `[U]`, ascending; unused slots and the last one hold V."""
        return _slots.decode(self.slots)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (self.bits, self.scale, self.slots, self.tap), (self.dim, self.planes, self.axis)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> ActiveTable:
        table = object.__new__(cls)
        for name, value in zip(("bits", "scale", "slots", "tap", "dim", "planes", "axis", "_link"), (*children, *aux, None), strict=True):
            object.__setattr__(table, name, value)
        return table


def activate(table: BinaryTable, ids: Any, *, capacity: int | None = None) -> ActiveTable:
    """Declare the rows that a step may use: the low-level form of :func:`dualbin.jax.value_and_grad`.

    The result looks up as `table` does; the gradient with respect to its `tap` is the row gradient::

        active = dbj.activate(table, ids)
        taps = jax.grad(lambda tap: loss(dataclasses.replace(active, tap=tap)))(active.tap)
        grad = dbj.RowGrad(active.row_ids, taps)

    To accumulate over micro-batches declare the ids of all of them once and add the taps, for example in a scan.

    Args:
        table: the table.
        ids: int array, or a pytree of them, with the rows; ids outside [0, V) are skipped.
        capacity: the most distinct rows, at least 1; by default as many as there are ids. Where a step has more, the highest ids are not
            declared: :meth:`RowGrad.missed` tells.

    Returns:
        The table with `row_ids` `[U]` and `tap` `[U, D]`, U one more than `min(ids, V, capacity)`: gradients of rows that were not
        declared go to the last slot.

    Raises:
        TypeError, ValueError: a malformed table, ids of another dtype, or a capacity below 1.
    """
    check_table(table)
    ids = declare(table, ids, capacity)
    slots, tap = link_rows(table, ids)
    return ActiveTable(table.bits, table.scale, table.dim, table.planes, table.axis, slots, tap)


def declare(table: BinaryTable, ids: Any, capacity: int | None = None) -> Array:
    """The declared rows, int `[U]`; arguments as for :func:`activate`."""
    rows = all_rows(table)
    parts = [_ops.replicate(to_declared_ids(part, rows)) for part in jax.tree.leaves(ids, is_leaf=_is_number_list)]
    # min_dim and not min: the size of a batch may be a symbol of jax.export
    slots = jax.core.min_dim(sum(math.prod(part.shape) for part in parts), rows)
    if capacity is not None:
        slots = jax.core.min_dim(slots, check_int("capacity", capacity, low=1))
    flat = jnp.concatenate([jnp.zeros((0,), row_dtype(rows)), *parts])
    return _distinct(flat, slots=slots, rows=rows)


def link_rows(table: BinaryTable, row_ids: Array) -> Link:
    """The link of a table to its declared rows."""
    return Link(_slots.encode(row_ids), jnp.zeros((row_ids.shape[0], table.dim), jnp.float32))


@partial(jax.jit, static_argnames=("slots", "rows"))
def _distinct(ids: Array, *, slots: int, rows: int) -> Array:
    """The lowest `slots` distinct ids below `rows`, ascending, then `rows` up to `slots + 1` entries."""
    ordered = jnp.sort(ids)
    first = (ordered < rows) & (jnp.diff(ordered, prepend=-1) != 0)
    order = jnp.cumsum(first) - 1
    places = jnp.where(first & (order < slots), order, slots + 1)
    return jnp.full((slots + 1,), rows, ids.dtype).at[places].set(ordered, mode="drop")


def _is_number_list(x: object) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(item, int) for item in x)
