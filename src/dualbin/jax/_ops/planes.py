"""What is left of a table of several planes where fewer are kept."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualbin._checks import MIN_SCALE
from dualbin._schema import packed_width
from dualbin.jax._ops.arithmetic import wide
from dualbin.jax._ops.lookup import unpack_levels


def fewer_scale(bits: Array, scale: Array, *, dim: int, planes: int) -> Array:
    """The scales float32 `[..., V, 1]` of the top `planes` of a table (`reference.with_planes`)."""
    return _fewer_scale(bits, scale, dim=dim, planes=planes)


@wide
@partial(jax.jit, static_argnames=("dim", "planes"))
def _fewer_scale(bits: Array, scale: Array, *, dim: int, planes: int) -> Array:
    width = packed_width(dim)
    full, few = (jnp.abs(unpack_levels(x, dim).astype(jnp.int64)) for x in (bits, bits[..., : planes * width]))
    ratio = (full * few).sum(axis=-1, keepdims=True).astype(jnp.float64) / (few * few).sum(axis=-1, keepdims=True).astype(jnp.float64)
    new = (scale.astype(jnp.float64) * ratio * 2.0 ** (planes - bits.shape[-1] // width)).astype(jnp.float32)
    return jnp.where(scale == 0, np.float32(0), jnp.copysign(jnp.maximum(jnp.abs(new), np.float32(MIN_SCALE)), scale))
