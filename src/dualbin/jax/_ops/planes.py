"""What is left of a table of several planes where fewer are kept."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin import _reference_planes
from dualbin._schema import packed_width
from dualbin.jax._ops.arithmetic import wide


def fewer_scale(bits: Array, scale: Array, *, dim: int, planes: int) -> Array:
    """The scales float32 `[..., V, 1]` of the top `planes` of a table (`reference.with_planes`)."""
    return _fewer_scale(bits, scale, dim=dim, planes=planes)


@wide
@partial(jax.jit, static_argnames=("dim", "planes"))
def _fewer_scale(bits: Array, scale: Array, *, dim: int, planes: int) -> Array:
    split = bits.reshape(*bits.shape[:-1], bits.shape[-1] // packed_width(dim), packed_width(dim))
    below = split.shape[-2] - planes

    def add(byte: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        """The sums with eight columns more: so no integers of a whole table are in memory."""
        packed = lax.dynamic_index_in_dim(split, byte, axis=-1, keepdims=False)[..., 1:, None]
        single = (packed >> jnp.arange(8, dtype=jnp.uint8) & np.uint8(1)).astype(jnp.int32)
        magnitude = single[..., 0, :]
        for p in range(1, single.shape[-2]):
            magnitude = magnitude << 1 | single[..., p, :]
        full, few = 2 * magnitude + 1, 2 * (magnitude >> below) + 1
        inside = 8 * byte.astype(jnp.int32) + jnp.arange(8, dtype=jnp.int32) < dim
        more = (jnp.where(inside, x, 0).sum(axis=-1, keepdims=True) for x in (full * few, few * few))
        of_full, of_few = (total + x.astype(jnp.int64) for total, x in zip(sums, more, strict=True))
        return of_full, of_few

    zero = bits[..., :1].astype(jnp.int64) * 0  # sharded, and of the type inside a shard_map, as the sums will be
    of_full, of_few = lax.fori_loop(0, split.shape[-1], add, (zero, zero))
    return _reference_planes.fewer_scale(scale, of_full, of_few, below, jnp)
