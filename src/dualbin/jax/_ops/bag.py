"""The operation `lookup_bag`: rows of a table, combined bag by bag."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._reference_planes import weights_of
from dualbin._schema import BAG_MODES
from dualbin.jax._ops.bag_gradient import bag_counts, counts_in, divide, one_nan, own_members, owners_of
from dualbin.jax._ops.operation import Axes, Operation, Plan, Spec, native_call
from dualbin.jax._ops.sums import add_by_slot


def lookup_bag(
    bits: Array,
    scale: Array,
    ids: Array,
    offsets: Array,
    weights: Array | None,
    *,
    dim: int,
    mode: str,
    dtype: Any,
    padding_idx: int = -1,
    axes: Axes = (),
) -> Array:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of the table, combined: `dtype` `[G, dim]`. Every device computes all bags.

    Args:
        bits, scale: the table.
        ids: `[N]`; those before the first and after the last offset are not read.
        offsets: `[G + 1]`, ascending within [0, N].
        weights: None, or with mode "sum" float32 `[N]`.
        dim, mode, dtype: D; "sum", "mean" or "majority"; of the result.
        padding_idx: an id that is a padding row whatever its scale; -1 for none.
        axes: as for :class:`Operation`.
    """
    factors = () if weights is None else (weights,)
    return LookupBag(dim, mode, jnp.dtype(dtype), padding_idx)(bits, scale, ids, offsets, *factors, axes=axes)[0]


@dataclass(frozen=True)
class LookupBag(Operation):
    """(bits, scale, ids, offsets[, weights]) -> values."""

    dim: int
    mode: str
    dtype: Any
    padding_idx: int = -1
    #: ids outside [0, V) are padding; else an error on the CPU and NaN on a GPU
    zeros: bool = False

    def native(self, bits: Array, scale: Array, ids: Array, offsets: Array, *weights: Array) -> list[Array]:
        attrs: dict[str, Any] = {"dim": np.int64(self.dim), "mode": np.int32(BAG_MODES.index(self.mode)), "bad_ids": np.int32(self.zeros)}
        attrs |= {"padding_idx": np.int64(self.padding_idx), "given": np.int32(len(weights))}
        result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, self.dim), self.dtype)
        return native_call("dualbin_lookup_bag", [result], bits, scale, ids, offsets, *weights, **attrs)

    def fallback(self, bits: Array, scale: Array, ids: Array, offsets: Array, *weights: Array) -> list[Array]:
        bags = offsets.shape[0] - 1
        owners, inside = owners_of(ids, offsets)
        inside = inside & (ids != self.padding_idx)
        wanted, places = jnp.where(inside, ids, 0), jnp.where(inside, owners, bags)
        counted, bad = counts_in(scale, wanted, -1), (wanted < 0) | (wanted >= bits.shape[0])
        known = jnp.where(bad, 0, wanted)
        magnitude = jnp.ones(wanted.shape, jnp.float32) if self.mode == "majority" else scale[known, 0]
        magnitude = magnitude * weights[0] if weights else magnitude
        values = jnp.where(counted[:, None], magnitude[:, None] * weights_of(bits[known], self.dim, jnp), np.float32(0))
        values = values if self.zeros else jnp.where(bad[:, None], np.float32(np.nan), values)
        total = add_by_slot(places, values, bags)
        if self.mode != "sum":
            total = _combined(self.mode, total, add_by_slot(places, counts_in(scale, ids, self.padding_idx)[:, None], bags))
        return [one_nan(total.astype(self.dtype))]

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
        own = own_members(ids, rows, axes, self.padding_idx)
        local = replace(self, mode="sum", dtype=jnp.dtype(jnp.float32), padding_idx=-1, zeros=True)
        parts = local.on_device(bits, votes, own, offsets, *weights)[0]
        total = lax.psum(parts, axes)
        if self.mode != "sum":
            total = _combined(self.mode, total, bag_counts(scale, ids, offsets, self.padding_idx, axes)[:, None])
        bad = (ids < 0) | (ids >= rows * lax.axis_size(axes))
        return [jnp.where((_per_bag(bad, offsets) > 0)[:, None], jnp.nan, total).astype(self.dtype)]


def _combined(mode: str, total: Array, counts: Array) -> Array:
    """A mean or a majority from the sum of a bag and the number of its rows."""
    if mode == "mean":
        return divide(total, counts)
    votes = jnp.where(counts == 0, 0.0, jnp.where(total >= 0, 1.0, -1.0))
    return jnp.where(jnp.isnan(total), total, votes)


def _per_bag(flags: Array, offsets: Array) -> Array:
    """float32 `[G]`: how many flags of every bag are set."""
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(flags, dtype=jnp.int32)])[offsets]
    return (before[1:] - before[:-1]).astype(jnp.float32)
