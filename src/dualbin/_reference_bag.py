"""Lookup of bags in NumPy: part of :mod:`dualbin.reference`, which re-exports it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualbin._checks import BAG_MODES, check_table_arrays

Array = NDArray[Any]

SUM_BLOCK = 64  #: additions that are done in one go, in a row sum as in a bag


def lookup_bag(
    bits: ArrayLike,
    scale: ArrayLike,
    ids: ArrayLike,
    offsets: ArrayLike,
    dim: int,
    mode: str = "sum",
    weights: ArrayLike | None = None,
    dtype: Any = np.float32,
) -> Array:
    """Rows of a table, combined bag by bag: `dtype` [G, dim].

    Padding rows (scale 0) contribute nothing in any mode and are not counted. A bag without any other row gives +0.0.

    Args:
        bits: uint8 [V, B].
        scale: float32 [V, 1].
        ids: int32 or int64 [N], the ids of a bag side by side.
        offsets: int32 or int64 [G + 1], ascending within [0, N]: bag `g` is `ids[offsets[g] : offsets[g + 1]]`. Other ids are not read.
        dim: D.
        mode: "sum"; "mean", the sum over the number of rows; or "majority", the sign of the sum of the +1/-1 alone, a tie counting as +1.
        weights: float32 [N], factors of the rows; mode "sum" only.
        dtype: of the result, to which a sum is rounded once.

    Raises:
        IndexError: an id of a bag is outside [0, V).
        TypeError, ValueError: an argument has the wrong type, shape or value.
    """
    bits, scale, ids, offsets = np.asarray(bits), np.asarray(scale), np.asarray(ids), np.asarray(offsets)
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim)
    _check_integers("ids", ids)
    _check_offsets(offsets, len(ids))
    factors = _factors(mode, weights, len(ids))
    used = np.arange(len(ids))[int(offsets[0]) : int(offsets[-1])]
    bad = used[(ids[used] < 0) | (ids[used] >= len(bits))]
    if len(bad):
        msg = f"id {ids[bad[0]]} at position {bad[0]} is outside [0, {len(bits)})"
        raise IndexError(msg)

    magnitude = np.ones(len(ids), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if mode != "majority":
            magnitude[used] = factors[used] * scale[ids[used], 0]
        bags = [_bag(bits, scale, ids[a:b], magnitude[a:b], dim, mode) for a, b in pairwise(offsets.tolist())]
        return np.array(bags, np.float32).reshape(-1, dim).astype(dtype)


def _bag(bits: Array, scale: Array, ids: Array, magnitude: Array, dim: int, mode: str) -> Array:
    """One bag, float32 [dim]. Blocks of 64 positions (padding rows have one too) are summed from +0.0, then the blocks are."""
    total = np.zeros(dim, np.float32)
    votes = np.zeros(dim, np.int64)
    count = 0
    for start in range(0, len(ids), SUM_BLOCK):
        block = np.zeros(dim, np.float32)
        for n in range(start, min(start + SUM_BLOCK, len(ids))):
            if scale[ids[n], 0] == 0:
                continue
            positive = np.unpackbits(bits[ids[n]], count=dim, bitorder="little") > 0
            block += np.where(positive, magnitude[n], -magnitude[n])
            votes += np.where(positive, 1, -1)
            count += 1
        total += block
    if mode == "majority":
        return np.where(votes >= 0, np.float32(1), np.float32(-1)) if count else total
    if mode == "mean":
        total = total / np.float32(max(count, 1))
    return np.where(np.isnan(total), np.float32("nan"), total)  # one NaN: processors disagree on its sign


def _factors(mode: str, weights: ArrayLike | None, count: int) -> Array:
    if mode not in BAG_MODES:
        msg = f"mode must be one of {', '.join(map(repr, BAG_MODES))}, got {mode!r}"
        raise ValueError(msg)
    if weights is None:
        return np.ones(count, np.float32)
    factors = np.asarray(weights)
    if mode != "sum":
        msg = f"weights must be None with mode {mode!r}: only mode 'sum' is weighted"
        raise ValueError(msg)
    if factors.dtype != np.float32:
        msg = f"weights must be float32, got {factors.dtype}"
        raise TypeError(msg)
    if factors.shape != (count,):
        msg = f"weights must have shape [{count}], one for every id, got {list(factors.shape)}"
        raise ValueError(msg)
    return factors


def _check_integers(name: str, array: Array) -> None:
    if array.dtype not in (np.int32, np.int64):
        msg = f"{name} must be int32 or int64, got {array.dtype}"
        raise TypeError(msg)
    if array.ndim != 1:
        msg = f"{name} must have 1 dimension, got shape {list(array.shape)}"
        raise ValueError(msg)


def _check_offsets(offsets: Array, count: int) -> None:
    _check_integers("offsets", offsets)
    if len(offsets) == 0:
        msg = "offsets must have one element more than there are bags, got none"
        raise ValueError(msg)
    bounded = np.concatenate([[0], offsets.astype(np.int64), [count]])
    wrong = np.flatnonzero(np.diff(bounded) < 0)
    if len(wrong):
        at = min(int(wrong[0]), len(offsets) - 1)
        msg = f"offsets must ascend from 0 to at most the {count} ids, got {offsets[at]} at position {at}"
        raise ValueError(msg)
