"""Bag lookup: the reference against float64 and values worked out by hand, the native code against the reference, bit for bit."""

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

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MODES = [*BAG_MODES, "weighted"]


def make_table(rng: Any, rows: int, dim: int) -> tuple[Any, Any]:
    """Packed rows, and scales of many magnitudes: some negative, some 0, sums that overflow in float16 and in float32."""
    scale = rng.choice([0.0, 1.0, -0.3, 1e-40, 7e4, 2e38], size=(rows, 1)) * rng.uniform(0.5, 1.5, (rows, 1))
    return reference.pack(rng.normal(size=(rows, dim))), scale.astype(np.float32)


class CpuMemory:
    def put(self, array: Any) -> Any:
        return array

    def get(self, memory: Any, like: Any) -> Any:
        return memory.reshape(like.shape)


class CudaMemory:
    """Device memory that torch provides."""

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")

    def put(self, array: Any) -> Any:
        if str(array.dtype) == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16).copy()).cuda().view(self.torch.bfloat16)
        return self.torch.from_numpy(array.copy()).cuda()

    def get(self, memory: Any, like: Any) -> Any:
        if str(like.dtype) == "bfloat16":
            memory = memory.view(self.torch.int16)
        return memory.cpu().numpy().view(like.dtype)


def native_bag(
    memory: Any, bits: Any, scale: Any, ids: Any, offsets: Any, dim: int, mode: str, weights: Any = None, dtype: str = "float32"
) -> Any:
    want = np.full((len(offsets) - 1, dim), 7, DTYPES[dtype])
    bits, scale, ids, offsets, out = (memory.put(x) for x in (bits, scale, ids, offsets, want))
    weights = None if weights is None else memory.put(weights)
    _native.lookup_bag(bits, scale, dim, ids, offsets, weights, mode, out, threads=2)
    return memory.get(out, want)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def memory(request: pytest.FixtureRequest) -> Any:
    return CpuMemory() if request.param == "cpu" else CudaMemory()


def compare(memory: Any, rng: Any, dim: int, sizes: list[int], mode: str, dtype: str, ids_type: Any = np.int64) -> None:
    bits, scale = make_table(rng, 30, dim)
    left, right = rng.integers(0, 3, 2)  # ids outside every bag, of which some do not exist
    offsets = (left + np.concatenate([[0], np.cumsum(sizes)])).astype(ids_type)
    inside = rng.integers(0, rng.choice([2, 30]), int(offsets[-1] - left))
    ids = np.concatenate([np.full(left, -1), inside, np.full(right, 30)]).astype(ids_type)
    weights = None
    if mode == "weighted":
        mode, weights = "sum", (rng.normal(size=len(ids)) * rng.choice([1.0, 1e-30], len(ids))).astype(np.float32)
    want = reference.lookup_bag(bits, scale, ids, offsets, dim, mode, weights, DTYPES[dtype])
    got = native_bag(memory, bits, scale, ids, offsets, dim, mode, weights, dtype)
    assert (want.dtype, want.shape) == (got.dtype, got.shape)
    assert want.tobytes() == got.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 511, 512, 521])),
    sizes=st.lists(st.one_of(st.just(0), st.integers(1, 6), st.sampled_from([63, 64, 65, 129])), max_size=6),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(list(DTYPES)),
    ids_type=st.sampled_from([np.int32, np.int64]),
)
def test_native_equals_the_reference(seed: int, dim: int, sizes: list[int], mode: str, dtype: str, ids_type: Any) -> None:
    compare(CpuMemory(), np.random.default_rng(seed), dim, sizes, mode, dtype, ids_type)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_mode_and_type(memory: Any, mode: str, dtype: str) -> None:
    for dim in (1, 9, 64, 1025):
        compare(memory, np.random.default_rng(dim), dim, [0, 1, 2, 200, 0, 64, 65], mode, dtype)


@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from(MODES))
def test_the_reference_sums_rows(seed: int, mode: str) -> None:
    """Against float64 and against lookup; padding rows do not count."""
    rng = np.random.default_rng(seed)
    bits, scale = reference.pack(rng.normal(size=(9, 13))), rng.uniform(0.1, 1.0, (9, 1)).astype(np.float32)
    scale[4] = 0
    ids, weights = rng.integers(0, 9, 20), rng.normal(size=20).astype(np.float32)
    offsets = np.sort(rng.integers(0, 21, 6))
    name = "sum" if mode == "weighted" else mode
    got = reference.lookup_bag(bits, scale, ids, offsets, 13, name, weights if mode == "weighted" else None)
    for g, (a, b) in enumerate(pairwise(offsets)):
        rows = reference.lookup(bits, scale, ids[a:b], 13).astype(np.float64)
        count = int((ids[a:b] != 4).sum())
        if mode == "majority":
            want = np.where(np.sign(rows).sum(axis=0) >= 0, 1.0, -1.0) * (count > 0)
        else:
            factor = weights[a:b, None] if mode == "weighted" else 1.0
            want = (rows * factor).sum(axis=0) / (max(count, 1) if mode == "mean" else 1)
        np.testing.assert_allclose(got[g], want, rtol=1e-5, atol=1e-5)


