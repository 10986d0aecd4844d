"""The gradient of `lookup_bag`: how many rows of a bag count, what every row gets, what every weight gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._reference_planes import weights_of
from dualbin._reference_sums import fold_lanes
from dualbin._schema import BAG_MODES
from dualbin.jax._ops.operation import Axes, Operation, Plan, Spec, native_call, own_ids, replicate


def bag_counts(scale: Array, ids: Array, offsets: Array, padding_idx: int = -1, axes: Axes = ()) -> Array:
    """int32 `[G]`: rows of every bag that are in the table and not padding (`reference.bag_counts`)."""
    return BagCounts(padding_idx)(scale, ids, offsets, axes=axes)[0]


def bag_gradient(
    ids: Array,
    offsets: Array,
    dy: Array,
    *,
    mode: str,
    counts: Array | None = None,
    weights: Array | None = None,
    padding_idx: int = -1,
) -> Array:
    """What every row of every bag gets of dy `[G, D]`: `[N, D]` of the dtype of dy (`reference.bag_gradient`)."""
    more = [replicate(x) for x in (counts, weights) if x is not None]
    return BagGradient(mode, padding_idx)(replicate(ids), replicate(offsets), replicate(dy), *more)[0]


def bag_weight_gradient(
    bits: Array, scale: Array, ids: Array, offsets: Array, dy: Array, *, padding_idx: int = -1, axes: Axes = ()
) -> Array:
    """What every weight gets of dy `[G, D]`: float32 `[N]` (`reference.bag_weight_gradient`)."""
    return BagWeightGradient(padding_idx)(bits, scale, ids, offsets, dy, axes=axes)[0]


@dataclass(frozen=True)
class BagCounts(Operation):
    """(scale, ids, offsets) -> counts."""

    padding_idx: int

    def native(self, scale: Array, ids: Array, offsets: Array) -> list[Array]:
        result = jax.ShapeDtypeStruct((offsets.shape[0] - 1,), jnp.int32)
        return native_call("dualbin_bag_counts", [result], scale, ids, offsets, padding_idx=np.int64(self.padding_idx))

    def fallback(self, scale: Array, ids: Array, offsets: Array) -> list[Array]:
        counted = jnp.cumsum(counts_in(scale, ids, self.padding_idx), dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros((1,), jnp.int32), counted])[offsets]
        return [before[1:] - before[:-1]]

    def sharding_rule(self, *_operands: Array) -> str:
        return "v o, n, g -> h"

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        return Plan([(axes, ()), ((),), ((),)], [((),)], partial(self.shard, axes=axes))

    def shard(self, scale: Array, ids: Array, offsets: Array, *, axes: Axes) -> list[Array]:
        if not axes:
            return self.on_device(scale, ids, offsets)
        counts = BagCounts(-1).on_device(scale, own_members(ids, scale.shape[0], axes, self.padding_idx), offsets)
        return [lax.psum(counts[0], axes)]


@dataclass(frozen=True)
class BagGradient(Operation):
    """(ids, offsets, dy[, counts or weights]) -> rows."""

    mode: str
    padding_idx: int

    partitioned = False

    def native(self, ids: Array, offsets: Array, dy: Array, *more: Array) -> list[Array]:
        result = jax.ShapeDtypeStruct((ids.shape[0], dy.shape[1]), dy.dtype)
        attrs: dict[str, Any] = {"mode": np.int32(BAG_MODES.index(self.mode)), "padding_idx": np.int64(self.padding_idx)}
        attrs["given"] = np.int32(len(more) << (self.mode != "mean"))  # of counts and weights
        return native_call("dualbin_bag_gradient", [result], ids, offsets, dy, *more, **attrs)

    def fallback(self, ids: Array, offsets: Array, dy: Array, *more: Array) -> list[Array]:
        owners, inside = owners_of(ids, offsets)
        rows = dy[owners].astype(jnp.float32)
        if self.mode == "mean":
            rows = divide(rows, more[0][owners][:, None])
        elif more:
            rows = rows * more[0][:, None]
        info = jnp.finfo(dy.dtype)  # without this, XLA may widen a value that it has just narrowed by leaving out both
        rows = lax.reduce_precision(one_nan(rows), info.nexp, info.nmant)
        return [jnp.where((inside & (ids != self.padding_idx))[:, None], rows, 0).astype(dy.dtype)]

    def shard(self, *operands: Array, axes: Axes) -> list[Array]:  # noqa: ARG002
        return self.on_device(*operands)


@dataclass(frozen=True)
class BagWeightGradient(Operation):
    """(bits, scale, ids, offsets, dy) -> the gradient of the weights."""

    padding_idx: int

    def native(self, *operands: Array) -> list[Array]:
        result = jax.ShapeDtypeStruct(operands[2].shape, jnp.float32)
        return native_call("dualbin_bag_weight_gradient", [result], *operands, padding_idx=np.int64(self.padding_idx))

    def fallback(self, bits: Array, scale: Array, ids: Array, offsets: Array, dy: Array) -> list[Array]:
        owners, inside = owners_of(ids, offsets)
        counted = inside & counts_in(scale, ids, self.padding_idx)
        known = jnp.where(counted, ids, 0)
        signs = weights_of(bits[known], dy.shape[1], jnp)
        with jax.enable_x64(True):
            total = sum_of_lanes(dy[owners].astype(jnp.float64) * signs.astype(jnp.float64))
            slopes = (scale[known, 0].astype(jnp.float64) * total).astype(jnp.float32)
        return [jnp.where(counted & (slopes != 0), one_nan(slopes), 0)]

    def sharding_rule(self, *_operands: Array) -> str:
        return "v b, v o, n, g, h d -> n"

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        return Plan([(axes, ()), (axes, ()), ((),), ((),), ((), ())], [((),)], partial(self.shard, axes=axes))

    def shard(self, bits: Array, scale: Array, ids: Array, offsets: Array, dy: Array, *, axes: Axes) -> list[Array]:
        if not axes:
            return self.on_device(bits, scale, ids, offsets, dy)
        own = own_members(ids, scale.shape[0], axes, self.padding_idx)
        slopes = BagWeightGradient(-1).on_device(bits, scale, own, offsets, dy)
        return [lax.psum(slopes[0], axes)]  # one device has the row, the others +0.0: the sum is exact


def own_members(ids: Array, rows: int, axes: Axes, padding_idx: int) -> Array:
    """Ids of the whole table as ids of this device's shard; -1 for rows of other shards and for `padding_idx`."""
    own = own_ids(ids, rows, axes, other=-1)
    return jnp.where(ids == padding_idx, jnp.asarray(-1, ids.dtype), own)


