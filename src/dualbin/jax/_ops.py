"""The operations on tables, as the rest of the package calls them: they work under every transformation and on sharded arrays.

Each is a function of one device, native or in jax.numpy, with a rule for `vmap` around it and a plan for sharded operands between the two.
A table may be sharded by rows. Its shards keep their rows: ids travel to them, looked-up values and sums come back.

`axes` is for the inside of a `shard_map`: the mesh axes over which the table's rows are sharded there. Ids are those of the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap, sequential_vmap

from dualbin.jax import _ffi, _pure
from dualbin.jax._spread import Axes, Plan, Spec, add_and_scatter, add_stats, gather, own_context, own_ids, replicate, spread
from dualbin.rules import Rule

State = Mapping[str, Array | None]
_STATE_TYPES = {"counter": np.uint8, "ema": np.float32, "count": np.int32, "scale_m": np.float32, "scale_v": np.float32}

#: jit that leaves no trace inside another one; outside of any it compiles an operation once for each shape and sharding
_compiled = partial(partial, jax.jit, inline=True)


def _device() -> Any:
    """The functions of one device: those of the native library where it serves the platform, else those in jax.numpy."""
    return _ffi if _ffi.is_native() else _pure


# ---- lookup ------------------------------------------------------------------------------------------------------------------------------


@_compiled(static_argnames=("dim", "dtype", "axes"))
def lookup(bits: Array, scale: Array, ids: Array, dim: int, dtype: Any, axes: Axes = ()) -> Array:
    """Rows `ids` of the table: `dtype` `ids.shape + (dim,)`.

    An id outside [0, V) is a runtime error on the CPU; on a GPU, and where the rows are sharded, its row is NaN.
    """
    if ids.ndim == 0:
        return lookup(bits, scale, ids[None], dim, dtype, axes)[0]
    if ids.size == 0:
        return jnp.zeros((*ids.shape, dim), dtype)

    @custom_vmap
    def call(bits: Array, scale: Array, ids: Array) -> Array:
        if axes:
            split = axes
            if _ffi.varying(bits):  # types tell; without them ids may differ from device to device
                split = tuple(axis for axis in axes if axis in _ffi.varying(ids))
            flat = _lookup_shard(bits, scale, ids.reshape(-1), dim=dim, dtype=dtype, axes=axes, spec=(split,))[0]
            return flat.reshape(*ids.shape, dim)
        whole = partial(_lookup_shard, dim=dim, dtype=dtype, axes=(), spec=((),) * ids.ndim)
        names = _names("i", ids.ndim)
        return spread(whole, partial(_plan_lookup, dim, dtype), f"v b, v o, {names} -> {names} d", (bits, scale, ids))[0]

    @call.def_vmap
    def rule(axis_size: int, batched: list[bool], bits: Array, scale: Array, ids: Array) -> tuple[Array, bool]:
        if not (batched[0] or batched[1]):
            return lookup(bits, scale, ids, dim, dtype, axes), batched[2]
        operands = (bits, scale, ids)
        return _map_batched(lambda b, s, i: lookup(b, s, i, dim, dtype, axes), batched, operands, axis_size), True

    return call(bits, scale, ids)


def _plan_lookup(dim: int, dtype: Any, specs: list[Spec]) -> Plan:
    axes, spec = specs[0][0], specs[2]
    table = (axes, ())
    return Plan([table, table, spec], [(*spec, ())], partial(_lookup_shard, dim=dim, dtype=dtype, axes=axes, spec=spec))


def _lookup_shard(bits: Array, scale: Array, ids: Array, *, dim: int, dtype: Any, axes: Axes, spec: Spec) -> list[Array]:
    if not axes:
        return [_device().lookup(bits, scale, ids, dim=dim, dtype=dtype)]
    rows = bits.shape[0]
    wanted = own_ids(gather(ids, spec, axes), rows, axes, other=-1)
    found = _device().lookup(bits, scale, wanted, dim=dim, dtype=dtype, zeros=True)
    found = add_and_scatter(found, (*spec, ()), axes)  # one device has the row, the others zeros: the sum is exact
    inside = (ids >= 0) & (ids < rows * lax.axis_size(axes))
    return [jnp.where(inside[..., None], found, jnp.array(jnp.nan, dtype))]


def _map_batched(function: Callable[..., Array], batched: Sequence[bool], operands: Sequence[Array], size: int) -> Array:
    """`function` over the batch one after the other; operands without a batch axis are passed as they are."""

    def one(index: Array) -> Array:
        picked = [lax.dynamic_index_in_dim(x, index, keepdims=False) if b else x for x, b in zip(operands, batched, strict=True)]
        return function(*picked)

    return lax.map(one, jnp.arange(size))


def _names(letter: str, count: int) -> str:
    return " ".join(f"{letter}{k}" for k in range(count))


# ---- bags --------------------------------------------------------------------------------------------------------------------------------


@_compiled(static_argnames=("dim", "mode", "dtype", "axes"))
def lookup_bag(
    bits: Array, scale: Array, ids: Array, offsets: Array, weights: Array | None, *, dim: int, mode: str, dtype: Any, axes: Axes = ()
) -> Array:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of the table, combined: `dtype` `[G, dim]`. Every device computes all bags."""
    options: dict[str, Any] = {"dim": dim, "mode": mode, "dtype": dtype}
    factors = jnp.zeros((0,), jnp.float32) if weights is None else weights

    @sequential_vmap
    def call(*operands: Array) -> Array:
        if axes:
            return _bag_shard(*operands, axes=axes, **options)[0]
        rule = f"v b, v o, n, g, {'n' if factors.size else 'z'} -> h d"
        return spread(partial(_bag_shard, axes=(), **options), partial(_plan_bag, options), rule, operands)[0]

    return call(bits, scale, ids, offsets, factors)


