"""What tables over several ranks exchange, against the reference, bit for bit: routes, and rows as they travel."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dualbin import _native, reference
from parity.operations import Native, NativeCuda

BACKENDS = [pytest.param(Native, id="native"), pytest.param(NativeCuda, id="native-cuda", marks=pytest.mark.cuda)]
THREADS = 2
#: name -> (rows, ids)
BATCHES: dict[str, tuple[int, Any]] = {
    "none": (10, lambda rng: rng.integers(0, 10, 0)),
    "one": (1, lambda _: np.zeros(1)),
    "bad": (10, lambda _: np.array([-1, 10, 12, -(2**31), 2**31 - 1])),
    "few": (11, lambda rng: rng.integers(-2, 14, 40)),
    "hot": (5_000, lambda rng: np.where(rng.random(3_000) < 0.7, 2_999, rng.integers(0, 5_000, 3_000))),
    "many": (1_000_003, lambda rng: rng.integers(0, 1_000_003, 70_001)),
    "first rank": (1_000_003, lambda rng: rng.integers(0, 100, 500)),
    "last rank": (1_000_003, lambda rng: rng.integers(1_000_000, 1_000_003, 500)),
    "wide": (2**33 + 5, lambda rng: rng.integers(0, 2**33 + 5, 999)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("capacity", [0, 1, 7, 20_000])
@pytest.mark.parametrize("name", BATCHES)
def test_route(name: str, capacity: int, world: int, backend: Any) -> None:
    rows, draw = BATCHES[name]
    rng = np.random.default_rng(world)
    place = object.__new__(backend)
    share = -(-rows // world)
    for ids_dtype, local_dtype in itertools.product((np.int32, np.int64), repeat=2):
        ids = draw(rng).astype(ids_dtype)
        if max(rows, share) > 2**31 - 1 and np.int32 in {ids_dtype, local_dtype}:
            continue
        spare = 4 if capacity else 0
        shapes = (world * capacity if capacity else min(len(ids), rows), len(ids), world + 1)
        out = [place.put(np.full(n, 7, t)) for n, t in zip(shapes, (local_dtype, ids_dtype, np.int64), strict=True)]
        before = np.concatenate([[5, -3, 2], rng.integers(0, 9, world)]) if capacity else None
        missed = None if before is None else place.put(before)
        size = _native.workspace_bytes("reduce_rows", -1 if backend is Native else 0, THREADS, len(ids), rows, 1)
        workspace = place.put(np.zeros(size, np.uint8))
        _native.route(place.put(ids), rows, share, capacity, spare, *out, missed, workspace, THREADS)
        wanted = reference.route(ids, rows, share, world, capacity, spare, before)
        for got, want in zip(map(place.get, out), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
        if missed is not None:
            np.testing.assert_array_equal(place.get(missed), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 3, 4, 8, 13, 96, 100, 512])
@pytest.mark.parametrize("ids_dtype", ["int32", "int64"])
@pytest.mark.parametrize("count", [0, 1, 33, 3_000])
def test_rows_that_travel(count: int, ids_dtype: str, width: int, backend: Any) -> None:
    rng = np.random.default_rng(count)
    place = object.__new__(backend)
    bits, scale = rng.integers(0, 256, (4_000, width), np.uint8), rng.normal(size=(4_000, 1)).astype(np.float32)
    scale[7] = -0.0
    ids = rng.permutation(4_100)[:count].astype(ids_dtype) - 50
    packed = place.put(np.full((count, width + 4), 7, np.uint8))
    _native.take_rows(place.put(bits), place.put(scale), place.put(ids), packed, THREADS)
    want = reference.take_rows(bits, scale, ids)
    np.testing.assert_array_equal(place.get(packed), want)
    for places in (ids, None):
        rows = count if places is None else 4_000
        mine = [np.full((rows, width), 9, np.uint8), np.full((rows, 1), 3.0, np.float32)]
        out = [place.put(x) for x in mine]
        _native.put_rows(packed, *out, None if places is None else place.put(places), THREADS)
        reference.put_rows(want, *mine, places)
        for got, wanted in zip(map(place.get, out), mine, strict=True):
            np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 7, 128, 260])
@pytest.mark.parametrize("divisor", [1, 2, 7])
def test_slot_means(divisor: int, dim: int, out_dtype: str, dtype: str, backend: Any) -> None:
    rng = np.random.default_rng(dim)
    place = object.__new__(backend)
    kinds = [np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name) for name in (dtype, out_dtype)]
    for segments, draw in ((1, rng.integers(0, 1, 3)), (50, rng.integers(-2, 55, 900)), (50, np.zeros(0, np.int64)), (9, np.full(700, 4))):
        slots = draw.astype(rng.choice(["int32", "int64"]))
        dy = rng.standard_normal((len(slots), dim), np.float32).astype(kinds[0])
        out = place.put(np.full((segments, dim), 7, kinds[1]))
        size = _native.workspace_bytes("segment_sum", -1 if backend is Native else 0, THREADS, len(slots), segments, dim)
        _native.slot_means(place.put(slots), place.put(dy), divisor, out, place.put(np.zeros(size, np.uint8)), THREADS)
        want = reference.slot_means(slots, dy, segments, divisor, kinds[1])
        bits = np.uint32 if out_dtype == "float32" else np.uint16
        np.testing.assert_array_equal(place.get(out).view(bits), want.view(bits))
