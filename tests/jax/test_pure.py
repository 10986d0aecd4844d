"""The path in jax.numpy, forced: the same bits as the native library where no row occurs in more than one order of summation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin
import dualbin.jax as dbj
from dualbin import reference
from dualbin.jax import _ffi
from dualbin.rules import Bop, Counter, Sign

V, D = 40, 19


@pytest.fixture(scope="module", autouse=True)
def pure():
    """No native handlers on this platform, and nothing compiled from when there were: once, since all has to be compiled anew after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ffi, "register", tuple)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture
def exact(on_gpu):
    if on_gpu:
        pytest.skip("XLA contracts multiply-adds on a GPU, so bits may differ there")


def test_is_reported():
    fallback = f"jax: no native handlers for the platform {jax.default_backend()!r}: tables run in jax.numpy there"
    assert fallback in dualbin.backends()["fallbacks"]


def test_lookup(new_table):
    table = new_table(V, D, padding_idx=4)
    ids = np.arange(40).reshape(5, 8)
    for dtype in (jnp.float32, jnp.bfloat16):
        want = reference.lookup(table.bits, table.scale, ids, D, dtype)
        assert np.asarray(dbj.lookup(table, ids, dtype)).tobytes() == want.tobytes()
    bad = jax.jit(dbj.lookup)(table, jnp.array([3, V, -1]))
    assert np.isnan(bad).all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("rule", [Counter(8), Bop(), Sign()], ids=str)
def test_optax_matches_reference(new_table, exact, rule):
    tx = dbj.xor(0.7, rule, seed=2**40 + 9)

    @jax.jit
    def step(table, state, ids, dy):
        order = jnp.argsort(ids)
        grads = dbj.RowGrad(jnp.append(ids[order], V), jnp.pad(dy[order], ((0, 1), (0, 0))))
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    check(new_table(V, D, padding_idx=4), tx.init, step, rule)


@pytest.mark.parametrize("norm", ["rms", "adagrad"])
@pytest.mark.parametrize(("planes", "bits"), [(1, 8), (2, 2), (3, 5), (8, 8)])
def test_updates_of_planes_match_reference(exact, planes, bits, norm):
    rule = Counter(bits, norm=norm)
    step = jax.jit(lambda table, state, ids, dy: dbj.xor_update(table, ids, dy, state, learning_rate=0.7, rule=rule, seed=2**40 + 9))
    check(planes_table(planes), lambda table: dbj.init_state(table, rule), step, rule)


@pytest.mark.parametrize("rule", [Counter(1), Counter(2, every=2), Counter(4, dead_zone=0.25, anneal=2.0, center=True)], ids=str)
def test_direct_updates_match_reference(new_table, exact, rule):
    step = jax.jit(lambda table, state, ids, dy: dbj.xor_update(table, ids, dy, state, learning_rate=0.7, rule=rule, seed=2**40 + 9))
    check(new_table(V, D, padding_idx=4), lambda table: dbj.init_state(table, rule), step, rule)


def check(table, init, step, rule):
    """Five steps, without repeated ids, of gradients of every magnitude and one that is not finite."""
    bits, scale, planes = np.array(table.bits), np.array(table.scale), table.planes
    want, state = reference.init_state(rule, V, D, planes=planes), init(table)
    rng = np.random.default_rng(0)
    for number in range(5):
        ids = rng.permutation(V)[:20].astype(np.int32)
        dy = (rng.normal(size=(20, D)) * 10.0 ** rng.integers(-14, 15, (20, 1))).astype(np.float32)
        if number == 2:
            dy[3, 2] = np.inf
        stats = reference.update(bits, scale, want, ids, dy, rule=rule, dim=D, planes=planes, lr=0.7, seed=2**40 + 9)
        table, state = step(table, state, ids, dy)
        np.testing.assert_array_equal(table.bits, bits)
        np.testing.assert_array_equal(table.scale, scale)
        assert list(dbj.read_stats(state)[""].values()) == list(stats)
        exported = dbj.export_state(state)[""]
        for name, value in want.items():
            # XLA may contract the multiply-add of the moving average
            np.testing.assert_allclose(exported[name], value, rtol=0, atol=1e-6 if name == "ema" else 0, err_msg=name)


def planes_table(planes):
    return dbj.BinaryTable.from_float(np.random.default_rng(0).normal(size=(V, D)).astype(np.float32), 4, planes)


@pytest.mark.parametrize("planes", [2, 5])
def test_planes(exact, planes):
    table, ids = planes_table(planes), np.arange(40).reshape(5, 8)
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        want = reference.lookup(table.bits, table.scale, ids, D, dtype, planes)
        assert np.asarray(dbj.lookup(table, ids, dtype)).tobytes() == want.tobytes()
    other = dbj.BinaryTable.from_float(-np.asarray(table.dequantize()), planes=planes)
    bits, scale = reference.average(table.bits, table.scale, other.bits, other.scale, 0.3, D, planes, seed=3, step=2)
    got = dbj.average(table, other, 0.3, seed=3, step=2)
    np.testing.assert_array_equal(got.bits, bits)
    np.testing.assert_array_equal(got.scale, scale)
    segments, weights = np.sort(ids.reshape(-1) % 6), np.linspace(-1, 1, 40, dtype=np.float32)
    order = np.argsort(ids.reshape(-1) % 6, kind="stable")
    offsets = np.searchsorted(segments, np.arange(7))

    def bags(weights):
        return dbj.lookup_bag(table, ids.reshape(-1)[order], segments, 6, weights=weights)

    want = reference.lookup_bag(table.bits, table.scale, ids.reshape(-1)[order], offsets, D, "sum", weights, planes=planes)
    np.testing.assert_allclose(bags(weights), want, rtol=1e-6, atol=1e-6)
    dy = np.random.default_rng(1).normal(size=(6, D)).astype(np.float32)
    slopes = jax.vjp(bags, jnp.asarray(weights))[1](jnp.asarray(dy))[0]
    want = reference.bag_weight_gradient(table.bits, table.scale, ids.reshape(-1)[order], offsets, dy, D, planes=planes)
    np.testing.assert_array_equal(slopes, want)


def test_gradient(new_table, dense):
    table, ids = new_table(V, D), np.random.default_rng(0).integers(0, 10, (6, 5))
    grads = jax.jit(dbj.grad(lambda table: jnp.sum(jnp.sin(table[ids]))))(table)
    want = jax.grad(lambda w: jnp.sum(jnp.sin(w[ids])))(table.dequantize())
    np.testing.assert_allclose(dense(grads, V), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "majority"])
def test_bags(new_table, mode):
    table = new_table(V, D, padding_idx=4)
    ids, segments = np.arange(36) + 2, np.sort(np.random.default_rng(0).integers(-1, 7, 36))
    offsets = np.searchsorted(segments, np.arange(7))
    want = reference.lookup_bag(table.bits, table.scale, ids, offsets, D, mode)
    np.testing.assert_allclose(dbj.lookup_bag(table, ids, segments, 6, mode), want, rtol=1e-6, atol=1e-6)
