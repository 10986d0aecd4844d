"""Tables of several planes in the reference: levels by hand, the scale of least error against a search, fewer planes, training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualbin import reference, rules

PLANES = range(1, 9)
MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


def values(bits: Any, scale: Any, dim: int, planes: int) -> Any:
    return scale.astype(np.float64) * reference.weights(bits, dim, planes)


def test_planes_by_hand() -> None:
    """Three planes: the levels of a row with scale 4 are +-1, 3, 5, 7; sign plane first, then the magnitude, most significant bit first."""
    bits = np.array([[0b0101, 0b1100, 0b1010]], np.uint8)
    assert reference.unpack(bits, 4, 3).tolist() == [[1, -3, 5, -7]]
    assert reference.unpack(bits, 4, 3).dtype == np.int16
    y = reference.lookup(bits, np.array([[4.0]], np.float32), np.array([0]), 4, planes=3)
    assert y.tolist() == [[1.0, -3.0, 5.0, -7.0]]


def test_two_planes_are_side_by_side() -> None:
    bits = reference.pack(np.array([[1.0, 3.0, -1.0, -3.0, 3.0, 3.0, 3.0, 3.0, 1.0]], np.float32), 2)
    assert bits.tolist() == [[0b11110011, 1, 0b11111010, 0]]
    assert reference.row_scale(np.array([[1.0, 3.0]], np.float32), 2).tolist() == [[2.0]]


@given(MATRICES, st.integers(1, 8))
def test_levels_survive_packing(w: Any, planes: int) -> None:
    dim = w.shape[1]
    bits = reference.pack(w, planes)
    assert bits.shape == (len(w), planes * -(-dim // 8))
    levels = reference.unpack(bits, dim, planes)
    assert np.array_equal(levels > 0, w >= 0)
    assert np.array_equal(reference.write_planes(reference.read_planes(bits, dim), planes), bits)
    if dim % 8:
        assert not (bits.reshape(len(w), planes, -1)[:, :, -1] >> dim % 8).any(), "padding bits of every plane"
    scale = reference.row_scale(w, planes)
    top = scale[:, 0].astype(np.float64) * (2.0**planes - 1) / 2.0 ** (planes - 1)
    error = np.abs(values(bits, scale, dim, planes) - w)
    inside = np.abs(w) <= top[:, None]
    step = scale.astype(np.float64) / 2.0 ** (planes - 1)
    assert (error <= np.where(inside, step * (1 + 1e-6), np.abs(w) - top[:, None] + step * 1e-6)).all(), "the nearest level"


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform"])
def test_scale_has_the_least_error(planes: int, kind: str) -> None:
    w = getattr(np.random.default_rng(planes), kind)(*((-1, 1) if kind == "uniform" else (0, 1)), size=(60, 128)).astype(np.float32)
    scale = reference.row_scale(w, planes)
    error = ((values(reference.pack(w, planes), scale, 128, planes) - w) ** 2).sum(axis=1)
    best = np.full(len(w), np.inf)
    for factor in np.linspace(0.2, 3.0, 400):
        s = scale.astype(np.float64) * factor
        m = np.minimum(np.floor(np.abs(w) * 2.0 ** (planes - 2) / s), 2 ** (planes - 1) - 1)
        best = np.minimum(best, ((np.abs(w) - s * (2 * m + 1) / 2.0 ** (planes - 1)) ** 2).sum(axis=1))
    assert (error <= best * 1.6).all()
    assert error.sum() <= best.sum() * (1.02 if planes < 5 else 1.12), "with many planes a lucky scale beats any search by a few percent"


@pytest.mark.parametrize("planes", PLANES)
def test_small_and_zero_rows(planes: int) -> None:
    w = np.array([[0.0] * 9, [1e-7] * 9, [-3e-38] * 9], np.float32)
    assert (reference.row_scale(w, planes) == np.float32(1e-4)).all()
    assert (np.abs(reference.unpack(reference.pack(w, planes), 9, planes)) == 1).all()


@given(MATRICES, st.integers(1, 8), st.data())
def test_fewer_planes(w: Any, planes: int, data: Any) -> None:
    fewer = data.draw(st.integers(1, planes))
    dim = w.shape[1]
    bits, scale = reference.pack(w, planes), reference.row_scale(w, planes)
    scale[0] = 0.0
    top, same = reference.with_planes(bits, scale, dim, planes, fewer, rescale=False)
    assert np.array_equal(same, scale)
    assert np.array_equal(reference.read_planes(top, dim), reference.read_planes(bits, dim) >> (planes - fewer))
    again, new = reference.with_planes(bits, scale, dim, planes, fewer)
    assert np.array_equal(top, again)
    assert new[0, 0] == 0
    want, levels = values(bits, scale, dim, planes)[1:], reference.weights(top, dim, fewer)[1:].astype(np.float64)
    best = (want * levels).sum(axis=1) / (levels * levels).sum(axis=1)
    np.testing.assert_allclose(new[1:, 0], np.maximum(best, 1e-4), rtol=1e-6)


def train(rule: rules.Rule, planes: int, steps: int = 300) -> tuple[float, float]:
    """Squared error of a table that is trained towards random rows, over that of rows that are quantised."""
    rng = np.random.default_rng(planes)
    target = rng.normal(size=(30, 64)).astype(np.float32) * np.float32(0.3)
    w = rng.normal(size=target.shape).astype(np.float32) * np.float32(0.3)
    bits, scale, ids = reference.pack(w, planes), reference.row_scale(w, planes), np.arange(30)
    state = reference.init_state(rule, 30, 64, planes=planes)
    for step in range(steps):
        g = reference.lookup(bits, scale, ids, 64, planes=planes) - target
        reference.update(bits, scale, state, ids, g, rule=rule, dim=64, planes=planes, lr=1 - step / steps)
    packed = values(reference.pack(target, planes), reference.row_scale(target, planes), 64, planes)
    return float(((values(bits, scale, 64, planes) - target) ** 2).mean()), float(((packed - target) ** 2).mean())


@pytest.mark.parametrize(
    ("bits", "planes", "norm"), [(8, 2, "rms"), (8, 4, "adagrad"), (8, 8, "rms"), (6, 4, "adagrad"), (4, 4, "adagrad")]
)
def test_more_planes_come_nearer(bits: int, planes: int, norm: str) -> None:
    trained, _ = train(rules.Counter(bits, norm=norm), planes)
    one_plane, _ = train(rules.Counter(8, norm="rms"), 1)
    assert trained < one_plane / 2


def test_the_state_holds_the_planes_below() -> None:
    assert reference.init_state(rules.Counter(8), 3, 9, planes=2)["counter"].shape == (3, 6 * 2)
    assert "counter" not in reference.init_state(rules.Counter(4), 3, 9, planes=4)
    assert "squares" in reference.init_state(rules.Counter(8, norm="adagrad"), 3, 9, scale_lr=0)
    assert set(reference.init_state(rules.Counter(8, norm="rms"), 3, 9, scale_lr=0)) == {"counter", "step"}


def test_planes_share_one_integer() -> None:
    """A table of k planes and b bits moves as one of one plane and b bits, of which more is read: with a frozen scale and one gradient."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(5, 20)).astype(np.float32)
    rule = rules.Counter(8, eta=20.0, dead_zone=0.0, norm="rms")
    outcome = []
    for planes in (1, 3, 8):
        bits, scale = np.zeros((5, planes * 3), np.uint8), np.ones((5, 1), np.float32)
        bits[:, :3] = reference.pack(rng.normal(size=(5, 20)) * 0 + 1)
        state = reference.init_state(rule, 5, 20, planes=planes, scale_lr=0)
        for _ in range(4):
            reference.update(bits, scale, state, np.arange(5), g, rule=rule, dim=20, planes=planes, scale_lr=0, seed=1)
        outcome.append(np.concatenate([bits, state.get("counter", bits[:, :0])], axis=1))
    assert np.array_equal(outcome[0], outcome[1])
    assert np.array_equal(outcome[0], outcome[2])


