"""Optimizer state of one table, its step context, and the window of `every`."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dualbin._checks import check_int
from dualbin._checks import check_rate as check_float32
from dualbin._float32 import nearest_float32
from dualbin._schema import RECORD, STATE_ARRAYS
from dualbin._state_checks import check_state_planes
from dualbin.jax import _ops
from dualbin.jax._ids import row_dtype
from dualbin.jax._table import BinaryTable, check_table
from dualbin.rules import Counter, Rule, resolve, state_layout

#: V * D up to which the window of `every` may hold every row of the table
_FULL_WINDOW = 1 << 26


class Window(NamedTuple):
    """The open window of a rule with `every=K`.

    Attributes:
        ids: int32 or int64 `[P]`, ascending, unused slots hold V: its rows.
        rows: float32 `[P, D]`, their sums.
        steps: int32, its steps so far.
        used: int32, its rows so far.
        lost: int32, rows that did not fit into P slots so far; :func:`dualbin.jax.check_errors` raises when it is not 0.
    """

    ids: Array
    rows: Array
    steps: Array
    used: Array
    lost: Array


class Adagrad(NamedTuple):
    """Says of a state that it sums squares, as `norm="adagrad"` needs them; it holds no arrays."""


class TableState(NamedTuple):
    """State of one table.

    `count`, `squares`, `scale_m` and `scale_v` are attributes, too, `[V]` each, None where absent: those of a trained scale are read from
    its record.

    Attributes:
        step: int32, finished updates of the table.
        arrays: those of `counter`, `ema`, `record`, `count` and `squares` that rule and scale_lr need, by name (docs/design.md); each is
            also an attribute, None where absent.
        window: the :class:`Window` of a rule with `every > 1`, else empty.
        stats: uint32 `[8]`, four little-endian uint64 of the last step: flips, rows updated, rows skipped as not finite, counters at their
            maximum. :func:`dualbin.jax.read_stats` decodes it.
        norm: :class:`Adagrad` where the rule sums squares, else empty.
        more_planes: an empty tuple for every plane of the table after its first, so that a state, which has the bits below the planes of
            its table, is known by its structure; the attribute `planes` counts them.
    """

    step: Array
    arrays: dict[str, Array]
    window: Window | tuple[()]
    stats: Array
    norm: Adagrad | tuple[()] = ()
    more_planes: tuple[tuple[()], ...] = ()

    @property
    def planes(self) -> int:
        """Of the table."""
        return 1 + len(self.more_planes)


def _array(name: str) -> property:
    return property(lambda state: state.arrays.get(name))


def _number(name: str, place: int, dtype: str) -> property:
    """A number of every row, from the record if there is one."""

    def read(state: TableState) -> Any:
        record = state.arrays.get("record")
        if record is None:
            return state.arrays.get(name)
        return lax.bitcast_convert_type(jnp.asarray(record)[..., place], jnp.dtype(dtype))

    return property(read)


for _name in STATE_ARRAYS:
    setattr(TableState, _name, _array(_name))
for _place, (_name, _dtype) in enumerate(RECORD.items()):
    setattr(TableState, _name, _number(_name, _place, _dtype))


def init_state(table: BinaryTable, rule: Rule | None = None, scale_lr: Any = 3e-3, *, pending_rows: int | None = None) -> TableState:
    """A fresh state.

    Args:
        table: the table.
        rule: one of `dualbin.rules`; None is `Counter(8)`.
        scale_lr: 0 freezes the scale and allocates nothing for it.
        pending_rows: P, rows that the window of `every` can hold; None is V, for tables of at most 2**26 weights.

    The arrays are where the rows of the table are, where that is known: outside jit, or with Explicit axes.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the rule cannot train a table of so many planes;
            `pending_rows` is None and the table is too large.
    """
    rows, dim = check_table(table).shape
    rule = resolve(Counter(8) if rule is None else rule, table.planes, table.dim)
    spec = state_layout(rule, rows, dim, train_scale=trains_scale(scale_lr), planes=table.planes)
    device = like_rows(table.bits)
    arrays = {name: jnp.zeros(*spec[name], device=device) for name in STATE_ARRAYS if name in spec}
    window: Window | tuple[()] = ()
    if rule.every > 1:
        slots, zero = _window_size(rows, dim, pending_rows), jnp.zeros((), jnp.int32)
        ids, sums = jnp.full((slots,), rows, row_dtype(rows)), jnp.zeros((slots, dim), jnp.float32)
        window = Window(ids, sums, steps=zero, used=jnp.copy(zero), lost=jnp.copy(zero))  # each its own buffer: a state is donated
    norm, more = Adagrad() if rule.sums_squares else (), ((),) * (table.planes - 1)
    return TableState(jnp.zeros((), jnp.int32), arrays, window, stats=jnp.zeros((8,), jnp.uint32), norm=norm, more_planes=more)


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


def is_state(x: object) -> bool:
    return isinstance(x, TableState)


def check_state(state: object, table: BinaryTable, rule: Rule, scale_lr: Any, name: str = "state") -> TableState:
    """Return `state` if it fits table and rule, else raise TypeError or ValueError."""
    rule = resolve(rule, table.planes, table.dim)
    if not isinstance(state, TableState):
        msg = f"{name} must be a dualbin.jax.TableState (see init_state), got {type(state).__name__}"
        raise TypeError(msg)
    check_state_planes(name, state, table.planes)
    (*stack, rows, dim) = table.shape
    if np.shape(state.step) != tuple(stack):
        msg = f"{name}.step must have shape {stack} for this table, got {list(np.shape(state.step))}"
        raise ValueError(msg)
    if not (hasattr(state.step, "dtype") and jnp.issubdtype(state.step.dtype, jnp.integer)):
        got = getattr(state.step, "dtype", f"a {type(state.step).__name__}")
        msg = f"{name}.step must be an integer array, got {got}"
        raise TypeError(msg)
    layout = state_layout(rule, rows, dim, train_scale=trains_scale(scale_lr), planes=table.planes)
    spec = {field: ((*stack, *shape), dtype) for field, (shape, dtype) in layout.items()}
    lacks_squares = rule.sums_squares and not isinstance(state.norm, Adagrad)
    for field in STATE_ARRAYS:
        value = state.arrays.get(field)
        given = None if value is None else (tuple(value.shape), value.dtype.name)
        if field == "squares" and given is None and lacks_squares:
            continue
        if given != spec.get(field):
            msg = f"{name}.{field} must be {_describe(spec.get(field))} for this table, rule and scale_lr, got {_describe(given)}"
            raise ValueError(msg)
    if lacks_squares:
        msg = f'{name} has no sums of squares, which norm="adagrad" divides by: use Counter(norm="rms") with it, or a fresh state'
        raise ValueError(msg)
    if isinstance(state.norm, Adagrad) and not rule.sums_squares:
        msg = f'{name} has sums of squares for norm="adagrad", which would miss the updates of this rule: go on without them with '
        msg += "dualbin.jax.import_state(tx.init(params), dualbin.jax.export_state(state)), for good"
        raise ValueError(msg)
    columns = state.window.rows.shape[-1] if isinstance(state.window, Window) else None
    if columns != (dim if rule.every > 1 else None):
        have = "no window" if columns is None else f"a window of rows with {columns} columns"
        msg = f"{name} has {have}, which does not fit every={rule.every} and a table of {dim} columns"
        raise ValueError(msg)
    return state


def _describe(spec: tuple[tuple[int, ...], str] | None) -> str:
    return "None" if spec is None else f"{spec[1]} {list(spec[0])}"


# ---- hyper-parameters --------------------------------------------------------------------------------------------------------------------


def check_rate(name: str, value: Any) -> Any:
    """Return `value` if it is a number of at least 0 or a scalar array (which may be traced)."""
    if isinstance(value, numbers.Real):
        return check_float32(name, value)
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.number) or jnp.issubdtype(value.dtype, jnp.complexfloating):
        msg = f"{name} must be a number, got {type(value).__name__}"
        raise TypeError(msg)
    if value.shape != ():
        msg = f"{name} must be a scalar, got shape {list(value.shape)}"
        raise ValueError(msg)
    return value


def check_seed(seed: Any, name: str = "seed") -> Any:
    """Return `seed` if it is an int of 64 bits or an integer scalar array."""
    if not hasattr(seed, "dtype"):
        return check_int(name, seed, low=0, high=2**64 - 1)
    if not jnp.issubdtype(seed.dtype, jnp.integer) or seed.shape != ():
        msg = f"{name} must be an integer, got {seed.dtype.name} of shape {list(seed.shape)}"
        raise TypeError(msg)
    return seed


def trains_scale(scale_lr: Any) -> bool:
    """Whether the scale has moments: always where scale_lr is an array, which may change."""
    rate = check_rate("scale_lr", scale_lr)
    return not isinstance(rate, float) or rate > 0


def make_context(seed: Any, step: Any, learning_rate: Any, scale_lr: Any) -> Array:
    """The step context of a whole table, uint32 `[8]`: the words of seed, step and first row (0), the bits of both rates as float32."""
    rates = [lax.bitcast_convert_type(_as_float32(rate), jnp.uint32) for rate in (learning_rate, scale_lr)]
    zero = jnp.zeros((), jnp.uint32)
    return jnp.stack([*_words(seed), *_words(step), zero, zero, *rates])


def _as_float32(rate: Any) -> Array:
    """A rate as it is read, also an int that would be too large for one of JAX."""
    return jnp.asarray(np.float32(nearest_float32(float(rate))) if isinstance(rate, numbers.Real) else rate).astype(jnp.float32)


def _words(number: Any) -> list[Array]:
    """The low and the high half of a number of 64 bits."""
    if not hasattr(number, "dtype"):
        return [jnp.asarray(np.uint32(number & 0xFFFFFFFF)), jnp.asarray(np.uint32(number >> 32))]
    high = jnp.right_shift(number, 32) if number.dtype.itemsize == 8 else jnp.zeros((), jnp.uint32)
    return [jnp.asarray(number).astype(jnp.uint32), jnp.asarray(high).astype(jnp.uint32)]


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
    window = state.window
    assert isinstance(window, Window)  # check_state saw to it
    slots = window.ids.shape[0]
    known = jnp.where((ids >= 0) & (ids < rows), ids, rows).astype(window.ids.dtype)
    # the old rows come first, so a row in both is old + new
    merged_ids, merged, count = _ops.reduce_rows(jnp.concatenate([window.ids, known]), jnp.concatenate([window.rows, sums]), rows, slots)
    steps = window.steps + has_rows(ids, rows).astype(jnp.int32)
    # above it where a run goes on with a smaller one: a step without a row leaves such a window open, as any
    full = (steps >= every) & (steps > window.steps)
    after = Window(
        ids=jnp.where(full, jnp.asarray(rows, merged_ids.dtype), merged_ids),
        rows=jnp.where(full, jnp.float32(0), merged),
        steps=jnp.where(full, 0, steps),
        used=jnp.where(full, 0, jnp.minimum(count[0], slots)),
        lost=window.lost + jnp.maximum(count[0] - slots, 0),
    )
    # an update without a row changes nothing, so no branch is needed, in which XLA might copy the table
    return state._replace(window=after), jnp.where(full, merged_ids, jnp.asarray(rows, merged_ids.dtype)), merged, full


def finish(state: TableState, arrays: dict[str, Array], stats: Array, done: Array) -> TableState:
    return state._replace(arrays=arrays, step=state.step + done.astype(jnp.int32), stats=stats)