def counts_in(scale: Array, ids: Array, padding_idx: int) -> Array:
    """bool `[N]`: the id is a row of the table, and not a padding row."""
    inside = (ids >= 0) & (ids < scale.shape[0]) & (ids != padding_idx)
    return inside & (scale[jnp.where(inside, ids, 0), 0] != 0)


def owners_of(ids: Array, offsets: Array) -> tuple[Array, Array]:
    """The bag of every position, 0 where it is in none, and whether it is in one."""
    owners = jnp.searchsorted(offsets, jnp.arange(ids.shape[0], dtype=offsets.dtype), side="right") - 1
    inside = (owners >= 0) & (owners < offsets.shape[0] - 1)
    return jnp.where(inside, owners, 0), inside


def divide(values: Array, counts: Array) -> Array:
    """values `[N, D]` by `max(counts, 1)` `[N, 1]`. Unless a barrier hides that a row has one divisor, XLA multiplies by its inverse."""
    divisors = jnp.broadcast_to(jnp.maximum(counts, 1).astype(jnp.float32), values.shape)
    return values / lax.optimization_barrier(divisors)


def one_nan(x: Array) -> Array:
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), x)


def sum_of_lanes(values: Array) -> Array:
    """That of the reference, by a scan: a program for a row of many columns stays short."""
    chunks = -(-values.shape[1] // 32)
    padded = jnp.pad(values, ((0, 0), (0, 32 * chunks - values.shape[1]))).reshape(values.shape[0], chunks, 32)
    lanes, _ = lax.scan(lambda lanes, chunk: (lanes + chunk, None), jnp.zeros_like(padded[:, 0]), padded.swapaxes(0, 1))
    return fold_lanes(lanes)
