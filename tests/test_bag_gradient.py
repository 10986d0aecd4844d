"""Gradients of bags: the reference against values worked out by hand and against float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbin import _native, reference
from dualbin._schema import BAG_MODES

BITS = np.array([[0b011], [0b101], [0b111]], np.uint8)
SCALE = np.array([[2.0], [-0.5], [0.0]], np.float32)  # row 2 is padding
IDS, OFFSETS = np.array([7, 0, 2, 1, 1, 0]), np.array([0, 1, 4, 4, 5])  # a bad id, three rows, none, one row; the last id is in no bag
DY = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [-1, -2, -0.0]], np.float32)


def test_counts_by_hand() -> None:
    assert reference.bag_counts(SCALE, IDS, OFFSETS).tolist() == [0, 2, 0, 1]
    assert reference.bag_counts(SCALE, IDS, OFFSETS, padding_idx=1).tolist() == [0, 1, 0, 0]


def test_rows_by_hand() -> None:
    plain = reference.bag_gradient(IDS, OFFSETS, DY)
    assert plain.tolist() == [[1, 2, 3], [4, 5, 6], [4, 5, 6], [4, 5, 6], [-1, -2, 0], [0, 0, 0]]
    assert np.signbit(plain[4]).all(), "a copy, the sign of zero included"
    assert not np.signbit(plain[5]).any()
    assert reference.bag_gradient(IDS, OFFSETS, DY, "majority").tobytes() == plain.tobytes()
    mean = reference.bag_gradient(IDS, OFFSETS, DY, "mean", np.array([0, 2, 0, 1], np.int32), padding_idx=0)
    assert mean.tolist() == [[1, 2, 3], [0, 0, 0], [2, 2.5, 3], [2, 2.5, 3], [-1, -2, 0], [0, 0, 0]]
    weights = np.array([2, -1, 0.5, 3, 1, 1], np.float32)
    weighted = reference.bag_gradient(IDS, OFFSETS, DY, weights=weights)
    assert weighted.tolist() == [[2, 4, 6], [-4, -5, -6], [2, 2.5, 3], [12, 15, 18], [-1, -2, 0], [0, 0, 0]]


def test_weights_by_hand() -> None:
    assert reference.bag_weight_gradient(BITS, SCALE, IDS, OFFSETS, DY, 3).tolist() == [0, 2 * (4 + 5 - 6), 0, -0.5 * (4 - 5 + 6), -0.5, 0]
    assert reference.bag_weight_gradient(BITS, SCALE, IDS, OFFSETS, DY, 3, padding_idx=1).tolist() == [0, 6, 0, 0, 0, 0]
    zeros = reference.bag_weight_gradient(BITS, SCALE, IDS, OFFSETS, 0 * DY, 3)
    assert not np.signbit(zeros).any(), "a zero is +0.0 with a negative scale, too"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_division_comes_before_the_rounding(dtype: Any) -> None:
    dy = np.random.default_rng(0).normal(size=(1, 2000)).astype(dtype)
    rows = reference.bag_gradient(np.zeros(3, int), np.array([0, 3]), dy, "mean", np.array([3], np.int32))
    assert rows.dtype == dtype
    assert (rows[0] == (dy[0].astype(np.float64) / 3).astype(dtype)).all()
    assert (rows[0] != dy[0] * np.array(1 / 3, dtype)).any(), "the factor 1/3 in half precision is another"


@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from([*BAG_MODES[:2], "weighted"]))
def test_it_is_the_gradient_of_lookup_bag(seed: int, mode: str) -> None:
    """A bag is linear in the scales and in the weights: what a step in one of them changes is what the gradient says."""
    rng = np.random.default_rng(seed)
    rows, dim, n = 6, int(rng.integers(1, 70)), 30
    bits, scale = reference.pack(rng.normal(size=(rows, dim))), rng.uniform(0.5, 1.0, (rows, 1)).astype(np.float32)
    scale[2] = 0
    padding_idx = int(rng.integers(-1, rows))
    ids, offsets = rng.integers(0, rows, n), np.sort(rng.integers(0, n + 1, 5))
    dy = rng.normal(size=(4, dim)).astype(np.float32)
    weights = rng.normal(size=n).astype(np.float32) if mode == "weighted" else None
    name = "sum" if mode == "weighted" else mode

    def loss(scale: Any, weights: Any) -> float:
        return float(
            (reference.lookup_bag(bits, scale, ids, offsets, dim, name, weights, padding_idx=padding_idx) * dy.astype(float)).sum()
        )

    counts = reference.bag_counts(scale, ids, offsets, padding_idx) if mode == "mean" else None
    gradient = reference.bag_gradient(ids, offsets, dy, name, counts, weights, padding_idx)
    slopes = reference.bag_weight_gradient(bits, scale, ids, offsets, dy, dim, padding_idx) if mode == "weighted" else np.zeros(n)
    for row in {0, 2, 5} - {padding_idx}:
        found, sums = reference.row_gradient(ids, gradient, rows)
        at = np.flatnonzero(found == row)
        slope = float((reference.unpack(bits[[row]], dim) * sums[at]).sum()) if len(at) and scale[row] else 0.0
        doubled = np.where(np.arange(rows)[:, None] == row, 2 * scale, scale)
        np.testing.assert_allclose(loss(doubled, weights) - loss(scale, weights), slope * scale[row, 0], atol=1e-4)
    for at in range(0, n, 7):
        if weights is not None:
            step = np.where(np.arange(n) == at, weights + 1, weights).astype(np.float32)
            np.testing.assert_allclose(loss(scale, step) - loss(scale, weights), slopes[at], atol=1e-4)
    for g, (a, b) in enumerate(pairwise(offsets)):
        assert counts is None or counts[g] == ((ids[a:b] != 2) & (ids[a:b] != padding_idx)).sum()


def test_one_nan() -> None:
    dy = np.array([[np.uint32(0xFFC12345), np.uint32(0x7F800000)]], np.uint32).view(np.float32)
    ids, offsets = np.array([0]), np.array([0, 1])
    assert reference.bag_gradient(ids, offsets, dy)[0].view(np.uint32).tolist() == [0x7FC00000, 0x7F800000]
    half = dy.astype(np.float16)
    assert reference.bag_gradient(ids, offsets, half)[0].view(np.uint16).tolist() == [0x7E00, 0x7C00]
    weights = np.zeros(1, np.float32)
    assert reference.bag_gradient(ids, offsets, dy, weights=weights)[0].view(np.uint32).tolist() == [0x7FC00000, 0x7FC00000]
    slope = reference.bag_weight_gradient(BITS[:1], SCALE[:1], ids, offsets, dy, 2)
    assert slope.view(np.uint32).tolist() == [0x7FC00000]


def test_bad_arguments() -> None:
    counts = np.ones(4, np.int32)
    good: dict[str, Any] = {"ids": IDS, "offsets": OFFSETS, "dy": DY}
    for error, match, changed in (
        (ValueError, "mode must be one of", {"mode": "max"}),
        (ValueError, "counts must be int32 .4., one for every bag, with mode 'mean', got object", {"mode": "mean"}),
        (ValueError, "counts must be int32 .4.", {"mode": "mean", "counts": counts[:3]}),
        (ValueError, "counts must be None with mode 'sum'", {"counts": counts}),
        (ValueError, "weights must be None with mode 'mean'", {"mode": "mean", "counts": counts, "weights": np.ones(6, np.float32)}),
        (TypeError, "dy must be float32, float16 or bfloat16, got float64", {"dy": DY.astype(float)}),
        (ValueError, "dy must have shape .4, D., one row for every bag, got .3, 3.", {"dy": DY[:3]}),
        (ValueError, "offsets must ascend", {"offsets": OFFSETS[::-1]}),
        (ValueError, "padding_idx must be at least -1, got -2", {"padding_idx": -2}),
        (TypeError, "padding_idx must be an integer", {"padding_idx": None}),
    ):
        with pytest.raises(error, match=match):
            reference.bag_gradient(**(good | changed))


# ---- the native code -------------------------------------------------------------------------------------------------------------------

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dim=st.one_of(st.integers(1, 70), st.sampled_from([127, 512, 521])),
    sizes=st.lists(st.one_of(st.just(0), st.integers(1, 6), st.sampled_from([63, 65, 129])), max_size=6),
    mode=st.sampled_from([*BAG_MODES, "weighted"]),
    dtype=st.sampled_from(list(DTYPES)),
    ids_type=st.sampled_from([np.int32, np.int64]),
)
def test_native_equals_the_reference(seed: int, dim: int, sizes: list[int], mode: str, dtype: str, ids_type: Any) -> None:
    """With ids outside every bag, ids that do not exist, and values that overflow, underflow and are no numbers."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 3, 2)
    offsets = (left + np.concatenate([[0], np.cumsum(sizes)])).astype(ids_type)
    ids = rng.integers(-2, 12, int(offsets[-1] + right)).astype(ids_type)
    bits = reference.pack(rng.normal(size=(9, dim)))
    scale = rng.choice([0.0, 1.0, -0.3, 1e-40, 2e38], size=(9, 1)).astype(np.float32)
    special = [1.0, 1.0, 1.0, 1e-7, 6e4, -np.nan, np.inf, 1e-40, 3e38]
    with np.errstate(over="ignore"):
        dy = (rng.normal(size=(len(sizes), dim)) * rng.choice(special, (len(sizes), dim))).astype(DTYPES[dtype])
    weights = (rng.normal(size=len(ids)) * rng.choice([1.0, 1e-30, 0.0], len(ids))).astype(np.float32) if mode == "weighted" else None
    name, padding_idx = "sum" if mode == "weighted" else mode, int(rng.integers(-1, 9))

    counts = np.full(len(sizes), 7, np.int32)
    _native.bag_counts(scale, ids, offsets, counts, padding_idx, threads=2)
    assert counts.tobytes() == reference.bag_counts(scale, ids, offsets, padding_idx).tobytes()
    divisors = counts if mode == "mean" else None
    rows = np.full((len(ids), dim), 7, dy.dtype)
    _native.bag_gradient(ids, offsets, dy, name, rows, divisors, weights, padding_idx, threads=2)
    assert rows.tobytes() == reference.bag_gradient(ids, offsets, dy, name, divisors, weights, padding_idx).tobytes()
    slopes = np.full(len(ids), 7, np.float32)
    _native.bag_weight_gradient(bits, scale, ids, offsets, dy, slopes, padding_idx, threads=2)
    assert slopes.tobytes() == reference.bag_weight_gradient(bits, scale, ids, offsets, dy, dim, padding_idx).tobytes()


