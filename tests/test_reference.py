"""The reference against values worked out by hand, against float arithmetic, and against the formulas of the rules in expectation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualbin import reference, rules

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FINITE)


def test_pack_by_hand() -> None:
    w = np.array([[1, -1, 0.0, -0.0, -1, -1, -1, 2, 3], [-1] * 9], np.float32)
    assert reference.pack(w).tolist() == [[0b10001101, 1], [0, 0]]
    assert reference.unpack(reference.pack(w), 9)[0].tolist() == [1, -1, 1, 1, -1, -1, -1, 1, 1]
    assert reference.row_scale(np.array([[3.0, -1.0], [0.0, 0.0]])).tolist() == [[2.0], [np.float32(1e-4)]]


@given(MATRICES)
def test_pack_round_trip(w: Any) -> None:
    bits = reference.pack(w)
    signs = reference.unpack(bits, w.shape[1])
    assert np.array_equal(signs > 0, w >= 0)
    assert np.array_equal(reference.pack(signs.astype(np.float32)), bits)
    spare = 8 * bits.shape[1] - w.shape[1]
    assert not (bits[:, -1] >> (8 - spare)).any()


@given(MATRICES)
def test_row_scale_is_the_mean_magnitude(w: Any) -> None:
    want = np.abs(w.astype(np.float64)).mean(axis=1)
    np.testing.assert_allclose(reference.row_scale(w)[:, 0], np.maximum(want, 1e-4), rtol=1e-7)


@given(st.data(), st.integers(1, 50), st.integers(1, 9))
def test_row_gradient_equals_a_dense_sum(data: Any, n: int, dim: int) -> None:
    ids = data.draw(hnp.arrays(np.int64, n, elements=st.integers(-2, 12)))
    dy = data.draw(hnp.arrays(np.float32, (n, dim), elements=st.floats(-1e3, 1e3, width=32)))
    rows, sums = reference.row_gradient(ids, dy, 10)
    dense = np.zeros((10, dim))
    valid = (ids >= 0) & (ids < 10)
    np.add.at(dense, ids[valid], dy[valid].astype(np.float64))
    assert rows.tolist() == sorted(set(ids[valid].tolist()))
    np.testing.assert_allclose(sums, dense[rows], atol=1e-2, rtol=1e-5)
    assert np.array_equal(reference.segment_sum(ids, dy, 10)[rows], sums)


def test_row_gradient_order() -> None:
    """1e8 and then 64 small ones in one block are lost; the next block survives."""
    dy = np.array([[1e8]] + [[1.0]] * 63 + [[1.0]] * 64, np.float32)
    _, sums = reference.row_gradient(np.zeros(128, np.int64), dy, 1)
    assert sums[0, 0] == np.float32(1e8) + np.float32(64.0)
    _, sums = reference.row_gradient(np.zeros(1, np.int64), np.array([[-0.0]], np.float32), 1)
    assert not np.signbit(sums[0, 0])


@given(MATRICES)
def test_scale_gradient_equals_a_dense_sum(g: Any) -> None:
    w = np.where(np.random.default_rng(0).random(g.shape) < 0.5, -1.0, 1.0)
    bits = reference.pack(w)
    want = (w * g.astype(np.float64)).sum(axis=1)
    bound = np.abs(g).max(axis=1).astype(np.float64) * g.shape[1] * 2.0**-14
    assert (np.abs(reference.scale_gradient(bits, g, g.shape[1]) - want) <= bound + 1e-40).all()


def test_random_bits_are_uniform_and_depend_on_every_word() -> None:
    rows = np.arange(400, dtype=np.int64)
    u = reference.random16(5, 7, rows, 63)
    assert u.shape == (400, 63)
    assert abs(u.mean() / 65535 - 0.5) < 0.005
    assert abs((u / 65535).var() * 12 - 1) < 0.02
    counts = np.bincount(u.ravel() >> 12, minlength=16)
    assert (np.abs(counts - counts.mean()) < 6 * np.sqrt(counts.mean())).all()
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.03
    for other in ((6, 7, rows), (5 + (1 << 32), 7, rows), (5, 8, rows), (5, 7 + (1 << 32), rows), (5, 7, rows + (1 << 32))):
        assert abs(np.corrcoef(u.ravel(), reference.random16(*other, 63).ravel())[0, 1]) < 0.03
    assert np.array_equal(reference.random16(5, 7, rows[::-1], 63)[::-1], u), "the order of rows must not matter"


def test_row_gradient_adds_in_the_documented_order() -> None:
    """Against loops: ascending positions in blocks of 64, each from +0.0, then the blocks."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(700) < 0.6, 3, rng.integers(0, 6, 700))
    dy = (rng.normal(size=(700, 5)) * 10.0 ** rng.integers(-3, 4, (700, 1))).astype(np.float32)
    unique, sums = reference.row_gradient(ids, dy, 6)
    for row, got in zip(unique, sums, strict=True):
        positions = np.flatnonzero(ids == row)
        total = np.zeros(5, np.float32)
        for start in range(0, len(positions), 64):
            block = np.zeros(5, np.float32)
            for position in positions[start : start + 64]:
                block = block + dy[position]
            total = total + block
        assert np.array_equal(got, total)
    assert not np.array_equal(sums, reference.row_gradient(ids[::-1], dy[::-1], 6)[1]), "another order would show"


