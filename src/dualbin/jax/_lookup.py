"""`lookup` and the row carrier: how a packed table gets a gradient.

The cotangent of an integer array carries nothing in JAX, and a dense float one of V x D is what this library avoids. So the rows of a step
are declared first (`activate`): their table holds a float32 `[U, D]` array, the tap, which no one reads but whose cotangent is the row
gradient. JAX adds the cotangents of several lookups and carries them through scan, checkpoint, vmap, cond and jit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.extend.core import take_current_trace

from dualbin._checks import check_int
from dualbin.jax import _ffi, _ops
from dualbin.jax._ids import row_dtype, to_declared_ids, to_ids
from dualbin.jax._spread import replicate
from dualbin.jax._table import BinaryTable, all_rows, check_dtype, check_table, make_table, shard_axes


def lookup(table: BinaryTable, ids: Any, dtype: Any = jnp.float32) -> Array:
    """Look rows up.

    Inside a loss, take the gradient with :func:`dualbin.jax.value_and_grad`; in a table that is not active the rows are constants.

    Args:
        table: the table, V rows of D weights.
        ids: int32 or int64, any shape, values in [0, V).
        dtype: float32, float16 or bfloat16; the float32 scale is rounded to it.

    Returns:
        `ids.shape + (D,)` of `dtype`; zeros for padding rows. On a GPU the row of an id outside [0, V) is NaN.

    Raises:
        TypeError, ValueError: wrong dtype of ids or values, or a malformed table.
        ValueError: under a `vmap` over the Explicit mesh axis that shards the rows.
        IndexError: an id outside [0, V), where ids are concrete and in host memory. Under jit on the CPU the compiled call fails with
            `jax.errors.JaxRuntimeError`, which names the id.
    """
    check_table(table)
    kind = check_dtype(dtype)
    rows, axes = all_rows(table), shard_axes(table.axis)
    array = to_ids(ids, rows)
    _check_vmap(table)
    if table.recorder is not None:
        table.recorder(array)
    if table.tap is None:
        return _ops.lookup(table.bits, lax.stop_gradient(table.scale), array, table.dim, kind, axes)
    if table.row_ids is None:
        return _fold_vmap(
            partial(_lookup_marked, dim=table.dim, dtype=kind, rows=rows, axes=axes), (table.tap, table.bits, table.scale), array
        )
    operands = (table.tap, table.bits, table.scale, table.row_ids)
    return _fold_vmap(partial(_lookup_active, dim=table.dim, dtype=kind, rows=rows, axes=axes), operands, array)


def activate(table: BinaryTable, ids: Any, *, capacity: int | None = None) -> BinaryTable:
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
    rows = all_rows(table)
    parts = [replicate(to_declared_ids(part, rows)) for part in jax.tree.leaves(ids, is_leaf=_is_number_list)]
    size = sum(part.size for part in parts)
    slots = min(size, rows) if capacity is None else min(size, rows, check_int("capacity", capacity, low=1))
    flat = jnp.concatenate([jnp.zeros((0,), row_dtype(rows)), *parts])
    row_ids = _distinct(flat, slots=slots, rows=rows)
    tap = jnp.zeros((row_ids.shape[0], table.dim), jnp.float32)
    return make_table(table.bits, table.scale, row_ids, tap, dim=table.dim, axis=table.axis)


@partial(jax.jit, static_argnames=("slots", "rows"))
def _distinct(ids: Array, *, slots: int, rows: int) -> Array:
    """The lowest `slots` distinct ids below `rows`, ascending, then `rows` up to `slots + 1` entries."""
    ordered = jnp.sort(ids)
    first = (ordered < rows) & (jnp.diff(ordered, prepend=-1) != 0)
    order = jnp.cumsum(first) - 1
    places = jnp.where(first & (order < slots), order, slots + 1)
    return jnp.full((slots + 1,), rows, ids.dtype).at[places].set(ordered, mode="drop")


def mark(table: BinaryTable, marks: Array) -> BinaryTable:
    """The table with float32 `[V]` marks: the gradient with respect to them is above 0 at the rows that a loss uses."""
    return make_table(table.bits, table.scale, None, marks, dim=table.dim, axis=table.axis)


def _is_number_list(x: object) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(item, int) for item in x)


# ---- gradients of an active table --------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _active(
    _tap: Array, bits: Array, scale: Array, _row_ids: Array, ids: Array, dim: int, dtype: Any, _rows: int, axes: tuple[str, ...]
) -> Array:
    return _ops.lookup(bits, scale, ids, dim, dtype, axes)


def _active_fwd(
    tap: Array, bits: Array, scale: Array, row_ids: Array, ids: Array, dim: int, dtype: Any, _rows: int, axes: tuple[str, ...]
) -> tuple[Array, Any]:
    # no bytes of the tap are kept, only its type: where it varies
    return _ops.lookup(bits, scale, ids, dim, dtype, axes), (tap[:0], row_ids, ids)


def _active_bwd(_dim: int, _dtype: Any, rows: int, _axes: tuple[str, ...], residuals: Any, dy: Array) -> tuple[Array | None, ...]:
    tap, row_ids, ids = residuals
    return sum_over_devices(_ops.row_sums(row_ids, ids, dy, rows), tap), None, None, None, None


_active.defvjp(_active_fwd, _active_bwd)


def sum_over_devices(sums: Array, tap: Array) -> Array:
    """Inside `shard_map`, add the sums of the devices that share a tap."""
    shared = tuple(_ffi.varying(sums) - _ffi.varying(tap))
    return lax.psum(sums, shared) if shared else sums


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _marked(_marks: Array, bits: Array, scale: Array, ids: Array, dim: int, dtype: Any, _rows: int, axes: tuple[str, ...]) -> Array:
    return _ops.lookup(bits, scale, ids, dim, dtype, axes)


def _marked_fwd(
    marks: Array, bits: Array, scale: Array, ids: Array, dim: int, dtype: Any, _rows: int, axes: tuple[str, ...]
) -> tuple[Array, Any]:
    return _ops.lookup(bits, scale, ids, dim, dtype, axes), (marks[:0], ids)


def _marked_bwd(_dim: int, _dtype: Any, rows: int, _axes: tuple[str, ...], residuals: Any, _dy: Array) -> tuple[Array | None, ...]:
    marks, ids = residuals
    flat = replicate(ids).reshape(-1)
    places = jnp.where(flat < 0, rows, flat)  # a negative index would count from the end
    used = jnp.zeros((rows,), jnp.float32).at[places].set(1.0, mode="drop")
    return sum_over_devices(used, marks), None, None, None


_marked.defvjp(_marked_fwd, _marked_bwd)


def _lookup_active(operands: tuple[Array, ...], ids: Array, **static: Any) -> Array:
    return _active(*operands, ids, *static.values())


def _lookup_marked(operands: tuple[Array, ...], ids: Array, **static: Any) -> Array:
    return _marked(*operands, ids, *static.values())


# ---- vmap --------------------------------------------------------------------------------------------------------------------------------


def _check_vmap(table: BinaryTable) -> None:
    """Raise if this is a `vmap` over the Explicit mesh axis that shards the table's rows: JAX lets no member use that axis."""
    with take_current_trace() as trace:
        mapped = getattr(getattr(trace, "axis_data", None), "explicit_mesh_axis", None)
    spec = jax.typeof(table.bits).sharding.spec
    over, of_rows = ((x,) if isinstance(x, str) else tuple(x or ()) for x in (mapped, spec[0] if spec else None))
    if set(over) & set(of_rows):
        msg = (
            f"the rows of this table are sharded over the Explicit mesh axis {', '.join(of_rows)}, over which this vmap maps: "
            "look all ids up before the vmap (ids may have any shape), or shard the batch over another axis"
        )
        raise ValueError(msg)


def _fold_vmap(function: Any, operands: tuple[Array, ...], ids: Array) -> Array:
    """`function(operands, ids)`; directly under `vmap` over ids alone, one call with the batch axis as a part of ids.

    Without this, the batched gradient would be `[batch, U, D]` before JAX adds it up. `custom_vmap` cannot be differentiated in reverse,
    so it may only be used where vmap is the innermost transformation, which removes it at once. Inside a jit, scan or checkpoint that is
    itself under vmap the result is the same and the memory is larger.
    """
    with take_current_trace() as trace:
        under_vmap = type(trace).__name__ == "BatchTrace"
    if not under_vmap:
        return function(operands, ids)

    @custom_vmap
    def call(operands: tuple[Array, ...], ids: Array) -> Array:
        return function(operands, ids)

    @call.def_vmap
    def rule(_axis_size: int, batched: Any, operands: tuple[Array, ...], ids: Array) -> tuple[Array, bool]:
        if any(batched[0]):
            axes = tuple(0 if b else None for b in batched[0])
            return jax.vmap(function, in_axes=(axes, 0 if batched[1] else None))(operands, ids), True
        return _fold_vmap(function, operands, ids), bool(batched[1])

    return call(operands, ids)