def test_native_refuses() -> None:
    rows, counts, weights = np.full((6, 3), 7, np.float32), np.ones(4, np.int32), np.ones(6, np.float32)
    good: dict[str, Any] = {"ids": IDS, "offsets": OFFSETS, "dy": DY, "mode": "sum", "out": rows}
    for error, match, changed in (
        (ValueError, "mode must be one of 'sum', 'mean', 'majority', got 'max'", {"mode": "max"}),
        (ValueError, "counts are given with the mode mean, and with no other", {"mode": "mean"}),
        (ValueError, "counts are given with the mode mean, and with no other", {"counts": counts}),
        (ValueError, r"counts must have shape \[4\], got \[3\]", {"mode": "mean", "counts": counts[:3]}),
        (TypeError, "counts must be int32, got int64", {"mode": "mean", "counts": counts.astype(int)}),
        (ValueError, "weights need the mode sum", {"mode": "mean", "counts": counts, "weights": weights}),
        (ValueError, r"weights must have shape \[6\], got \[5\]", {"weights": weights[:5]}),
        (ValueError, r"dy must have shape \[4, \*\], got \[3, 3\]", {"dy": DY[:3]}),
        (TypeError, "out must be float32 as dy is, got float16", {"out": rows.astype(np.float16)}),
        (ValueError, r"out must have shape \[6, 3\], got \[5, 3\]", {"out": rows[:5].copy()}),
        (ValueError, "offsets must ascend from 0 to at most the 6 ids, got 1 at position 2", {"offsets": np.array([0, 2, 1, 4, 4])}),
        (ValueError, "padding_idx must be an id, or -1 for none, got -2", {"padding_idx": -2}),
    ):
        with pytest.raises(error, match=match):
            _native.bag_gradient(**(good | changed))
    assert (rows == 7).all(), "a call that is refused writes nothing"
    with pytest.raises(ValueError, match=r"scale must have shape \[V, 1\] with V >= 1"):
        _native.bag_counts(SCALE[:0], IDS, OFFSETS, np.zeros(4, np.int32))
    with pytest.raises(ValueError, match=r"bits must have shape \[V, planes \* 1\] with V >= 1 and 1 to 8 planes for dim 3, got \[3, 9\]"):
        _native.bag_weight_gradient(np.zeros((3, 9), np.uint8), SCALE, IDS, OFFSETS, DY, np.zeros(6, np.float32))
