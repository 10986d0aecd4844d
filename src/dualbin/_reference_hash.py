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


def random16(seed: int, step: int, rows: Array, dim: int) -> Array:
    """16 uniform bits for every weight of the global rows int64 [U], as int64 [U, dim]: a hash of (seed, step, row, column)."""
    row_words = rows.astype(np.uint64)
    words = [np.full(len(rows), (value >> shift) & 0xFFFFFFFF, np.uint32) for value in (seed, step) for shift in (0, 32)]
    words += [(row_words & np.uint64(0xFFFFFFFF)).astype(np.uint32), (row_words >> np.uint64(32)).astype(np.uint32)]
    k0, k1 = np.full(len(rows), 0x243F6A88, np.uint32), np.full(len(rows), 0x85A308D3, np.uint32)
    for word in words:
        k0, k1 = mix_last(mix_first(k0 ^ word)), mix_last(mix_first(k1 ^ word))
    pair = np.arange((dim + 1) // 2, dtype=np.uint32)
    x = mix_last(mix_first(k0[:, None] + pair * np.uint32(0x9E3779B9)) ^ k1[:, None])
    halves = np.stack([x & np.uint32(0xFFFF), x >> np.uint32(16)], axis=2)
    return halves.reshape(len(rows), -1)[:, :dim].astype(np.int64)