def train(rule: rules.Rule, g: Any, *, steps: int = 1, lr: float = 1.0, scale_lr: float = 0.0) -> tuple[Any, Any, dict[str, Any]]:
    """`steps` updates of rows of ones by the same gradient [V, D]."""
    rows, dim = g.shape
    bits, scale = reference.pack(np.ones(g.shape, np.float32)), np.full((rows, 1), 0.5, np.float32)
    state = reference.init_state(rule, rows, dim, scale_lr=scale_lr)
    for _ in range(steps):
        reference.update(bits, scale, state, np.arange(rows), g, rule=rule, dim=dim, lr=lr, scale_lr=scale_lr)
    return bits, scale, state


@pytest.mark.parametrize("bits", range(2, 9))
def test_counter_moves_by_lr_eta_evidence_on_average(bits: int) -> None:
    rng = np.random.default_rng(bits)
    g = -np.abs(rng.normal(size=(3000, 20))).astype(np.float32)  # against a flip: the counter rises by lr * eta * max(|g|/rms - zone, 0)
    rule = rules.Counter(bits, eta=0.3, dead_zone=0.5)
    _, _, state = train(rule, g, lr=0.5)
    level = reference.read_planes(state["counter"], 20)
    rms = np.sqrt((g.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    want = 0.5 * 0.3 * np.maximum(np.abs(g) / rms - 0.5, 0)
    got = level.mean()
    assert abs(got - want.mean()) < 5 * np.sqrt(want.mean() / g.size)
    assert level.max() == 1


def test_counter_falls_flips_and_comes_back() -> None:
    g = np.ones((1, 8), np.float32)
    rule = rules.Counter(4, eta=3.0, dead_zone=0.0)
    bits, _, state = train(rule, -g)
    assert reference.read_planes(state["counter"], 8).tolist() == [[3] * 8]
    assert bits.tolist() == [[255]]
    bits, _, state = train(rule, g)  # 0 - 3 = -3: flip, level 2
    assert bits.tolist() == [[0]]
    assert reference.read_planes(state["counter"], 8).tolist() == [[2] * 8]
    bits, _, state = train(rule, g, steps=9)
    assert reference.read_planes(state["counter"], 8).tolist() == [[7] * 8], "clipped at 2**(bits-1) - 1"


def test_one_bit_flips_with_probability_lr_eta_evidence() -> None:
    g = np.ones((4000, 16), np.float32)
    bits, _, state = train(rules.Counter(1, eta=0.6, dead_zone=0.5), g, lr=0.5)
    share = 1 - np.unpackbits(bits).mean()
    assert abs(share - 0.5 * 0.6 * 0.5) < 5 * np.sqrt(0.15 / g.size)
    assert set(state) == {"step"}


def test_one_bit_flips_at_most_with_probability_lr() -> None:
    g = np.ones((4000, 16), np.float32)
    bits, _, _ = train(rules.Counter(1, eta=1000.0, dead_zone=0.5), g, lr=0.25)
    assert abs(1 - np.unpackbits(bits).mean() - 0.25) < 5 * np.sqrt(0.1875 / g.size)


def test_zone_growth_is_that_of_the_largest_normal_number() -> None:
    n = np.array([1, 2, 3, 10, 1000, 10**6, 2**31 - 1], np.int32)
    for anneal in (0.25, 1.0, 4.0, 1000.0):
        want = np.sqrt(2 * np.log1p(n / anneal))
        assert np.abs(reference.zone_growth(int(anneal * 256), n) / 256 - want).max() < 0.02
    assert reference.zone_growth(256, np.zeros(1, np.int32)).tolist() == [0]


def test_a_dead_zone_grows_with_the_updates_of_its_row() -> None:
    rng = np.random.default_rng(0)
    rule = rules.Counter(1, eta=1000.0, dead_zone=0.0, anneal=1.0)
    bits, scale = np.zeros((50, 125), np.uint8), np.ones((50, 1), np.float32)
    state = reference.init_state(rule, 50, 1000, scale_lr=0)
    assert set(state) == {"count", "step"}
    shares = []
    for _ in range(4):
        g = rng.normal(size=(50, 1000)).astype(np.float32)
        shares.append(reference.update(bits, scale, state, np.arange(50), g, rule=rule, dim=1000, scale_lr=0).flips / g.size)
    want = [0.5 * (1 - math.erf(np.sqrt(np.log1p(n)))) for n in (1, 2, 3, 4)]  # the upper tail beyond sqrt(2 ln(1 + n))
    np.testing.assert_allclose(shares, want, rtol=0.05)


def test_centred_evidence_ignores_what_the_scale_can_learn() -> None:
    w = np.ones((1, 8), np.float32)
    g = np.array([[4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 6.0]], np.float32)  # every bit disagrees; the last one more than the others
    plain, _, _ = train(rules.Counter(1, eta=1000.0, dead_zone=0.0), g)
    centred, _, _ = train(rules.Counter(1, eta=1000.0, dead_zone=0.0, center=True), g)
    assert plain.tolist() == [[0]]
    assert centred.tolist() == [[127]]
    q, _ = reference.quantise(g)
    e = reference.evidence(q, w.astype(np.int8), center=True)
    assert abs(int(e.sum())) < 8
    assert np.array_equal(reference.evidence(q, -w.astype(np.int8), center=True), -e), "rounding does not prefer a sign"


def test_tuned_values_belong_together() -> None:
    tuned = rules.COUNTER_DEFAULTS[2, 1, "rms"]
    assert rules.resolve(rules.Counter(2), 1, 16) == rules.Counter(2, *tuned[:2], anneal=tuned.anneal, center=tuned.center, norm="rms")
    own = rules.resolve(rules.Counter(2, dead_zone=0.5), 1, 16)
    assert (own.anneal, own.center) == (0.0, False), "a dead zone of the user's own is the whole dead zone"
    assert rules.resolve(rules.Counter(2, dead_zone=0.5, anneal=3.0), 1, 16).counts_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((rules.Counter(8), np.array(1), 4), r"planes must be an integer, got array\(1\) of type ndarray"),
        ((rules.Counter(8), 1, [4]), r"dim must be an integer, got \[4\] of type list"),
        (([8], 1, 4), "rule must be a dualbin.rules.Counter, Bop or Sign, got list"),
    ],
)
def test_arguments_of_resolve_that_have_no_hash(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rules.resolve(*arguments)
    assert rules.resolve(rules.Counter(8), np.int64(2), np.int32(4)) == rules.resolve(rules.Counter(8), 2, 4)


def test_bop_averages_then_flips() -> None:
    g = np.full((1, 4), 2.0, np.float32)
    bits, _, state = train(rules.Bop(gamma=0.25, tau=0.9), g)
    assert state["ema"].tolist() == [[1.0] * 4], "a running mean at first: rate 1"
    assert bits.tolist() == [[0]]
    rule = rules.Bop(gamma=0.25, tau=0.9)
    state = reference.init_state(rule, 1, 4, scale_lr=0)
    bits, scale = np.array([[15]], np.uint8), np.ones((1, 1), np.float32)
    for value in (1.0, -1.0, 1.0, -1.0, 1.0):
        reference.update(bits, scale, state, np.zeros(1, np.int64), value * g, rule=rule, dim=4, scale_lr=0)
    ema = 0.0
    for n, value in enumerate((1.0, -1.0, 1.0, -1.0, 1.0), start=1):
        ema += max(0.25, 1 / n) * (value - ema)
    np.testing.assert_allclose(state["ema"], ema, rtol=1e-6)


def test_sign_flips_where_weight_and_gradient_agree() -> None:
    bits, _, _ = train(rules.Sign(), np.array([[1.0, -1.0, 0.0, 1e-30]], np.float32))
    assert bits.tolist() == [[0b0110]]


def test_negative_scale_turns_evidence_round() -> None:
    for scale_value, want in ((1.0, 0), (-1.0, 15)):
        bits, scale = np.array([[15]], np.uint8), np.full((1, 1), scale_value, np.float32)
        reference.update(bits, scale, {"step": 0}, np.zeros(1, np.int64), np.ones((1, 4), np.float32), rule=rules.Sign(), dim=4, scale_lr=0)
        assert bits.tolist() == [[want]]


def test_scale_follows_adam() -> None:
    rng = np.random.default_rng(0)
    rule, lr, scale_lr = rules.Counter(8, eta=0.0), 0.5, 0.01
    bits, scale = reference.pack(rng.normal(size=(1, 30))), np.full((1, 1), 0.3, np.float32)
    state = reference.init_state(rule, 1, 30, scale_lr=scale_lr)
    w, s, m, v = reference.unpack(bits, 30), 0.3, 0.0, 0.0
    for n in range(1, 40):
        g = rng.normal(size=(1, 30)).astype(np.float32)
        reference.update(bits, scale, state, np.zeros(1, np.int64), g, rule=rule, dim=30, lr=lr, scale_lr=scale_lr)
        grad = float((w * g).sum())
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
        s -= lr * scale_lr * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.99**n)) + 1e-12)
    np.testing.assert_allclose(scale[0, 0], s, rtol=1e-4)  # the gradient is summed in 1/2**15 of the row's largest
    assert state["count"].tolist() == [39]


