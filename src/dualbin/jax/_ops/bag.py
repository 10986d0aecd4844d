"""The operations `lookup_bag`, rows of a table combined, and `count_rows`, how many of them count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._checks import BAG_MODES
from dualbin.jax._ops.lookup import Lookup
from dualbin.jax._ops.operation import Axes, Operation, Plan, Spec, native_call, own_ids
from dualbin.jax._ops.sums import add_by_slot


def lookup_bag(
    bits: Array, scale: Array, ids: Array, offsets: Array, weights: Array | None, *, dim: int, mode: str, dtype: Any, axes: Axes = ()
) -> Array:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of the table, combined: `dtype` `[G, dim]`. Every device computes all bags.

    Args:
        bits, scale: the table.
        ids: `[N]`; those before the first and after the last offset are not read.
        offsets: `[G + 1]`, ascending within [0, N].
        weights: None, or with mode "sum" float32 `[N]`.
        dim, mode, dtype: D; "sum", "mean" or "majority"; of the result.
        axes: as for :class:`Operation`.
    """
    factors = () if weights is None else (weights,)
    return LookupBag(dim, mode, jnp.dtype(dtype))(bits, scale, ids, offsets, *factors, axes=axes)[0]


def count_rows(scale: Array, ids: Array, offsets: Array, axes: Axes = ()) -> Array:
    """float32 `[G]`: rows of every bag that are in the table and are not padding."""
    return CountRows()(scale, ids, offsets, axes=axes)[0]


@dataclass(frozen=True)
class LookupBag(Operation):
    """(bits, scale, ids, offsets[, weights]) -> values."""

    dim: int
    mode: str
    dtype: Any
    #: ids outside [0, V) are padding; else an error on the CPU and NaN on a GPU
    zeros: bool = False

    def native(self, bits: Array, scale: Array, ids: Array, offsets: Array, *weights: Array) -> list[Array]:
        attrs: dict[str, Any] = {"dim": np.int64(self.dim), "mode": np.int32(BAG_MODES.index(self.mode)), "bad_ids": np.int32(self.zeros)}
        result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, self.dim), self.dtype)
        factors = weights[0] if weights else jnp.zeros((0,), jnp.float32)
        return native_call("dualbin_lookup_bag", [result], bits, scale, ids, offsets, factors, **attrs)

    def fallback(self, bits: Array, scale: Array, ids: Array, offsets: Array, *weights: Array) -> list[Array]:
        bags = offsets.shape[0] - 1
        owners = jnp.searchsorted(offsets, jnp.arange(ids.shape[0], dtype=offsets.dtype), side="right") - 1
        inside = (owners >= 0) & (owners < bags)
        wanted, places = jnp.where(inside, ids, 0), jnp.where(inside, owners, bags)
        factor = jnp.where(scale == 0, scale, 1) if self.mode == "majority" else scale
        values = Lookup(self.dim, jnp.dtype(jnp.float32), self.zeros).fallback(bits, factor, wanted)[0]
        values = values * weights[0][:, None] if weights else values
        total = add_by_slot(places, values, bags)
        if self.mode != "sum":
            known = (wanted >= 0) & (wanted < bits.shape[0])
            present = known & (scale[jnp.where(known, wanted, 0), 0] != 0)
            total = _combined(self.mode, total, add_by_slot(places, present[:, None], bags))
        return [total.astype(self.dtype)]

    def sharding_rule(self, *operands: Array) -> str:
        return f"{', '.join(['v b', 'v o', 'n', 'g', 'n'][: len(operands)])} -> h d"

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        everywhere: list[Spec] = [((),)] * (len(specs) - 2)
        return Plan([(axes, ()), (axes, ()), *everywhere], [((), ())], partial(self.shard, axes=axes))

    def shard(self, bits: Array, scale: Array, ids: Array, offsets: Array, *weights: Array, axes: Axes) -> list[Array]:
        if not axes:
            return self.on_device(bits, scale, ids, offsets, *weights)
        rows = bits.shape[0]
        votes = jnp.where(scale == 0, scale, 1) if self.mode == "majority" else scale
        own = own_ids(ids, rows, axes, other=-1)
        parts = replace(self, mode="sum", dtype=jnp.dtype(jnp.float32), zeros=True).on_device(bits, votes, own, offsets, *weights)[0]
        total = lax.psum(parts, axes)
        if self.mode != "sum":
            total = _combined(self.mode, total, count_rows(scale, ids, offsets, axes)[:, None])
        bad = (ids < 0) | (ids >= rows * lax.axis_size(axes))
        return [jnp.where((_per_bag(bad, offsets) > 0)[:, None], jnp.nan, total).astype(self.dtype)]


@dataclass(frozen=True)
class CountRows(Operation):
    """(scale, ids, offsets) -> counts. The native library has no part in it."""

    def sharding_rule(self, *_operands: Array) -> str:
        return "v o, n, g -> h"

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        return Plan([(axes, ()), ((),), ((),)], [((),)], partial(self.shard, axes=axes))

    def shard(self, scale: Array, ids: Array, offsets: Array, *, axes: Axes) -> list[Array]:
        rows = scale.shape[0]
        own = own_ids(ids, rows, axes, other=-1)
        counted = (own >= 0) & (own < rows) & (scale[jnp.clip(own, 0, rows - 1), 0] != 0)
        found = _per_bag(counted, offsets)
        return [lax.psum(found, axes) if axes else found]


def _combined(mode: str, total: Array, counts: Array) -> Array:
    """A mean or a majority from the sum of a bag and the number of its rows."""
    if mode == "mean":
        return total / jnp.maximum(counts, 1)
    votes = jnp.where(counts == 0, 0.0, jnp.where(total >= 0, 1.0, -1.0))
    return jnp.where(jnp.isnan(total), total, votes)


def _per_bag(flags: Array, offsets: Array) -> Array:
    """float32 `[G]`: how many flags of every bag are set."""
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(flags, dtype=jnp.int32)])[offsets]
    return (before[1:] - before[:-1]).astype(jnp.float32)
