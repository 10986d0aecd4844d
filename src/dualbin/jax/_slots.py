"""Row ids among the floats of a gradient, so that arithmetic on all leaves of a tree does them no harm.

An id is written as a 1, its 16-bit digits and a hash of them, all times 2**-90. A common factor and sums of the same ids leave the ratios
to the 1 as they are; in a norm the squares are 0. Where different ids were added, or digits rounded to half precision, the hash tells.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

#: what a digit of 1 is. Its square is 0 in float32, and it stands a division by 2**36 before it is subnormal, which XLA takes for 0
_UNIT = np.float32(2.0**-90)

#: how far a digit may be from an integer, after many sums and factors that rounded
_TOLERANCE = np.float32(0.25)


def encode(ids: Array) -> Array:
    """float32 `[..., k]` for int32 or int64 ids of any values: k is 4 or 6."""
    digits = [(ids >> 16 * n & 0xFFFF).astype(jnp.int32) for n in range(ids.dtype.itemsize // 2)]
    numbers = [jnp.ones(ids.shape, jnp.int32), *digits, _hash(digits)]
    return jnp.stack(numbers, axis=-1).astype(jnp.float32) * _UNIT


def decode(slots: Array) -> Array:
    """The ids, int32 or int64 `[...]`; :func:`lost_id` where they are not what was encoded."""
    one = slots[..., :1]
    ratio = slots[..., 1:] / jnp.where(gone(slots)[..., None], jnp.float32(1), one)
    whole = jnp.rint(ratio)
    near = (jnp.abs(ratio - whole) <= _TOLERANCE) & (whole >= 0) & (whole <= 0xFFFF)
    *digits, check = jnp.moveaxis(jnp.where(near, whole, 0).astype(jnp.int32), -1, 0)
    kind = jnp.dtype(jnp.int32 if len(digits) == 2 else jnp.int64)
    ids = jnp.zeros(slots.shape[:-1], kind)
    for n, digit in enumerate(digits):
        ids = ids | digit.astype(kind) << 16 * n
    return jnp.where(near.all(-1) & (check == _hash(digits)), ids, lost_id(kind))


def gone(slots: Array) -> Array:
    """bool `[...]`: everything was multiplied by 0, or by what is not finite."""
    return (slots[..., 0] == 0) | ~jnp.isfinite(slots[..., 0])


def lost_id(kind: jnp.dtype) -> Array:
    """Stands for an id that arithmetic has changed."""
    return jnp.asarray(jnp.iinfo(kind).min, kind)


def _hash(digits: list[Array]) -> Array:
    """16 bits that depend on every bit of the digits, at least 2: signs of digits are no id."""
    x = jnp.zeros(digits[0].shape, jnp.uint32)
    for digit in digits:
        x = (x ^ digit.astype(jnp.uint32)) + np.uint32(0x9E3779B9)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x = x ^ (x >> np.uint32(16))
    return (x & np.uint32(0xFFFF) | np.uint32(2)).astype(jnp.int32)
