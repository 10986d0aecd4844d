"""The random numbers of updates and averages: a part of :mod:`dualbin.reference`.

As in `_reference_rules`, `xp` is the array module, `numpy` or `jax.numpy` with 64-bit types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  #: of the array module


def mix_first(x: Array) -> Array:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    return x ^ (x >> np.uint32(15))


def mix_last(x: Array) -> Array:
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def step_words(seed: int, step: int) -> list[np.uint32]:
    """Seed and step as the words of a step context."""
    return [np.uint32((value >> shift) & 0xFFFFFFFF) for value in (seed, step) for shift in (0, 32)]


def row_keys(words: Sequence[Array], rows: Array, *more: int, xp: Any = np) -> tuple[Array, Array]:
    """Two keys uint32 [U] for every row of the whole table, integers [U], from the words of the step, the row and further words."""
    wide = rows.astype(np.uint64)
    words = [*words, wide.astype(np.uint32), (wide >> np.uint64(32)).astype(np.uint32), *map(np.uint32, more)]
    k0, k1 = (xp.full(rows.shape, key, np.uint32) for key in (0x243F6A88, 0x85A308D3))
    for word in words:
        k0, k1 = mix_last(mix_first(k0 ^ word)), mix_last(mix_first(k1 ^ word))
    return k0, k1


def pair_bits(keys: tuple[Array, Array], pairs: Array) -> Array:
    """uint32 [U, P]: the random bits of the columns 2j (low half) and 2j + 1 for every j of the uint32 [P] `pairs`."""
    k0, k1 = keys
    return mix_last(mix_first(k0[:, None] + pairs * np.uint32(0x9E3779B9)) ^ k1[:, None])


def column_bits(keys: tuple[Array, Array], dim: int, xp: Any = np) -> Array:
    """16 uniform bits for every column of a row, as int64 [U, dim]."""
    x = pair_bits(keys, xp.arange((dim + 1) // 2, dtype=np.uint32))
    halves = xp.stack([x & np.uint32(0xFFFF), x >> np.uint32(16)], axis=2)
    return halves.reshape(x.shape[0], 2 * x.shape[1])[:, :dim].astype(np.int64)


def random16(seed: int, step: int, rows: Array, dim: int) -> Array:
    """16 uniform bits for every weight of the global rows int64 [U], as int64 [U, dim]: a hash of (seed, step, row, column)."""
    return column_bits(row_keys(step_words(seed, step), rows), dim)
