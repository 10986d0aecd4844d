"""What a program may have done to floats before it calls: the rounding mode of the C library, the byte order of arrays, masks."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dualbin
from dualbin import io, reference, rules
from dualbin._float32 import nearest_float32

MODES = {"upward": 0x800, "downward": 0x400, "to zero": 0xC00}  # of x86
ROWS, DIM = 11, 13
RATE, RELATIVE, ETA = 0.1, 3e-3, 0.3  # no float32 is one of them
GENERATOR = np.random.default_rng(0)
FLOATS = GENERATOR.standard_normal((ROWS, DIM)).astype(np.float32)
GRADIENTS = [GENERATOR.standard_normal((ROWS, DIM)).astype(np.float32) for _ in range(4)]


@pytest.fixture(params=MODES)
def rounding(request: pytest.FixtureRequest) -> Iterator[Callable[[bool], None]]:
    """Switches another rounding mode on and off."""
    if sys.platform != "linux" or not hasattr(ctypes, "CDLL") or "x86" not in __import__("platform").machine():
        pytest.skip("the numbers of the modes are those of Linux on x86")
    library = ctypes.CDLL("libm.so.6")

    def switch(on: bool) -> None:
        assert library.fesetround(MODES[request.param] if on else 0) == 0

    yield switch
    switch(False)


@settings(max_examples=2000, deadline=None)
@given(st.floats(min_value=-3.4e38, max_value=3.4e38))
def test_nearest_float32_is_the_cast(x: float) -> None:
    with np.errstate(under="ignore"):
        cast = float(np.float32(x))
    assert nearest_float32(x) == cast
    assert np.signbit(nearest_float32(x)) == np.signbit(cast)


def test_nearest_float32_in_the_middle() -> None:
    for x in (1 + 2**-24, 1 + 3 * 2**-24, 2.0**-150, 3 * 2.0**-150, 2.0**-149 * 1.5, float("inf"), 0.0, -0.0):
        with np.errstate(under="ignore"):
            assert nearest_float32(x) == float(np.float32(x))


def run_torch(rule: rules.Rule) -> list[Any]:
    torch = pytest.importorskip("torch")
    import dualbin.torch as dbt

    table = torch.nn.Parameter(dbt.BinaryTable.from_float(torch.from_numpy(FLOATS)))
    optimizer = dbt.XOR([table], lr=RATE, rule=rule, scale_lr=RELATIVE)
    for gradient in GRADIENTS:
        table.grad = dbt.RowGrad(torch.arange(ROWS), torch.from_numpy(gradient), (ROWS, DIM))
        optimizer.step()
    mixed = dbt.average(table, dbt.BinaryTable.from_float(torch.from_numpy(GRADIENTS[0])), RATE, step=3)
    state = optimizer.export_state({"t": table})["t"]
    made = dbt.BinaryEmbedding(ROWS, DIM, scale=ETA).weight
    return [table.bits.numpy(), table.scale.detach().numpy(), *state.values(), mixed.scale.numpy(), mixed.bits.numpy(), made.scale.numpy()]


def run_jax(rule: rules.Rule) -> list[Any]:
    jax = pytest.importorskip("jax")
    import dualbin.jax as dbj

    table = dbj.BinaryTable.from_float(FLOATS)
    state = dbj.init_state(table, rule, RELATIVE)
    for gradient in GRADIENTS:
        table, state = dbj.xor_update(table, np.arange(ROWS), gradient, state, learning_rate=RATE, rule=rule, scale_lr=RELATIVE)
    mixed = dbj.average(table, dbj.BinaryTable.from_float(GRADIENTS[0]), RATE, step=3)
    made = dbj.BinaryTable.create(jax.random.key(0), ROWS, DIM, scale=ETA)
    arrays = [table.bits, table.scale, *state.arrays.values(), mixed.bits, mixed.scale, made.scale]
    return [np.asarray(array) for array in arrays]


@pytest.mark.parametrize("run", [run_torch, run_jax])
@pytest.mark.parametrize("rule", [rules.Counter(8, eta=ETA, dead_zone=0.1), rules.Bop(gamma=RATE, tau=0.1)])
def test_the_rounding_mode_changes_no_bit(rounding: Any, run: Callable[[rules.Rule], list[Any]], rule: rules.Rule) -> None:
    want = run(rule)
    if run is run_torch:
        from dualbin.torch import _native_call

        _native_call.native_rule.cache_clear()
    rounding(True)
    try:
        got = run(rule)
    finally:
        rounding(False)
    for one, other in zip(got, want, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("planes", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_packing_under_another_rounding_mode(rounding: Any, planes: int, dtype: Any) -> None:
    w = FLOATS.astype(dtype)
    want = dualbin.pack(w, planes), dualbin.row_scale(w, planes)
    rounding(True)
    try:
        got = dualbin.pack(w, planes), dualbin.row_scale(w, planes)
    finally:
        rounding(False)
    for one, other in zip(got, want, strict=True):
        assert one.tobytes() == other.tobytes()


def unaligned(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


UNUSUAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "another byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "by columns": np.asfortranarray,
    "backwards": lambda x: x[::-1].copy()[::-1],
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "unaligned": unaligned,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "a record array": lambda x: x.view(np.recarray),
}


@pytest.mark.parametrize("form", UNUSUAL)
@pytest.mark.parametrize("planes", [1, 3])
def test_unusual_arrays_are_their_values(form: str, planes: int) -> None:
    make = UNUSUAL[form]
    for dtype in (np.float16, np.float32, np.float64):
        w = FLOATS.astype(dtype)
        assert (dualbin.pack(make(w), planes) == dualbin.pack(w, planes)).all()
        assert (dualbin.row_scale(make(w), planes) == dualbin.row_scale(w, planes)).all()
    bits = dualbin.pack(FLOATS, planes)
    assert (dualbin.unpack(make(bits), DIM, planes) == reference.unpack(bits, DIM, planes)).all()


@pytest.mark.parametrize("form", UNUSUAL)
def test_unusual_arrays_in_jax_and_files(form: str, tmp_path: Any) -> None:
    pytest.importorskip("jax")
    import dualbin.jax as dbj

    make = UNUSUAL[form]
    want = dbj.BinaryTable.from_float(FLOATS)
    bits, scale, ids = (np.asarray(x) for x in (want.bits, want.scale, np.array([[3, 0, 10]])))
    tables = [dbj.BinaryTable.from_float(make(FLOATS)), dbj.BinaryTable(make(bits), make(scale), DIM)]
    io.save(tmp_path / "table", {"t": io.Table(make(bits), make(scale), DIM)})
    tables.append(dbj.BinaryTable(*io.load(tmp_path / "table")[0]["t"]))
    for table in tables:
        assert (np.asarray(table.bits) == bits).all()
        assert (np.asarray(table.scale) == scale).all()
    assert (np.asarray(dbj.lookup(want, make(ids))) == np.asarray(dbj.lookup(want, ids))).all()


def test_a_masked_array_is_refused(tmp_path: Any) -> None:
    masked = np.ma.array(FLOATS, mask=FLOATS > 0)
    bits, scale = dualbin.pack(FLOATS), dualbin.row_scale(FLOATS)
    with pytest.raises(TypeError, match=r"w must not be a masked array, whose mask would be lost: give w\.filled\(value\)"):
        dualbin.pack(masked)
    with pytest.raises(TypeError, match="bits must not be a masked array"):
        dualbin.unpack(np.ma.array(bits), DIM)
    with pytest.raises(TypeError, match=r"tables\['t'\].scale must not be a masked array"):
        io.save(tmp_path / "table", {"t": io.Table(bits, np.ma.array(scale), DIM)})


def test_a_masked_array_is_refused_by_jax() -> None:
    pytest.importorskip("jax")
    import dualbin.jax as dbj

    table = dbj.BinaryTable.from_float(FLOATS)
    with pytest.raises(TypeError, match="w must not be a masked array"):
        dbj.BinaryTable.from_float(np.ma.array(FLOATS))
    with pytest.raises(TypeError, match="scale must not be a masked array"):
        dbj.BinaryTable(np.asarray(table.bits), np.ma.array(np.asarray(table.scale)), DIM)
    with pytest.raises(TypeError, match="ids must not be a masked array"):
        dbj.lookup(table, np.ma.array([1, 2]))
