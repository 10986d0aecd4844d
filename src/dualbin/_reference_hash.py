"""The random numbers of the update rules in NumPy: a part of :mod:`dualbin.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def mix_first(x: Array) -> Array:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    return x ^ (x >> np.uint32(15))


def mix_last(x: Array) -> Array:
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def row_keys(seed: int, step: int, rows: Array, *more: int) -> tuple[Array, Array]:
    """Two keys uint32 [U] for every global row int64 [U], from (seed, step, row) and further words."""
    row_words = rows.astype(np.uint64)
    words = [np.full(len(rows), (value >> shift) & 0xFFFFFFFF, np.uint32) for value in (seed, step) for shift in (0, 32)]
    words += [(row_words & np.uint64(0xFFFFFFFF)).astype(np.uint32), (row_words >> np.uint64(32)).astype(np.uint32)]
    words += [np.full(len(rows), word, np.uint32) for word in more]
    k0, k1 = np.full(len(rows), 0x243F6A88, np.uint32), np.full(len(rows), 0x85A308D3, np.uint32)
    for word in words:
        k0, k1 = mix_last(mix_first(k0 ^ word)), mix_last(mix_first(k1 ^ word))
    return k0, k1


def pair_bits(keys: tuple[Array, Array], pairs: Array) -> Array:
    """uint32 [U, P]: the random bits of the columns 2j (low half) and 2j + 1 for every j of the uint32 [P] `pairs`."""
    k0, k1 = keys
    return mix_last(mix_first(k0[:, None] + pairs * np.uint32(0x9E3779B9)) ^ k1[:, None])


def column_bits(keys: tuple[Array, Array], dim: int) -> Array:
    """16 uniform bits for every column of a row, as int64 [U, dim]."""
    x = pair_bits(keys, np.arange((dim + 1) // 2, dtype=np.uint32))
    halves = np.stack([x & np.uint32(0xFFFF), x >> np.uint32(16)], axis=2)
    return halves.reshape(len(x), -1)[:, :dim].astype(np.int64)


def random16(seed: int, step: int, rows: Array, dim: int) -> Array:
    """16 uniform bits for every weight of the global rows int64 [U], as int64 [U, dim]: a hash of (seed, step, row, column)."""
    return column_bits(row_keys(seed, step, rows), dim)