def test_adagrad_divides_by_all_gradients_so_far() -> None:
    g = np.full((1, 8), -2.0, np.float32)  # against a flip
    rule = rules.Counter(8, eta=8.0, dead_zone=0.0, norm="adagrad")
    bits, scale = np.full((1, 1), 255, np.uint8), np.ones((1, 1), np.float32)
    state = reference.init_state(rule, 1, 8, scale_lr=0)
    seen = []
    for _ in range(16):
        reference.update(bits, scale, state, np.zeros(1, np.int64), g, rule=rule, dim=8, scale_lr=0)
        seen.append(reference.read_planes(state["counter"], 8).mean())
    want = np.cumsum(8.0 / np.sqrt(np.arange(1, 17)))
    assert np.abs(np.array(seen) - want).max() < 1.5
    assert state["squares"].tolist() == [64.0]
    reference.update(bits, scale, state, np.zeros(1, np.int64), 0 * g, rule=rule, dim=8, scale_lr=0)
    assert state["squares"].tolist() == [64.0], "a row of zeros leaves it alone"


def test_tiny_gradients_are_divided_by_their_rms() -> None:
    """Their squares are lost in float32: the quotient by the rms of the update is the bound."""
    rule = rules.Counter(8, eta=1.0, dead_zone=0.0, norm="adagrad")
    bits, scale = np.full((1, 1), 255, np.uint8), np.ones((1, 1), np.float32)
    state = reference.init_state(rule, 1, 8, scale_lr=0)
    reference.update(bits, scale, state, np.zeros(1, np.int64), np.full((1, 8), -1e-30, np.float32), rule=rule, dim=8, scale_lr=0)
    assert state["squares"].tolist() == [0.0]
    assert reference.read_planes(state["counter"], 8).max() == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rules.resolve(rules.Counter(4), 5, 16), "got 4 bits for a table of 5 planes"),
        (lambda: rules.resolve(rules.Bop(), 2, 16), "must be a Counter for a table of 2 planes"),
        (lambda: rules.resolve(rules.Sign(), 2, 16), "must be a Counter for a table of 2 planes"),
        (lambda: rules.resolve(rules.Counter(8, center=True), 2, 16), "center must be False"),
        (lambda: rules.Counter(8, norm="l2"), "norm must be one of 'rms', 'adagrad' or None, got 'l2'"),
        (lambda: reference.with_planes(np.zeros((1, 2), np.uint8), np.ones((1, 1), np.float32), 8, 2, 3), "between 1 and 2, got 3"),
        (lambda: reference.pack(np.ones((1, 8)), 9), "planes must be between 1 and 8, got 9"),
        (lambda: reference.pack(np.full((1, 8), np.inf), 2), "w must be finite"),
        (lambda: reference.unpack(np.zeros((1, 1), np.uint8), 8, 2), r"shape \[V, 2\] for dim 8 and 2 planes"),
    ],
)
def test_bad_input(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("planes", [True, 1.0])
def test_a_number_that_equals_an_integer_is_none(planes: Any) -> None:
    assert rules.resolve(rules.Counter(8), 1, 16)  # kept, and True == 1
    with pytest.raises(TypeError, match="planes must be an integer"):
        rules.resolve(rules.Counter(8), planes, 16)