def _plan_bag(options: dict[str, Any], specs: list[Spec]) -> Plan:
    axes = specs[0][0]
    return Plan([(axes, ()), (axes, ()), ((),), ((),), ((),)], [((), ())], partial(_bag_shard, axes=axes, **options))


def _bag_shard(
    bits: Array, scale: Array, ids: Array, offsets: Array, factors: Array, *, dim: int, mode: str, dtype: Any, axes: Axes
) -> list[Array]:
    weights = factors if factors.size else None
    if not axes:
        return [_device().lookup_bag(bits, scale, ids, offsets, weights, dim=dim, mode=mode, dtype=dtype)]
    rows = bits.shape[0]
    votes = jnp.where(scale == 0, scale, 1) if mode == "majority" else scale
    own = own_ids(ids, rows, axes, other=-1)
    parts = _device().lookup_bag(bits, votes, own, offsets, weights, dim=dim, mode="sum", dtype=jnp.float32, zeros=True)
    total = lax.psum(parts, axes)
    if mode != "sum":
        counts = count_rows(scale, ids, offsets, axes)[:, None]
        total = total / jnp.maximum(counts, 1) if mode == "mean" else jnp.where(counts == 0, 0, jnp.where(total >= 0, 1, -1))
    bad = (ids < 0) | (ids >= rows * lax.axis_size(axes))
    return [jnp.where((_per_bag(bad, offsets) > 0)[:, None], jnp.nan, total).astype(dtype)]


def count_rows(scale: Array, ids: Array, offsets: Array, axes: Axes = ()) -> Array:
    """float32 `[G]`: rows of every bag that are in the table and are not padding."""

    def local(scale: Array, ids: Array, offsets: Array, axes: Axes) -> list[Array]:
        rows = scale.shape[0]
        own = own_ids(ids, rows, axes, other=-1)
        counted = (own >= 0) & (own < rows) & (scale[jnp.clip(own, 0, rows - 1), 0] != 0)
        found = _per_bag(counted, offsets)
        return [lax.psum(found, axes) if axes else found]

    if axes:
        return local(scale, ids, offsets, axes)[0]

    def plan(specs: list[Spec]) -> Plan:
        return Plan([(specs[0][0], ()), ((),), ((),)], [((),)], partial(local, axes=specs[0][0]))

    call = sequential_vmap(lambda *operands: spread(partial(local, axes=()), plan, "v o, n, g -> h", operands)[0])
    return call(scale, ids, offsets)


def _per_bag(flags: Array, offsets: Array) -> Array:
    """float32 `[G]`: how many flags of every bag are set."""
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(flags, dtype=jnp.int32)])[offsets]
    return (before[1:] - before[:-1]).astype(jnp.float32)


# ---- row sums ----------------------------------------------------------------------------------------------------------------------------