def test_by_hand(memory: Any) -> None:
    bits = np.array([[0b011], [0b101], [0b111]], np.uint8)
    scale = np.array([[1.0], [0.5], [0.0]], np.float32)  # row 2 is padding
    ids, offsets = np.array([0, 1, 2, 2, 1]), np.array([0, 2, 4, 4, 5])
    want = {
        "sum": [[1.5, 0.5, -0.5], [0, 0, 0], [0, 0, 0], [0.5, -0.5, 0.5]],
        "mean": [[0.75, 0.25, -0.25], [0, 0, 0], [0, 0, 0], [0.5, -0.5, 0.5]],
        "majority": [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, -1, 1]],  # a tie counts as +1; without voters there is no majority
    }
    for mode in BAG_MODES:
        assert native_bag(memory, bits, scale, ids, offsets, 3, mode).tolist() == want[mode]
    weights = np.array([2.0, 1.0, np.inf, 5.0, -4.0], np.float32)  # a padding row adds nothing, whatever its weight
    got = native_bag(memory, bits, scale, ids, offsets, 3, "sum", weights)
    assert got.tolist() == [[2.5, 1.5, -1.5], [0, 0, 0], [0, 0, 0], [-2, 2, -2]]


def test_order_of_summation(memory: Any) -> None:
    """2**25 and then 63 ones in one block are lost; those of the next block survive as one sum."""
    bits, scale = np.array([[1], [1]], np.uint8), np.array([[2.0**25], [1.0]], np.float32)
    ids = np.array([0] + [1] * 127)
    assert native_bag(memory, bits, scale, ids, np.array([0, 128]), 1, "sum").tolist() == [[2.0**25 + 64]]


def test_bad_arguments_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    bits, scale = make_table(rng, 5, 10)
    ids = np.array([1, 5, 2])

    def both(error: type[Exception], match: str, offsets: list[int], mode: str = "sum", weights: Any = None) -> None:
        for function in (reference.lookup_bag, lambda *args: native_bag(CpuMemory(), *args)):
            with pytest.raises(error, match=match):
                function(bits, scale, ids, np.array(offsets), 10, mode, weights)

    both(IndexError, r"id 5 at position 1 is outside \[0, 5\)", [0, 1, 3])
    both(ValueError, "offsets must ascend .* 3 ids, got 4 at position 1", [0, 4])
    both(ValueError, "offsets must ascend .* got -1 at position 0", [-1, 1])
    both(ValueError, "offsets must ascend .* got 1 at position 2", [0, 2, 1])
    both(ValueError, "weights", [0, 1], "mean", np.ones(3, np.float32))
    assert native_bag(CpuMemory(), bits, scale, ids, np.array([2, 3]), 10, "sum").shape == (1, 10), "an id outside every bag is not read"


def test_bad_arguments_of_the_reference() -> None:
    bits, scale = make_table(np.random.default_rng(0), 5, 10)
    ids, offsets = np.array([1, 2]), np.array([0, 2])
    for error, match, changed in (
        (ValueError, "mode must be one of", {"mode": "max"}),
        (TypeError, "weights must be float32", {"weights": np.ones(2)}),
        (ValueError, r"weights must have shape \[2\]", {"weights": np.ones(3, np.float32)}),
        (TypeError, "ids must be int32 or int64", {"ids": np.ones(2)}),
        (ValueError, "ids must have 1 dimension", {"ids": np.ones((2, 1), int)}),
        (TypeError, "offsets must be int32 or int64", {"offsets": np.array([0.0, 2.0])}),
        (ValueError, "offsets must have one element more", {"offsets": np.zeros(0, int)}),
    ):
        with pytest.raises(error, match=match):
            reference.lookup_bag(**({"bits": bits, "scale": scale, "ids": ids, "offsets": offsets, "dim": 10} | changed))


@pytest.mark.cuda
def test_bad_arguments_on_cuda() -> None:
    memory = CudaMemory()
    _native.take_errors()
    bits, scale = np.array([[1], [0]], np.uint8), np.ones((2, 1), np.float32)
    ids, offsets = np.array([0, 2, 1, -1]), np.array([0, 1, 2, 3, 9, 4])  # good, bad id, good, past the end, descending
    for mode in BAG_MODES:
        got = native_bag(memory, bits, scale, ids, offsets, 3, mode)
        assert np.isnan(got).all(axis=1).tolist() == [False, True, False, True, True]
        count, first = _native.take_errors()[0]
        assert count == 3
        assert first in (2, 9, 4)


@pytest.mark.parametrize("mode", MODES)
def test_xla_target_on_the_cpu(mode: str) -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("dualbin.jax._ffi").register()
    rng = np.random.default_rng(3)
    bits, scale = make_table(rng, 30, 100)
    ids, offsets = rng.integers(0, 30, 90).astype(np.int32), np.array([1, 1, 70, 74, 90], np.int32)
    weights = rng.normal(size=90).astype(np.float32) if mode == "weighted" else None
    name = "sum" if mode == "weighted" else mode

    def call(ids: Any, dtype: Any, bad_ids: int) -> Any:
        attrs = {"dim": np.int64(100), "mode": np.int32(BAG_MODES.index(name)), "bad_ids": np.int32(bad_ids), "padding_idx": np.int64(-1)}
        factors = () if weights is None else (weights,)
        attrs["given"] = np.int32(len(factors))
        target = jax.ffi.ffi_call("dualbin_lookup_bag", jax.ShapeDtypeStruct((4, 100), dtype))
        return np.asarray(jax.jit(lambda *operands: target(*operands, **attrs))(bits, scale, ids, offsets, *factors))

    want = reference.lookup_bag(bits, scale, ids, offsets, 100, name, weights, ml_dtypes.bfloat16)
    assert call(ids, ml_dtypes.bfloat16, 0).tobytes() == want.tobytes()
    without_row_0 = scale.copy()
    without_row_0[0] = 0
    bad = np.where(ids == 0, 30, ids)
    assert (bad[1:] == 30).any()
    with pytest.raises(jax.errors.JaxRuntimeError, match="id 30 at position"):
        call(bad, np.float32, 0)
    want = reference.lookup_bag(bits, without_row_0, ids, offsets, 100, name, weights)
    assert call(bad, np.float32, 1).tobytes() == want.tobytes()
