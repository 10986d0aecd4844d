"""The operations on gradients: `row_sums` at declared places, `segment_sum`, and `reduce_rows`, which finds the rows itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin.jax import _ffi
from dualbin.jax._ops.operation import Axes, Operation, Plan, Spec, native_call, replicate


def row_sums(row_ids: Array, ids: Array, dy: Array, rows: int) -> Array:
    """Sums of the rows of dy `ids.shape + (D,)` at the places of their ids in row_ids: float32 `[U, D]`.

    Ids that are not in row_ids count for the last place, ids outside [0, rows) for none. Where ids are sharded the sums of the devices are
    added.
    """
    if ids.ndim == 0:
        ids, dy = ids[None], dy[None]
    if ids.size == 0:
        return jnp.zeros((row_ids.shape[0], dy.shape[-1]), jnp.float32)
    return RowSums(rows)(row_ids, ids, dy)[0]


def segment_sum(slots: Array, dy: Array, segments: int) -> Array:
    """Sum of the rows of dy `[N, D]` by slot `[N]`: float32 `[segments, D]`. Slots outside [0, segments) are dropped."""
    return SegmentSum(segments)(slots, dy)[0]


def reduce_rows(ids: Array, dy: Array, rows: int, capacity: int) -> list[Array]:
    """Sorted distinct ids and the sums of their rows.

    Args:
        ids: `[N]`; ids outside [0, rows) are dropped.
        dy: `[N, D]`.
        rows: V.
        capacity: C, slots of the result. Slots past the count hold id V and zeros.

    Returns:
        ids `[C]`, float32 `[C, D]`, and the number of distinct rows as int32 `[1]`, also where it exceeds C.
    """
    return ReduceRows(rows, capacity)(replicate(ids), replicate(dy))


def workspace(op: str, count: Any, rows: Any, dim: int) -> jax.ShapeDtypeStruct:
    """The workspace of a native operation on `count` ids, as a result that nobody reads. CPU handlers bring their own.

    Its exact size is that of the device, of which the native library knows. Where `count` or `rows` is a symbol of `jax.export`, or where
    there is no GPU, it is :func:`most_workspace`.
    """
    shape: tuple[Any, ...] = (0,)
    if _ffi.lowers_for("CUDA"):
        native = _ffi.library()
        if isinstance(count, int) and isinstance(rows, int) and native.cuda_device_count() > 0:
            shape = (native.workspace_bytes(op, 0, 0, count, rows, dim),)
        else:
            shape = most_workspace(op, count, dim)
    return jax.ShapeDtypeStruct(shape, jnp.uint8)


def most_workspace(op: str, count: Any, dim: int) -> tuple[Any, int]:
    """The shape of a workspace that is large enough for `count` ids, a number or a symbol, on every GPU and with any number of rows.

    It has as many rows as there are ids and some more, since the bytes as one number could overflow the 32 bits that a program computes
    sizes with. A call that finds it too small after all fails and says so.
    """
    fixed, per_id = _ffi.library().workspace_bound(op, dim)
    return count + -(-fixed // per_id), per_id


@dataclass(frozen=True)
class RowSums(Operation):
    """(row_ids, ids, dy) -> sums."""

    rows: int

    def sharding_rule(self, *operands: Array) -> str:
        names = " ".join(f"i{k}" for k in range(operands[1].ndim))
        return f"u, {names}, {names} d -> u d"

    def plan(self, specs: list[Spec]) -> Plan:
        spec = specs[1]
        axes = tuple(axis for own in spec for axis in own)
        return Plan([((),), spec, (*spec, ())], [((), ())], partial(self.shard, axes=axes))

    def shard(self, row_ids: Array, ids: Array, dy: Array, *, axes: Axes) -> list[Array]:
        """`axes` are those over which ids are sharded."""
        segments = row_ids.shape[0]
        sums = SegmentSum(segments).on_device(self._slots(row_ids, ids.reshape(-1)), dy.reshape(-1, dy.shape[-1]))[0]
        return [lax.psum(sums, axes) if axes else sums]

    def batch(self, size: int, batched: Sequence[bool], operands: Sequence[Array], axes: Axes) -> tuple[list[Array], list[bool]]:  # noqa: ARG002
        row_ids, ids, dy = (
            replicate(x) if b else jnp.broadcast_to(replicate(x), (size, *x.shape)) for x, b in zip(operands, batched, strict=True)
        )
        # one call for the whole batch: each member gets its own range of slots
        slots, segments = jax.vmap(self._slots)(row_ids, ids.reshape(size, -1)), row_ids.shape[1]
        first = jnp.arange(size, dtype=slots.dtype)[:, None] * segments
        shifted = jnp.where(slots < segments, slots + first, size * segments)
        total = segment_sum(shifted.reshape(-1), dy.reshape(-1, dy.shape[-1]), size * segments)
        return [total.reshape(size, segments, dy.shape[-1])], [True]

    def _slots(self, row_ids: Array, ids: Array) -> Array:
        """The place of every id in row_ids: the last one for rows that were not declared, one past it for ids outside [0, rows)."""
        last = row_ids.shape[0] - 1
        inside = (ids >= 0) & (ids < self.rows)
        known = jnp.where(inside, ids, self.rows).astype(row_ids.dtype)
        found = jnp.minimum(_first_place(row_ids, known, self.rows + 1), last)
        return jnp.where(inside, jnp.where(row_ids[found] == known, found, last), last + 1)


def _first_place(ordered: Array, wanted: Array, most: int) -> Array:
    """The first place in `ordered` `[U]` whose value is at least the wanted one, int32; U is at most `most`.

    As `jnp.searchsorted`, which takes no U that is a symbol of `jax.export`, and runs a loop whose every turn is some launches on a GPU.
    """
    most = min(ordered.shape[0], most) if isinstance(ordered.shape[0], int) else min(most, 2**30)
    size = jnp.asarray(ordered.shape[0], jnp.int32)
    place = jnp.zeros_like(wanted, jnp.int32)  # how many values are known to be below the wanted one
    for digit in reversed(range(most.bit_length())):
        further = place + (1 << digit)
        value = ordered.at[further - 1].get(mode="clip")
        place = jnp.where((further <= size) & (value < wanted), further, place)
    return place


@dataclass(frozen=True)
class SegmentSum(Operation):
    """(slots, dy) -> sums."""

    segments: int
    partitioned: ClassVar[bool] = False

    def shard(self, *operands: Array, axes: Axes) -> list[Array]:  # noqa: ARG002  (there are none)
        return self.on_device(*operands)

    def native(self, slots: Array, dy: Array) -> list[Array]:
        result = jax.ShapeDtypeStruct((self.segments, dy.shape[-1]), jnp.float32)
        space = workspace("segment_sum", slots.shape[0], self.segments, dy.shape[-1])
        return native_call("dualbin_segment_sum", [result, space], slots, dy)[:1]

    def fallback(self, slots: Array, dy: Array) -> list[Array]:
        return [add_by_slot(slots, dy, self.segments)]


def add_by_slot(slots: Array, dy: Array, segments: int) -> Array:
    """`segment_sum` in the order that XLA likes."""
    places = jnp.where(slots < 0, segments, slots)  # a negative index would count from the end
    return jnp.zeros((segments, dy.shape[-1]), jnp.float32).at[places].add(dy.astype(jnp.float32), mode="drop")


@dataclass(frozen=True)
class ReduceRows(Operation):
    """(ids, dy) -> ids, sums, count."""

    rows: int
    capacity: int
    partitioned: ClassVar[bool] = False

    def shard(self, *operands: Array, axes: Axes) -> list[Array]:  # noqa: ARG002  (there are none)
        return self.on_device(*operands)

    def native(self, ids: Array, dy: Array) -> list[Array]:
        results = [
            jax.ShapeDtypeStruct((self.capacity,), ids.dtype),
            jax.ShapeDtypeStruct((self.capacity, dy.shape[-1]), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            workspace("reduce_rows", ids.shape[0], self.rows, dy.shape[-1]),
        ]
        return native_call("dualbin_reduce_rows", results, ids, dy, rows=np.int64(self.rows))[:3]

    def fallback(self, ids: Array, dy: Array) -> list[Array]:
        rows, capacity = self.rows, self.capacity
        known = jnp.where((ids >= 0) & (ids < rows), ids, rows)
        ordered = jnp.sort(known)
        first = (ordered < rows) & (jnp.diff(ordered, prepend=-1) != 0)
        places = jnp.where(first, jnp.cumsum(first) - 1, capacity)
        found = jnp.full((capacity,), rows, ids.dtype).at[places].set(ordered, mode="drop")
        slots = jnp.searchsorted(found, known)
        hit = (known < rows) & (found[jnp.minimum(slots, capacity - 1)] == known)
        sums = add_by_slot(jnp.where(hit, slots, capacity), dy, capacity)
        return [found, sums, jnp.sum(first, dtype=jnp.int32)[None]]
