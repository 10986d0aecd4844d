"""The average of two packed tables: what the reference promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualbin import _native, reference

DIM = 1000


def table(seed: int, rows: int = 5, dim: int = DIM) -> tuple[Any, Any]:
    w = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return reference.pack(w), reference.row_scale(w)


def values(bits: Any, scale: Any) -> Any:
    return scale * reference.unpack(bits, DIM)


@pytest.mark.parametrize("weight", [0.0005, 0.3, 0.5, 0.99])
def test_the_expectation_is_the_average(weight: float) -> None:
    """The mean of 1000 columns and 200 steps, with a probability that is no multiple of 2**-16, within five standard errors."""
    (bits_a, scale_a), (bits_b, scale_b) = table(0), table(1)
    scale_a[1] *= -1
    scale_b[2] *= -1
    scale_a[3], scale_b[3] = -0.2, -0.7
    total, steps = np.zeros((5, DIM)), 200
    for step in range(steps):
        bits, scale = reference.average(bits_a, scale_a, bits_b, scale_b, weight, DIM, seed=5, step=step)
        total += values(bits, scale)
    want = (1 - weight) * values(bits_a, scale_a) + weight * values(bits_b, scale_b)
    error = np.sign(want) * (total / steps - want)
    share = weight * np.abs(scale_b) / np.abs(scale)
    one = 2 * np.abs(scale) * np.sqrt(share * (1 - share) / (2 * steps * DIM))  # about half of the columns differ
    assert (np.abs(error.mean(axis=1, keepdims=True)) < 5 * one).all()
    w, a, b = np.float32(weight), np.abs(scale_a).astype(float), np.abs(scale_b).astype(float)
    assert np.array_equal(np.abs(scale), (float(1 - w) * a + float(w) * b).astype(np.float32))


def test_a_small_weight_is_no_multiple_of_the_hash() -> None:
    """A chance of 1/2**18: a threshold of 16 bits alone would be 0 for ever, or four times too often 1."""
    dim, rows = 4096, 4096
    zeros, ones = np.zeros((rows, dim // 8), np.uint8), np.full((rows, dim // 8), 255, np.uint8)
    scale = np.ones((rows, 1), np.float32)
    bits, _ = reference.average(zeros, scale, ones, scale, 2.0**-18, dim, seed=1)
    taken = int(np.unpackbits(bits).sum())  # 64 in expectation; a row takes all its chances at once, so the deviation is larger
    assert 20 < taken < 120


def test_ends_and_padding() -> None:
    (bits_a, scale_a), (bits_b, scale_b) = table(0), table(1)
    scale_a[1], scale_b[2], scale_a[3], scale_b[3], scale_a[4] = 0, 0, 0, 0, -1
    bits, scale = reference.average(bits_a, scale_a, bits_b, scale_b, 0.0, DIM)
    assert np.array_equal(bits, bits_a)
    assert np.array_equal(scale, scale_a)
    bits, scale = reference.average(bits_a, scale_a, bits_b, scale_b, 1.0, DIM)
    assert np.array_equal(bits[[0, 1, 4]], bits_b[[0, 1, 4]])
    assert np.array_equal(scale, scale_b)
    bits, scale = reference.average(bits_a, scale_a, bits_b, scale_b, 0.25, DIM)
    assert np.array_equal(bits[1], bits_b[1])
    assert scale[1] == np.float32(0.25) * scale_b[1], "the row of b alone, times its weight"
    assert np.array_equal(bits[2], bits_a[2])
    assert scale[2] == np.float32(0.75) * scale_a[2]
    assert np.array_equal(bits[3], bits_a[3])
    assert scale[3] == 0, "padding stays padding"


@given(dim=st.integers(1, 40), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**64 - 1), first_row=st.integers(0, 2**40))
def test_bits_beyond_the_last_column_stay_0(dim: int, seed: int, step: int, first_row: int) -> None:
    (bits_a, scale_a), (bits_b, scale_b) = table(2, 4, dim), table(3, 4, dim)
    scale_b[1] *= -1
    bits, _ = reference.average(bits_a, scale_a, bits_b, scale_b, 0.5, dim, seed=seed, step=step, first_row=first_row)
    assert not np.unpackbits(bits, axis=1, bitorder="little")[:, dim:].any()
    assert not ((bits[0] ^ bits_a[0]) & ~(bits_a[0] ^ bits_b[0])).any(), "where a and b agree, so does their average"
    shard = reference.average(bits_a[2:], scale_a[2:], bits_b[2:], scale_b[2:], 0.5, dim, seed=seed, step=step, first_row=first_row + 2)
    assert np.array_equal(shard[0], bits[2:]), "a shard draws the numbers of its rows in the whole table"


def test_steps_seeds_and_updates_draw_their_own_numbers() -> None:
    zeros, ones, scale = np.zeros((1, 125), np.uint8), np.full((1, 125), 255, np.uint8), np.ones((1, 1), np.float32)

    def draw(seed: int, step: int) -> Any:
        bits, _ = reference.average(zeros, scale, ones, scale, 0.5, DIM, seed=seed, step=step)
        return np.unpackbits(bits[0], bitorder="little").astype(int)

    update = (reference.random16(3, 4, np.zeros(1, np.int64), DIM)[0] < 2**15).astype(int)
    for other in (draw(3, 5), draw(4, 4), update):
        assert abs(int((draw(3, 4) == other).sum()) - 500) < 80, "independent coins agree half of the time"


def test_bad_arguments() -> None:
    good = dict(zip(("bits_a", "scale_a", "bits_b", "scale_b"), (*table(0), *table(1)), strict=True)) | {"weight": 0.5, "dim": DIM}
    for error, match, changed in (
        (ValueError, "weight must be finite and between 0.0 and 1.0, got 1.5", {"weight": 1.5}),
        (ValueError, "same number of rows, got 5 and 4", dict(zip(("bits_b", "scale_b"), table(1, 4), strict=True))),
        (ValueError, "bits must have shape", {"dim": 7}),
        (ValueError, "first_row must be at least 0", {"first_row": -1}),
    ):
        with pytest.raises(error, match=match):
            reference.average(**(good | changed))


def test_the_default_step_depends_on_every_bit_and_its_place() -> None:
    rng = np.random.default_rng(1)
    a, b = ((rng.integers(0, 256, (9, 3), np.uint8), rng.random((9, 1), np.float32)) for _ in range(2))
    step = reference.average_step(*a, *b)
    seen = {step, reference.average_step(*b, *a)}
    for table in (0, 1):
        for which in (0, 1):
            for place in np.ndindex(9, (3, 1)[which]):
                tables = [[x.copy() for x in a], [x.copy() for x in b]]
                array = tables[table][which]
                array[place] = array[place] ^ 4 if which == 0 else np.nextafter(array[place], np.float32(2))
                seen.add(reference.average_step(*tables[0], *tables[1]))
    order = np.roll(np.arange(9), 1)
    seen.add(reference.average_step(a[0][order], a[1][order], *b))
    assert len(seen) == 2 + 2 * 9 * 4 + 1
    assert all(0 <= number < 2**32 for number in seen)


# ---- the native code -------------------------------------------------------------------------------------------------------------------


def context(seed: int, step: int, first_row: int, weight: float) -> Any:
    words = [word >> shift & 0xFFFFFFFF for word in (seed, step, first_row) for shift in (0, 32)]
    return np.concatenate([np.array(words, np.uint32), np.array([weight, 0], np.float32).view(np.uint32)])


@settings(max_examples=100, deadline=None)
@given(
    dim=st.one_of(st.integers(1, 40), st.sampled_from([127, 767])),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    first_row=st.integers(0, 2**40),
    weight=st.one_of(st.sampled_from([0.0, 1.0, 1e-3, 2.0**-20, 1e-40]), st.floats(0.0, 1.0, width=32)),
)
def test_native_equals_the_reference(dim: int, seed: int, step: int, first_row: int, weight: float) -> None:
    rng = np.random.default_rng(seed)
    bits_a, bits_b = (reference.pack(rng.normal(size=(7, dim))) for _ in range(2))
    scale_a, scale_b = (rng.choice([0.0, 0.3, -0.2, 1e-42, 3e38, np.inf, np.nan], (7, 1)).astype(np.float32) for _ in range(2))
    want = reference.average(bits_a, scale_a, bits_b, scale_b, weight, dim, seed=seed, step=step, first_row=first_row)
    words = context(seed, step, first_row, weight)
    bits, scale = np.full_like(bits_a, 255), np.full_like(scale_a, 7)
    _native.average(bits_a, scale_a, bits_b, scale_b, dim, words, bits, scale, threads=2)
    assert bits.tobytes() == want[0].tobytes()
    assert scale.tobytes() == want[1].tobytes()
    for into in ((bits_a.copy(), scale_a.copy(), bits_b, scale_b, 0), (bits_a, scale_a, bits_b.copy(), scale_b.copy(), 2)):
        *tables, at = into
        _native.average(*tables, dim, words, tables[at], tables[at + 1])
        assert tables[at].tobytes() == want[0].tobytes(), "in place"
        assert tables[at + 1].tobytes() == want[1].tobytes()


def test_native_refuses() -> None:
    tables, out = (*table(0), *table(1)), table(2)
    before = out[0].copy(), out[1].copy()
    for error, match, arguments in (
        (ValueError, "weight must be between 0 and 1, got 1.5", (*tables, DIM, context(0, 0, 0, 1.5), *out)),
        (ValueError, "weight must be between 0 and 1, got", (*tables, DIM, context(0, 0, 0, float("nan")), *out)),
        (
            ValueError,
            "the tables must have one shape, got 5 x 1000 of 1 planes and 4 x 1000",
            (*tables, DIM, context(0, 0, 0, 0.5), *table(2, 4)),
        ),
        (ValueError, r"bits_b must have shape \[V, planes \* 125\]", (*tables[:2], *table(1, 5, 9), DIM, context(0, 0, 0, 0.5), *out)),
        (ValueError, "context must have 8 words of 32 bits", (*tables, DIM, np.zeros(6, np.uint32), *out)),
    ):
        with pytest.raises(error, match=match):
            _native.average(*arguments)
    assert np.array_equal(out[0], before[0])
    assert np.array_equal(out[1], before[1])
