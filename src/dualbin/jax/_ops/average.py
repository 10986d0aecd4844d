"""The operation `average`: the average of two tables, in expectation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._reference_average import AVERAGE_WORD, average_rows
from dualbin.jax._ops.arithmetic import context_keys, wide
from dualbin.jax._ops.operation import Axes, Operation, Plan, Spec, native_call
from dualbin.jax._ops.update import own_context


def average(
    bits_a: Array, scale_a: Array, bits_b: Array, scale_b: Array, context: Array, *, dim: int, axes: Axes = ()
) -> tuple[Array, Array]:
    """bits uint8 `[V, planes * B]` and scale float32 `[V, 1]` of `(1 - weight) * a + weight * b` (`reference.average`).

    Args:
        bits_a, scale_a, bits_b, scale_b: two tables of one shape and number of planes.
        context: uint32 `[8]`, a step context: seed, step, first_row, and the weight of b where an update has lr.
        dim: D.
        axes: as for :class:`Operation`.
    """
    bits, scale = Average(dim)(bits_a, scale_a, bits_b, scale_b, context, axes=axes)
    return bits, scale


@dataclass(frozen=True)
class Average(Operation):
    """(bits_a, scale_a, bits_b, scale_b, context) -> (bits, scale)."""

    dim: int

    def native(self, *operands: Array) -> list[Array]:
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:2]]
        return native_call("dualbin_average", results, *operands, dim=np.int64(self.dim))

    def fallback(self, bits_a: Array, scale_a: Array, bits_b: Array, scale_b: Array, context: Array) -> list[Array]:
        return _average_rows(bits_a, scale_a, bits_b, scale_b, context, dim=self.dim)

    def changes(self) -> Mapping[int, int]:
        return {0: 0, 1: 1}

    def sharding_rule(self, *_operands: Array) -> str:
        return "v b, v o, v b, v o, k -> v b, v o"

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        table: list[Spec] = [(axes, ()), (axes, ())]
        return Plan([*table, *table, ((),)], table, partial(self.shard, axes=axes))

    def shard(self, bits_a: Array, *rest: Array, axes: Axes) -> list[Array]:
        *others, context = rest
        return self.on_device(bits_a, *others, own_context(context, bits_a.shape[0], axes))


@wide
def _average_rows(bits_a: Array, scale_a: Array, bits_b: Array, scale_b: Array, context: Array, *, dim: int) -> list[Array]:
    """`reference.average`; a weight outside [0, 1] gives scales of NaN and the bits of a."""
    weight = lax.bitcast_convert_type(context[6], jnp.float32)
    keys = context_keys(context, jnp.arange(bits_a.shape[0]), AVERAGE_WORD)
    bits, scale = average_rows(bits_a, scale_a, bits_b, scale_b, weight, keys, dim, jnp)
    valid = (weight >= 0) & (weight <= 1)
    return [jnp.where(valid, bits, bits_a), jnp.where(valid, scale, np.float32(np.nan))]
