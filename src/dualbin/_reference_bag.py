"""Bags in NumPy, their lookup and their gradients: part of :mod:`dualbin.reference`, which re-exports them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualbin._checks import check_int, check_table_arrays
from dualbin._reference_planes import check_bits
from dualbin._reference_planes import weights as row_weights
from dualbin._reference_sums import SUM_BLOCK, sum_of_lanes
from dualbin._schema import BAG_MODES

Array = NDArray[Any]


def lookup_bag(
    bits: ArrayLike,
    scale: ArrayLike,
    ids: ArrayLike,
    offsets: ArrayLike,
    dim: int,
    mode: str = "sum",
    weights: ArrayLike | None = None,
    dtype: Any = np.float32,
    padding_idx: int = -1,
    planes: int = 1,
) -> Array:
    """Rows of a table, combined bag by bag: `dtype` [G, dim].

    Padding rows (scale 0, and the row `padding_idx`) contribute nothing in any mode and are not counted. A bag without any other row gives
    +0.0.

    Args:
        bits: uint8 [V, planes * B].
        scale: float32 [V, 1].
        ids: int32 or int64 [N], the ids of a bag side by side.
        offsets: int32 or int64 [G + 1], ascending within [0, N]: bag `g` is `ids[offsets[g] : offsets[g + 1]]`. Other ids are not read.
        dim: D.
        mode: "sum"; "mean", the sum over the number of rows; or "majority", the sign of the sum of the +1/-1 alone, a tie counting as +1.
        weights: float32 [N], factors of the rows; mode "sum" only.
        dtype: of the result, to which a sum is rounded once.
        padding_idx: an id that is a padding row whatever its scale; -1 for none.
        planes: of the table; mode "majority" is one of one plane.

    Raises:
        IndexError: an id of a bag is outside [0, V).
        TypeError, ValueError: an argument has the wrong type, shape or value.
    """
    bits, scale, ids, offsets = check_bits(bits, dim, planes), np.asarray(scale), np.asarray(ids), np.asarray(offsets)
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim, planes)
    _check_bags(ids, offsets, padding_idx)
    factors = _factors(mode, weights, len(ids))
    if mode == "majority" and planes > 1:
        msg = f"mode must be 'sum' or 'mean' for a table of {planes} planes, got 'majority', a vote by one plane"
        raise ValueError(msg)
    used = np.arange(len(ids))[int(offsets[0]) : int(offsets[-1])]
    bad = used[(ids[used] < 0) | (ids[used] >= len(bits))]
    if len(bad):
        msg = f"id {ids[bad[0]]} at position {bad[0]} is outside [0, {len(bits)})"
        raise IndexError(msg)

    magnitude = np.ones(len(ids), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if mode != "majority":
            magnitude[used] = factors[used] * scale[ids[used], 0]
        counted = np.zeros(len(ids), bool)
        counted[used] = (scale[ids[used], 0] != 0) & (ids[used] != padding_idx)
        bags = [_bag(bits, counted[a:b], ids[a:b], magnitude[a:b], dim, mode, planes) for a, b in pairwise(offsets.tolist())]
        return np.array(bags, np.float32).reshape(-1, dim).astype(dtype)


def _bag(bits: Array, counted: Array, ids: Array, magnitude: Array, dim: int, mode: str, planes: int) -> Array:
    """One bag, float32 [dim]. Blocks of 64 positions (padding rows have one too) are summed from +0.0, then the blocks are."""
    total = np.zeros(dim, np.float32)
    votes = np.zeros(dim, np.int64)
    count = 0
    for start in range(0, len(ids), SUM_BLOCK):
        block = np.zeros(dim, np.float32)
        for n in range(start, min(start + SUM_BLOCK, len(ids))):
            if not counted[n]:
                continue
            row = row_weights(bits[ids[n]][None], dim, planes)[0]
            block += magnitude[n] * row
            votes += np.where(row > 0, 1, -1)
            count += 1
        total += block
    if mode == "majority":
        return np.where(votes >= 0, np.float32(1), np.float32(-1)) if count else total
    if mode == "mean":
        total = total / np.float32(max(count, 1))
    return _one_nan(total)


def _one_nan(values: Array) -> Array:
    """Every NaN becomes the positive quiet one: processors disagree on the sign of a new NaN."""
    return np.where(np.isnan(values), values.dtype.type("nan"), values)


# ---- gradients -------------------------------------------------------------------------------------------------------------------------


def bag_counts(scale: ArrayLike, ids: ArrayLike, offsets: ArrayLike, padding_idx: int = -1) -> Array:
    """How many rows of every bag count: int32 [G]. Ids outside [0, V), rows of scale 0 and the row `padding_idx` do not.

    Args:
        scale: float32 [V, 1].
        ids, offsets, padding_idx: as of :func:`lookup_bag`.
    """
    scale, ids, offsets = np.asarray(scale), np.asarray(ids), np.asarray(offsets)
    _check_bags(ids, offsets, padding_idx)
    counted = (ids >= 0) & (ids < len(scale)) & (ids != padding_idx)
    counted &= scale[np.where(counted, ids, 0), 0] != 0
    return np.array([counted[a:b].sum() for a, b in pairwise(offsets.tolist())], np.int32)


def bag_gradient(
    ids: ArrayLike,
    offsets: ArrayLike,
    dy: ArrayLike,
    mode: str = "sum",
    counts: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    padding_idx: int = -1,
) -> Array:
    """The gradient of :func:`lookup_bag` with respect to its rows, one row for every id: [N, D] of the dtype of `dy`.

    The row of position n in bag g is `dy[g]`: with mode "mean" divided once, in float32, by `max(counts[g], 1)`; with weights multiplied
    once, in float32, by `weights[n]`. It is rounded to the dtype of `dy` once; every NaN is the positive quiet one. Positions in no bag and
    those of `padding_idx` get +0.0. The gradient of "majority" is that of "sum". An update ignores the rows of ids that do not count.

    Args:
        ids, offsets, mode, weights, padding_idx: as of :func:`lookup_bag`.
        dy: float32, float16 or bfloat16 [G, D].
        counts: int32 [G], :func:`bag_counts`; mode "mean" needs it, the others take none.
    """
    ids, offsets, dy = np.asarray(ids), np.asarray(offsets), np.asarray(dy)
    _check_bags(ids, offsets, padding_idx)
    _check_gradient(dy, offsets)
    factors = _factors(mode, weights, len(ids))
    divisors = _divisors(mode, counts, len(offsets) - 1)
    rows = np.zeros((len(ids), dy.shape[1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for g, (a, b) in enumerate(pairwise(offsets.tolist())):
            rows[a:b] = dy[g].astype(np.float32) * factors[a:b, None] / divisors[g]  # a product with 1, or a quotient by 1, is exact
        rows[ids == padding_idx] = 0
        return _one_nan(rows.astype(dy.dtype))


def bag_weight_gradient(
    bits: ArrayLike,
    scale: ArrayLike,
    ids: ArrayLike,
    offsets: ArrayLike,
    dy: ArrayLike,
    dim: int,
    padding_idx: int = -1,
    planes: int = 1,
) -> Array:
    """The gradient of :func:`lookup_bag` with respect to its weights: float32 [N].

    `scale[id] * S` in float64, rounded once to float32, with S the sum over the columns of `dy[g] * s*(2m+1) / 2**(planes-1)`, taken in
    float64 over 32 strided lanes as in :func:`dualbin.reference.row_scale`. Every NaN is the positive quiet one and every zero is +0.0,
    which is also what positions in no bag, padding rows and ids outside [0, V) get.

    Args:
        bits, scale, ids, offsets, dim, padding_idx, planes: as of :func:`lookup_bag`.
        dy: float32, float16 or bfloat16 [G, dim].
    """
    bits, scale, ids, offsets, dy = (np.asarray(x) for x in (bits, scale, ids, offsets, dy))
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim, planes)
    _check_bags(ids, offsets, padding_idx)
    _check_gradient(dy, offsets)
    out = np.zeros(len(ids), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for g, (a, b) in enumerate(pairwise(offsets.tolist())):
            for n in range(a, b):
                if not 0 <= ids[n] < len(bits) or ids[n] == padding_idx or scale[ids[n], 0] == 0:
                    continue
                aligned = dy[g].astype(np.float64) * row_weights(bits[ids[n]][None], dim, planes)[0].astype(np.float64)
                out[n] = np.float64(scale[ids[n], 0]) * sum_of_lanes(aligned[None])[0]
        return _one_nan(out + np.float32(0))  # -0.0 + 0.0 is +0.0


# ---- checks ----------------------------------------------------------------------------------------------------------------------------


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


def _divisors(mode: str, counts: ArrayLike | None, bags: int) -> Array:
    if mode != "mean":
        if counts is not None:
            msg = f"counts must be None with mode {mode!r}: only mode 'mean' divides"
            raise ValueError(msg)
        return np.ones(bags, np.float32)
    given = np.asarray(counts)
    if given.dtype != np.int32 or given.shape != (bags,):
        msg = f"counts must be int32 [{bags}], one for every bag, with mode 'mean', got {given.dtype} {list(given.shape)}"
        raise ValueError(msg)
    return np.maximum(given, 1).astype(np.float32)


def _check_gradient(dy: Array, offsets: Array) -> None:
    if dy.dtype.name not in {"float32", "float16", "bfloat16"}:
        msg = f"dy must be float32, float16 or bfloat16, got {dy.dtype}"
        raise TypeError(msg)
    if dy.ndim != 2 or dy.shape[0] != len(offsets) - 1 or dy.shape[1] < 1:
        msg = f"dy must have shape [{len(offsets) - 1}, D], one row for every bag, got {list(dy.shape)}"
        raise ValueError(msg)


def _check_bags(ids: Array, offsets: Array, padding_idx: int) -> None:
    _check_integers("ids", ids)
    _check_offsets(offsets, len(ids))
    check_int("padding_idx", padding_idx, low=-1)


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