@_compiled(static_argnames=("rows",))
def row_sums(row_ids: Array, ids: Array, dy: Array, rows: int) -> Array:
    """Sums of the rows of dy `ids.shape + (D,)` at the places of their ids in row_ids: float32 `[U, D]`.

    Ids that are not in row_ids count for the last place, ids outside [0, rows) for none. Where ids are sharded the sums of the devices are
    added.
    """
    if ids.ndim == 0:
        ids, dy = ids[None], dy[None]
    if ids.size == 0:
        return jnp.zeros((row_ids.shape[0], dy.shape[-1]), jnp.float32)

    @custom_vmap
    def call(row_ids: Array, ids: Array, dy: Array) -> Array:
        names = _names("i", ids.ndim)
        whole = partial(_row_sums_shard, rows=rows, axes=())
        return spread(whole, partial(_plan_row_sums, rows), f"u, {names}, {names} d -> u d", (row_ids, ids, dy))[0]

    @call.def_vmap
    def rule(axis_size: int, batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        row_ids, ids, dy = (
            replicate(x) if b else jnp.broadcast_to(replicate(x), (axis_size, *x.shape)) for x, b in zip(operands, batched, strict=True)
        )
        # one call for the whole batch: each member gets its own range of slots
        slots, segments = jax.vmap(partial(find_slots, rows=rows))(row_ids, ids.reshape(axis_size, -1)), row_ids.shape[1]
        first = jnp.arange(axis_size, dtype=slots.dtype)[:, None] * segments
        shifted = jnp.where(slots < segments, slots + first, axis_size * segments)
        total = segment_sum(shifted.reshape(-1), dy.reshape(-1, dy.shape[-1]), axis_size * segments)
        return total.reshape(axis_size, segments, dy.shape[-1]), True

    return call(row_ids, ids, dy)


def _plan_row_sums(rows: int, specs: list[Spec]) -> Plan:
    spec = specs[1]
    axes = tuple(axis for own in spec for axis in own)
    return Plan([((),), spec, (*spec, ())], [((), ())], partial(_row_sums_shard, rows=rows, axes=axes))


def _row_sums_shard(row_ids: Array, ids: Array, dy: Array, *, rows: int, axes: Axes) -> list[Array]:
    slots = find_slots(row_ids, ids.reshape(-1), rows=rows)
    sums = _device().segment_sum(slots, dy.reshape(-1, dy.shape[-1]), row_ids.shape[0])
    return [lax.psum(sums, axes) if axes else sums]


def find_slots(row_ids: Array, ids: Array, *, rows: int) -> Array:
    """The place of every id in row_ids: the last one for rows that were not declared, one past it for ids outside [0, rows)."""
    last = row_ids.shape[0] - 1
    inside = (ids >= 0) & (ids < rows)
    known = jnp.where(inside, ids, rows).astype(row_ids.dtype)
    found = jnp.minimum(jnp.searchsorted(row_ids, known).astype(jnp.int32), last)
    return jnp.where(inside, jnp.where(row_ids[found] == known, found, last), last + 1)


def segment_sum(slots: Array, dy: Array, segments: int) -> Array:
    """Sum of the rows of dy `[N, D]` by slot `[N]`: float32 `[segments, D]`. Slots outside [0, segments) are dropped."""
    return sequential_vmap(lambda slots, dy: _device().segment_sum(slots, dy, segments))(slots, dy)


@_compiled(static_argnames=("rows", "capacity"))
def reduce_rows(ids: Array, dy: Array, rows: int, capacity: int) -> tuple[Array, Array, Array]:
    """Sorted distinct ids and the sums of their rows.

    Args:
        ids: `[N]`; ids outside [0, rows) are dropped.
        dy: `[N, D]`.
        rows: V.
        capacity: C, slots of the result. Slots past the count hold id V and zeros.

    Returns:
        ids `[C]`, float32 `[C, D]`, and the number of distinct rows as int32 `[1]`, also where it exceeds C.
    """
    call = sequential_vmap(lambda ids, dy: list(_device().reduce_rows(ids, dy, rows, capacity)))
    out_ids, out_rows, count = call(replicate(ids), replicate(dy))
    return out_ids, out_rows, count


# ---- update ------------------------------------------------------------------------------------------------------------------------------


def update(
    bits: Array, scale: Array, state: State, context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule, axes: Axes = ()
) -> tuple[Any, ...]:
    """The fused update.

    Returns:
        bits, scale, the state arrays by name (None where absent) and stats uint32 `[8]`; all but stats reuse the operands' memory.
    """
    return _update(bits, scale, state, context, ids, dy, dim=dim, rule=rule, axes=axes, masks=False)


def masks(
    bits: Array, scale: Array, state: State, context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule, axes: Axes = ()
) -> tuple[Any, ...]:
    """The update without its effect on the table.

    Returns:
        mask uint8 `[N, B]` (zero except at a row's first occurrence), new scale float32 `[N, 1]`, the state arrays by name (None where
        absent; they reuse the operands' memory) and stats uint32 `[8]`.
    """
    return _update(bits, scale, state, context, ids, dy, dim=dim, rule=rule, axes=axes, masks=True)


@_compiled(static_argnames=("dim", "rule", "axes", "masks"))
def _update(
    bits: Array, scale: Array, state: State, context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule, axes: Axes, masks: bool
) -> tuple[Any, ...]:
    # without the absent ones: jaxlib 0.11 crashes where it compiles arrays of size 0 that enter or leave a shard_map, here and above
    present = {name: x for name in _STATE_TYPES if (x := state[name]) is not None}
    options: dict[str, Any] = {"present": tuple(present), "dim": dim, "rule": rule, "masks": masks}

    @sequential_vmap
    def call(*operands: Array) -> list[Array]:
        if axes:
            return _update_shard(*operands, axes=axes, **options)
        shards = [f"v c{k}" if x.ndim == 2 else "v" for k, x in enumerate(present.values())]
        results = ["n m", "n p"] if masks else ["v b", "v o"]
        spreading = f"{', '.join(['v b', 'v o', *shards, 'k', 'n', 'n d'])} -> {', '.join([*results, *shards, 's'])}"
        return spread(partial(_update_shard, axes=(), **options), partial(_plan_update, options), spreading, operands)

    first, second, *rest, stats = call(bits, scale, *present.values(), context, ids, dy)
    return first, second, dict.fromkeys(_STATE_TYPES) | dict(zip(present, rest, strict=True)), stats


def _plan_update(options: dict[str, Any], specs: list[Spec]) -> Plan:
    axes = specs[0][0]
    table: list[Spec] = [(axes, ()), (axes, ())]
    state: list[Spec] = [(axes, *[()] * (len(spec) - 1)) for spec in specs[2:-3]]
    gradient: list[Spec] = [((),), ((),), ((), ())]  # context, ids, dy: every device needs all of them
    first: list[Spec] = [((), ()), ((), ())] if options["masks"] else table
    return Plan([*table, *state, *gradient], [*first, *state, ((),)], partial(_update_shard, axes=axes, **options))


def _update_shard(
    bits: Array, scale: Array, *rest: Array, present: tuple[str, ...], dim: int, rule: Rule, masks: bool, axes: Axes
) -> list[Array]:
    *given, context, ids, dy = rest
    arrays = {name: jnp.zeros((0,), kind) for name, kind in _STATE_TYPES.items()} | dict(zip(present, given, strict=True))
    rows = bits.shape[0]
    own = own_ids(ids, rows, axes, other=rows)
    run = _device().masks if masks else _device().update
    first, second, *all_arrays, stats = run(bits, scale, *arrays.values(), own_context(context, rows, axes), own, dy, dim=dim, rule=rule)
    state = [x for name, x in zip(arrays, all_arrays, strict=True) if name in present]
    if masks and axes:
        second = jnp.where((own >= 0)[:, None] & (own < rows)[:, None], second, 0)
        first, second = lax.psum((first, second), axes)  # one device has the row, the others zeros
    return [first, second, *state, add_stats(stats, axes)]


# ---- applying an update ------------------------------------------------------------------------------------------------------------------


def xor_rows(bits: Array, ids: Array, mask: Array, axes: Axes = ()) -> Array:
    """`bits[ids[n]] ^= mask[n]`, in place where XLA may reuse bits. Ids are distinct; those outside [0, V) are skipped."""
    return _change_rows(bits, ids, mask, axes=axes, flip=True)


def set_rows(scale: Array, ids: Array, values: Array, axes: Axes = ()) -> Array:
    """`scale[ids[n]] = values[n]`, likewise."""
    return _change_rows(scale, ids, values, axes=axes, flip=False)


@_compiled(static_argnames=("axes", "flip"))
def _change_rows(array: Array, ids: Array, values: Array, *, axes: Axes, flip: bool) -> Array:
    if ids.size == 0:
        return array

    @sequential_vmap
    def call(*operands: Array) -> Array:
        if axes:
            return _change_shard(*operands, axes=axes, flip=flip)[0]
        return spread(partial(_change_shard, axes=(), flip=flip), partial(_plan_change, flip), "v b, n, n b -> v b", operands)[0]

    return call(array, ids, values)


def _plan_change(flip: bool, specs: list[Spec]) -> Plan:
    axes = specs[0][0]
    return Plan([(axes, ()), ((),), ((), ())], [(axes, ())], partial(_change_shard, axes=axes, flip=flip))


def _change_shard(array: Array, ids: Array, values: Array, *, axes: Axes, flip: bool) -> list[Array]:
    rows = array.shape[0]
    own = own_ids(ids, rows, axes, other=rows)
    if flip:
        return [_device().xor_rows(array, own, values)]
    places = jnp.where(own < 0, rows, own)  # a negative index would count from the end
    return [array.at[places].set(values, mode="drop")]
