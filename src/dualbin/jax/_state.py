"""Optimizer state of one table, its step context, and the window of `every`."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dualbin._checks import check_float, check_int
from dualbin.jax import _ops
from dualbin.jax._ids import row_dtype
from dualbin.jax._table import BinaryTable, check_table
from dualbin.rules import Counter, Rule, check_rule, state_spec

#: an array, or None where rule or scale_lr need none
MaybeArray = Any

#: the arrays that the native library changes
ARRAYS = ("counter", "ema", "count", "scale_m", "scale_v")

#: V * D up to which the window of `every` may hold every row of the table
_FULL_WINDOW = 1 << 26


class TableState(NamedTuple):
    """State of one table; arrays that rule and scale_lr do not need are None.

    Attributes:
        step: int32, finished updates of the table.
        counter: uint8 `[V, (bits - 1) * B]`, bit-planes of the rule `Counter`.
        ema: float32 `[V, D]`, rule `Bop`.
        count: int32 `[V]`, finished updates of the row.
        scale_m: float32 `[V]`, first moment of the scale.
        scale_v: float32 `[V]`, second moment of the scale.
        pending_ids: int32 or int64 `[P]`, ascending, unused slots hold V: rows of the open window of `every`.
        pending_rows: float32 `[P, D]`, their sums.
        pending_steps: int32, steps in the open window.
        pending_used: int32, rows in the open window.
        pending_lost: int32, rows that did not fit into P slots so far; :func:`dualbin.jax.check_errors` raises when it is not 0.
        stats: uint32 `[8]`, four little-endian uint64 of the last step: flips, rows updated, rows skipped as not finite, counters at their
            maximum. :func:`dualbin.jax.read_stats` decodes it.
    """

    step: Array
    counter: MaybeArray
    ema: MaybeArray
    count: MaybeArray
    scale_m: MaybeArray
    scale_v: MaybeArray
    pending_ids: MaybeArray
    pending_rows: MaybeArray
    pending_steps: MaybeArray
    pending_used: MaybeArray
    pending_lost: MaybeArray
    stats: Array


def init_state(table: BinaryTable, rule: Rule | None = None, scale_lr: Any = 3e-3, *, pending_rows: int | None = None) -> TableState:
    """A fresh state.

    Args:
        table: the table.
        rule: one of `dualbin.rules`; None is `Counter(8)`.
        scale_lr: 0 freezes the scale and allocates nothing for it.
        pending_rows: P, rows that the window of `every` can hold; None is V, for tables of at most 2**26 weights.

    The arrays are where the rows of the table are, where that is known: outside jit, or with Explicit axes.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range; `pending_rows` is None and the table is too large.
    """
    rows, dim = check_table(table).shape
    rule = check_rule(Counter(8) if rule is None else rule)
    spec = state_spec(rule, rows, dim, train_scale=trains_scale(scale_lr))
    device = like_rows(table.bits)
    arrays = {name: jnp.zeros(*spec[name], device=device) if name in spec else None for name in ARRAYS}
    window: dict[str, Array | None] = dict.fromkeys(("pending_ids", "pending_rows", "pending_steps", "pending_used", "pending_lost"))
    if rule.every > 1:
        slots = _window_size(rows, dim, pending_rows)
        window = {
            "pending_ids": jnp.full((slots,), rows, row_dtype(rows)),
            "pending_rows": jnp.zeros((slots, dim), jnp.float32),
            "pending_steps": jnp.zeros((), jnp.int32),
            "pending_used": jnp.zeros((), jnp.int32),
            "pending_lost": jnp.zeros((), jnp.int32),
        }
    return TableState(step=jnp.zeros((), jnp.int32), **arrays, **window, stats=jnp.zeros((8,), jnp.uint32))


def like_rows(bits: Array) -> Sharding | None:
    """The sharding of an array with one entry for each row of the table, if bits tell theirs."""
    traced = isinstance(bits, jax.core.Tracer)
    sharding = jax.typeof(bits).sharding if traced else getattr(bits, "sharding", None)
    if isinstance(sharding, SingleDeviceSharding) and getattr(bits, "committed", False):
        return sharding
    if not isinstance(sharding, NamedSharding) or (traced and not any(sharding.spec)):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def _window_size(rows: int, dim: int, pending_rows: int | None) -> int:
    if pending_rows is not None:
        return min(check_pending_rows(pending_rows), rows)
    if rows * dim > _FULL_WINDOW:
        msg = (
            f"pending_rows is needed with every > 1 for a table of {rows} x {dim} weights: give the most distinct rows that occur in the "
            "steps of one window"
        )
        raise ValueError(msg)
    return rows


def check_pending_rows(pending_rows: Any) -> int:
    if isinstance(pending_rows, jax.core.Tracer | Array):
        msg = "pending_rows must be a Python int; with optax.inject_hyperparams name it in static_args"
        raise TypeError(msg)
    return check_int("pending_rows", pending_rows, low=1)


def as_state(state: Any) -> Any:
    """`state` as a :class:`TableState` where it is a mapping of its fields, which is what `nnx.Optimizer` makes of one."""
    if isinstance(state, Mapping) and set(state) <= set(TableState._fields):
        fields: dict[str, Any] = {name: state.get(name) for name in TableState._fields}
        return TableState(**fields)
    return state


def check_state(state: object, table: BinaryTable, rule: Rule, scale_lr: Any, name: str = "state") -> TableState:
    """Return `state` if it fits table and rule, else raise TypeError or ValueError."""
    if not isinstance(state, TableState):
        msg = f"{name} must be a dualbin.jax.TableState (see init_state), got {type(state).__name__}"
        raise TypeError(msg)
    rows, dim = table.shape
    spec = state_spec(rule, rows, dim, train_scale=trains_scale(scale_lr))
    for field in ARRAYS:
        value = getattr(state, field)
        given = None if value is None else (tuple(value.shape), value.dtype.name)
        if given != spec.get(field):
            msg = f"{name}.{field} must be {_describe(spec.get(field))} for this table, rule and scale_lr, got {_describe(given)}"
            raise ValueError(msg)
    pending = state.pending_rows
    if (rule.every > 1) != (pending is not None) or (pending is not None and pending.shape[1] != dim):
        have = "no window" if pending is None else f"a window of rows with {pending.shape[1]} columns"
        msg = f"{name} has {have}, which does not fit every={rule.every} and a table of {dim} columns"
        raise ValueError(msg)
    return state


def _describe(spec: tuple[tuple[int, ...], str] | None) -> str:
    return "None" if spec is None else f"{spec[1]} {list(spec[0])}"


# ---- hyper-parameters --------------------------------------------------------------------------------------------------------------------


def check_rate(name: str, value: Any) -> Any:
    """Return `value` if it is a number of at least 0 or a scalar array (which may be traced)."""
    if isinstance(value, numbers.Real):
        return check_float(name, value, low=0.0)
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.number) or jnp.issubdtype(value.dtype, jnp.complexfloating):
        msg = f"{name} must be a number, got {type(value).__name__}"
        raise TypeError(msg)
    if value.shape != ():
        msg = f"{name} must be a scalar, got shape {list(value.shape)}"
        raise ValueError(msg)
    return value


def check_seed(seed: Any) -> Any:
    """Return `seed` if it is an int of 64 bits or an integer scalar array."""
    if not hasattr(seed, "dtype"):
        return check_int("seed", seed, low=0, high=2**64 - 1)
    if not jnp.issubdtype(seed.dtype, jnp.integer) or seed.shape != ():
        msg = f"seed must be an integer, got {seed.dtype.name} of shape {list(seed.shape)}"
        raise TypeError(msg)
    return seed


def trains_scale(scale_lr: Any) -> bool:
    """Whether the scale has moments: always where scale_lr is an array, which may change."""
    return not isinstance(scale_lr, numbers.Real) or check_float("scale_lr", scale_lr, low=0.0) > 0


def make_context(seed: Any, step: Array, learning_rate: Any, scale_lr: Any) -> Array:
    """The step context of a whole table, uint32 `[8]`: the words of seed, step and first row (0), the bits of both rates as float32."""
    if hasattr(seed, "dtype"):
        high = jnp.right_shift(seed, 32) if seed.dtype.itemsize == 8 else 0
        words = [jnp.asarray(seed).astype(jnp.uint32), jnp.asarray(high).astype(jnp.uint32)]
    else:
        words = [jnp.asarray(np.uint32(seed & 0xFFFFFFFF)), jnp.asarray(np.uint32(seed >> 32))]
    rates = [lax.bitcast_convert_type(jnp.asarray(rate).astype(jnp.float32), jnp.uint32) for rate in (learning_rate, scale_lr)]
    zero = jnp.zeros((), jnp.uint32)
    return jnp.stack([*words, step.astype(jnp.uint32), zero, zero, zero, *rates])


# ---- steps -------------------------------------------------------------------------------------------------------------------------------


def has_rows(ids: Array, rows: int) -> Array:
    """bool: some id is in the table. A step without one does not count."""
    return jnp.any((ids >= 0) & (ids < rows))


def add_to_window(state: TableState, ids: Array, sums: Array, every: int, rows: int) -> tuple[TableState, Array, Array, Array]:
    """Add a step's distinct rows to the window of `every`.

    Args:
        state: with a window of P slots.
        ids: `[U]`, distinct; ids outside [0, rows) are skipped.
        sums: float32 `[U, D]`.
        every: steps in a window.
        rows: V.

    Returns:
        The state with the new window, and what to update by now: ids `[P]` (all V while the window is open), their sums `[P, D]`, and
        whether the window is full.
    """
    slots = state.pending_ids.shape[0]
    known = jnp.where((ids >= 0) & (ids < rows), ids, rows).astype(state.pending_ids.dtype)
    # the old rows come first, so a row in both is old + new
    merged_ids, merged, count = _ops.reduce_rows(
        jnp.concatenate([state.pending_ids, known]), jnp.concatenate([state.pending_rows, sums]), rows, slots
    )
    steps = state.pending_steps + has_rows(ids, rows).astype(jnp.int32)
    full = steps == every
    after = state._replace(
        pending_ids=jnp.where(full, rows, merged_ids),
        pending_rows=jnp.where(full, 0.0, merged),
        pending_steps=jnp.where(full, 0, steps),
        pending_used=jnp.where(full, 0, jnp.minimum(count[0], slots)),
        pending_lost=state.pending_lost + jnp.maximum(count[0] - slots, 0),
    )
    # an update without a row changes nothing, so no branch is needed, in which XLA might copy the table
    return after, jnp.where(full, merged_ids, rows), merged, full


def finish(state: TableState, arrays: dict[str, Array | None], stats: Array, done: Array) -> TableState:
    return state._replace(**arrays, step=state.step + done.astype(jnp.int32), stats=stats)