def test_scale_stays_positive() -> None:
    _, scale, _ = train(rules.Sign(), np.ones((1, 3), np.float32), steps=50, scale_lr=10.0)
    assert scale[0, 0] >= np.float32(1e-4)


def test_rows_that_are_left_alone() -> None:
    rule = rules.Counter(8)
    bits, scale = reference.pack(np.ones((4, 8), np.float32)), np.array([[1.0], [0.0], [1.0], [np.inf]], np.float32)
    before = bits.copy(), scale.copy()
    state = reference.init_state(rule, 4, 8)
    dy = np.ones((3, 8), np.float32)
    dy[1, 3] = np.nan
    stats = reference.update(bits, scale, state, np.array([1, 2, 3]), dy, rule=rule, dim=8)
    assert stats == (0, 0, 2, 0)
    assert np.array_equal(bits, before[0])
    assert np.array_equal(scale, before[1])
    assert not state["counter"].any()
    assert state["step"] == 1


def test_step_counts_steps_with_a_gradient() -> None:
    rule = rules.Counter(8)
    bits, scale = reference.pack(np.ones((2, 8), np.float32)), np.ones((2, 1), np.float32)
    state = reference.init_state(rule, 2, 8)
    for ids in ([], [5, -1], [0], [1, 1]):
        reference.update(bits, scale, state, np.array(ids, np.int64), np.ones((len(ids), 8), np.float32), rule=rule, dim=8)
    assert state["step"] == 2


