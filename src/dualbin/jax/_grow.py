"""More rows for a table that has been trained."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from dualbin._checks import INDEPENDENT, check_int, check_rows, check_spread
from dualbin._schema import packed_width
from dualbin.jax._bag import lookup_bag
from dualbin.jax._ids import row_dtype
from dualbin.jax._random import random_bits
from dualbin.jax._state import TableState, Window
from dualbin.jax._table import BinaryTable, check_table, make_table, table_like


def grow(
    table: BinaryTable, rows: int, key: Array | None = None, *, state: TableState | None = None, values: Any = None, spread: float = 0.5
) -> Any:
    """Give a table more rows, while everything that was learned stays.

    The rows that are there keep their bits and scales and, in the state, counters, counts, moments and their part of an open window of
    `every=K`. New rows are random, with the mean magnitude of the other rows' scales (padding rows aside), and have no state yet.

    Args:
        table: the table, V rows of D weights.
        rows: the number of rows from now on, more than V.
        key: a key of `jax.random` for the bits of the new rows.
        state: the :class:`TableState` of the table, as it is in `XorState.tables`; it grows with the table.
        values: float32, float16 or bfloat16 `[rows - V, D]`, concrete: what to pack into the new rows, in place of random ones.
        spread: probability with which a random sign differs from the majority of its column, rounded to 256ths; 0.5: the majority does not
            matter. Give what the table was made with.

    Returns:
        The larger table; with a state, `(table, state)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or not exactly one of key and values is given.
    """
    old, _ = check_table(table).shape
    added = check_rows("rows", check_int("rows", rows, low=old + 1), table.dim) - old
    share = check_spread(spread)
    if (key is None) == (values is None):
        msg = f"grow needs a key for random rows, or values, got {'neither' if key is None else 'both'}"
        raise ValueError(msg)
    if state is not None and not isinstance(state, TableState):
        msg = f"state must be a dualbin.jax.TableState, as in XorState.tables, got {type(state).__name__}"
        raise TypeError(msg)
    new = _packed(values, added, table) if key is None else _random(key, table, added, share)
    bits, scale = (jnp.concatenate([getattr(x, name) for x in (table, new)]) for name in ("bits", "scale"))
    larger = table_like(table, bits, scale)
    return larger if state is None else (larger, _grown(state, old, added))


def _random(key: Array, table: BinaryTable, added: int, spread: int) -> BinaryTable:
    """Random rows like those of a new table."""
    pattern = None
    if spread != INDEPENDENT:
        signs = make_table(table.bits[:, : packed_width(table.dim)], table.scale, dim=table.dim, planes=1, axis=table.axis)
        majority = lookup_bag(signs, jnp.arange(table.shape[0]), jnp.zeros((table.shape[0],), jnp.int32), 1, mode="majority")
        pattern = jnp.packbits(majority > 0, axis=-1, bitorder="little")
    magnitudes, used = jnp.abs(table.scale), table.scale != 0
    mean = jnp.sum(magnitudes) / jnp.maximum(jnp.sum(used), 1).astype(jnp.float32)
    scale = jnp.where(used.any(), mean, jnp.float32(0.3))  # that of a new table, where all rows are padding
    return table_like(table, random_bits(key, added, table.dim, spread, pattern, table.planes), jnp.full((added, 1), scale))


def _packed(values: Any, added: int, table: BinaryTable) -> BinaryTable:
    if np.shape(values) != (added, table.dim):
        msg = f"values must have shape [{added}, {table.dim}], got {list(np.shape(values))}"
        raise ValueError(msg)
    try:
        return BinaryTable.from_float(values, planes=table.planes)
    except (TypeError, ValueError) as error:
        msg = f"values of grow: {error}"
        raise type(error)(msg) from None


def _grown(state: TableState, old: int, added: int) -> TableState:
    """The state with zeros for the new rows."""
    rows = old + added
    arrays = {name: _longer(x, added, 0) for name, x in state.arrays.items()}
    window = state.window
    if isinstance(window, Window):
        ids = jnp.where(window.ids < old, window.ids, old).astype(row_dtype(rows))
        ids = jnp.where(ids == old, jnp.asarray(rows, ids.dtype), ids)  # unused slots hold V
        more = added if len(ids) == old else 0  # a window that may hold every row still may
        window = window._replace(ids=_longer(ids, more, rows), rows=_longer(window.rows, more, 0))
    return state._replace(arrays=arrays, window=window)


def _longer(x: Array, added: int, value: int) -> Array:
    return jnp.concatenate([x, jnp.full((added, *x.shape[1:]), value, x.dtype)]) if added else x
