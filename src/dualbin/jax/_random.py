"""Random packed rows: what a new table starts from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualbin._checks import INDEPENDENT
from dualbin._schema import packed_width


def random_bits(key: Array, rows: int, dim: int, spread: int, pattern: Array | None = None, planes: int = 1) -> Array:
    """Random packed rows uint8 `[rows, planes * B]`.

    With a spread below INDEPENDENT every sign differs with probability `spread` / 256 from the pattern `[1, B]`; without a pattern, from
    one that is random too. Magnitudes are uniform below half of their range: their first plane is zero.
    """
    sign_key, level_key = (key, key) if planes == 1 else jax.random.split(key)
    shape = rows, packed_width(dim)
    parts = [jax.random.bits(sign_key, shape, jnp.uint8) if spread == INDEPENDENT else _near(sign_key, shape, spread, pattern)]
    if planes > 1:
        parts.append(jnp.zeros(shape, jnp.uint8))
    if planes > 2:
        parts.append(jax.random.bits(level_key, (rows, (planes - 2) * shape[1]), jnp.uint8))
    bits = jnp.concatenate(parts, axis=1) if planes > 1 else parts[0]
    last = np.full(shape[1], 0xFF, np.uint8)
    last[-1] >>= -dim % 8
    return bits & np.tile(last, planes) if dim % 8 else bits


def _near(key: Array, shape: tuple[int, int], spread: int, pattern: Array | None) -> Array:
    # One binary digit of the probability after the other, the last first: with a fair bit, "or" takes p to (1 + p) / 2, "and" to p / 2.
    different = jnp.zeros(shape, jnp.uint8)
    pattern_key, *keys = jax.random.split(key, 9)
    for digit, digit_key in enumerate(keys):
        fair = jax.random.bits(digit_key, shape, jnp.uint8)
        different = different | fair if spread >> digit & 1 else different & fair
    return different ^ (jax.random.bits(pattern_key, (1, shape[1]), jnp.uint8) if pattern is None else pattern)