@given(st.integers(1, 5), st.integers(0, 2**63 - 1))
@settings(max_examples=20)
def test_every_is_one_update_by_the_sum(every: int, seed: int) -> None:
    rng = np.random.default_rng(seed % 2**32)
    g = rng.normal(size=(every, 5, 9)).astype(np.float32)
    ids = rng.integers(0, 6, (every, 5))
    outcome = []
    for rule in (rules.Counter(3, every=every), rules.Counter(3)):
        bits, scale = reference.pack(np.ones((6, 9), np.float32)), np.ones((6, 1), np.float32)
        state = reference.init_state(rule, 6, 9)
        if rule.every > 1 or every == 1:
            for k in range(every):
                reference.update(bits, scale, state, ids[k], g[k], rule=rule, dim=9, seed=seed)
        else:
            parts = [reference.row_gradient(ids[k], g[k], 6) for k in range(every)]
            rows, sums = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
            reference.update(bits, scale, state, rows, sums, rule=rule, dim=9, seed=seed)
        outcome.append((bits, scale, state["counter"], state["step"]))
    assert all(np.array_equal(a, b) for a, b in zip(*outcome, strict=True))


@pytest.mark.parametrize("rule", [rules.Counter(3), rules.Counter(1), rules.Bop()])
def test_shards_become_the_rows_of_the_whole_table(rule: Any) -> None:
    """Three ranges of rows, each updated by its part of the gradient and the row where it starts, are the whole table after it."""
    rng = np.random.default_rng(0)
    w, ids, dy = rng.normal(size=(10, 21)).astype(np.float32), rng.integers(0, 10, 40), rng.normal(size=(40, 21)).astype(np.float32)
    whole = (reference.pack(w), reference.row_scale(w), reference.init_state(rule, 10, 21))
    parts = [(whole[0][a:b].copy(), whole[1][a:b].copy(), reference.init_state(rule, b - a, 21)) for a, b in ((0, 4), (4, 8), (8, 10))]
    for _ in range(5):
        reference.update(*whole, ids, dy, rule=rule, dim=21, seed=3)
        for first, part in zip((0, 4, 8), parts, strict=True):
            reference.update(*part, ids - first, dy, rule=rule, dim=21, seed=3, first_row=first)  # others are padding
    assert np.array_equal(np.concatenate([p[0] for p in parts]), whole[0])
    assert np.array_equal(np.concatenate([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: reference.pack(np.array([[np.nan]])), ValueError, "row 0, column 0"),
        (lambda: reference.pack(np.array([[1]])), TypeError, "w must be a float array"),
        (lambda: reference.pack(np.zeros((0, 3))), ValueError, "V and D at least 1"),
        (lambda: reference.pack(np.zeros((3, 0))), ValueError, "V and D at least 1"),
        (lambda: reference.unpack(np.zeros((1, 1), np.uint8), 9), ValueError, r"\[V, 2\] for dim 9"),
        (lambda: reference.unpack(np.zeros((1, 1), np.int8), 8), TypeError, "bits must be uint8"),
        (lambda: reference.lookup(np.zeros((1, 1), np.uint8), np.ones((1, 1), np.float32), [1], 8), IndexError, "id 1 at position 0"),
        (lambda: reference.lookup(np.zeros((1, 1), np.uint8), np.ones((1, 1), np.float32), [0.5], 8), TypeError, "ids must be"),
        (lambda: reference.lookup(np.zeros((1, 1), np.uint8), np.ones((1, 1)), [0], 8), TypeError, "scale must be float32"),
        (lambda: rules.Counter(9), ValueError, "bits must be between 1 and 8, got 9"),
        (lambda: rules.Counter(2.0), TypeError, "bits must be an integer"),
        (lambda: rules.Counter(2, eta=-1), ValueError, "eta must be finite and between 0.0"),
        (lambda: rules.Counter(2, dead_zone=float("nan")), ValueError, "dead_zone must be finite"),
        (lambda: rules.Counter(2, anneal=-1.0), ValueError, "anneal must be finite and between 0.0"),
        (lambda: rules.Counter(2, center=0.5), TypeError, "center must be True or False, got 0.5"),
        (lambda: rules.Bop(gamma="x"), TypeError, "gamma must be a number"),
        (lambda: rules.Sign(every=0), ValueError, "every must be at least 1"),
        (lambda: rules.check_rule("counter"), TypeError, "rule must be a dualbin.rules"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
