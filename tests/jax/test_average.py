"""`average`: the mean of two tables, in expectation where signs differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualbin.jax as dbj
from dualbin import reference
from dualbin.jax import _ffi

V, D = 40, 19


@pytest.fixture
def tables(new_table):
    a, b = new_table(V, D, seed=1, padding_idx=3), new_table(V, D, seed=2, padding_idx=4)
    negative = b.scale.at[::5].multiply(-1.0)
    return a, dbj.BinaryTable(b.bits, negative, D)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1e-3, 1.0])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_it_is_the_reference(tables, weight, wrap):
    a, b = tables
    seed, step = 2**40 + 7, 12
    got = wrap(lambda a, b, weight, step: dbj.average(a, b, weight, seed=seed, step=step))(a, b, weight, step)
    bits, scale = reference.average(*(np.asarray(x) for x in (a.bits, a.scale, b.bits, b.scale)), weight, D, seed=seed, step=step)
    np.testing.assert_array_equal(got.bits, bits)
    assert np.asarray(got.scale).tobytes() == scale.tobytes()
    assert (got.dim, got.axis) == (D, None)


def test_an_average_over_steps_comes_near_the_weights(new_table):
    """An exponential average of tables that differ in a twentieth of their signs keeps the signs on which they agree."""
    start = new_table(500, 64)
    flips = jax.random.bernoulli(jax.random.key(0), 0.05, (50, 500, 64))

    @jax.jit
    def average_all(start, flips):
        def step(carry, flip):
            ema, count = carry
            table = dbj.BinaryTable(start.bits ^ jnp.packbits(flip, axis=-1, bitorder="little"), start.scale, 64)
            return (dbj.average(ema, table, 0.1, step=count), count + 1), None

        return jax.lax.scan(step, (start, jnp.zeros((), jnp.int32)), flips)[0][0]

    ema = average_all(start, flips)
    differ = float(jnp.mean((ema.dequantize() > 0) != (start.dequantize() > 0)))
    assert 0.02 < differ < 0.08, "a weight is at times that of the start and at times that of a later table"
    np.testing.assert_allclose(ema.scale, start.scale, rtol=1e-5)


def test_equal_steps_choose_equal_weights(tables):
    a, b = tables
    first, again, other = (dbj.average(a, b, 0.5, step=step) for step in (1, 1, 2))
    np.testing.assert_array_equal(first.bits, again.bits)
    assert (first.bits != other.bits).any()


def test_shards(tables, make_mesh):
    """Random numbers belong to rows of the whole table, so a sharded average is that of one device."""
    mesh = make_mesh("rows")
    a, b = tables
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    want = dbj.average(a, b, 0.3, step=5)
    got = jax.jit(lambda a, b: dbj.average(a, b, 0.3, step=5))(*jax.device_put((a, b), rows))
    np.testing.assert_array_equal(got.bits, want.bits)
    np.testing.assert_array_equal(got.scale, want.scale)
    assert got.bits.sharding.is_equivalent_to(rows, 2)


def test_trees(tables):
    """Trees of parameters: tables by `average`, other leaves by their mean."""
    a, b = tables
    got = dbj.average({"emb": a, "w": jnp.zeros(3)}, {"emb": b, "w": jnp.ones(3)}, 0.25, step=9)
    np.testing.assert_allclose(got["w"], 0.25)
    np.testing.assert_array_equal(got["emb"].bits, dbj.average(a, b, 0.25, step=9).bits)


def test_what_is_refused(tables, new_table):
    a, b = tables
    with pytest.raises(ValueError, match=r"weight must be finite and between 0.0 and 1.0, got 2.0"):
        dbj.average(a, b, 2.0)
    with pytest.raises(ValueError, match=r"a and b must have the same shape, got \[40, 19\] and \[41, 19\]"):
        dbj.average(a, new_table(V + 1, D), 0.5)
    with pytest.raises(TypeError, match=r"b must be a dualbin\.jax\.BinaryTable, got"):
        dbj.average(a, b.bits, 0.5)


def test_without_a_step_the_contents_choose(tables):
    """A loop that forgets the step still gets other random numbers once anything has changed."""
    a, b = tables
    first, again = dbj.average(a, b, 0.5), jax.jit(dbj.average)(a, b, 0.5)
    np.testing.assert_array_equal(first.bits, again.bits)
    arrays = [np.asarray(x) for x in (a.bits, a.scale, b.bits, b.scale)]
    np.testing.assert_array_equal(first.bits, reference.average(*arrays, 0.5, D, step=reference.average_step(*arrays))[0])
    other = dbj.average(a, dbj.BinaryTable(b.bits.at[7, 0].set(b.bits[7, 0] ^ 1), b.scale, D), 0.5)
    assert (other.bits != first.bits)[np.arange(V) != 7].any()


def test_without_native_handlers(tables, monkeypatch):
    a, b = tables
    want = dbj.average(a, b, 0.3, step=5)
    monkeypatch.setattr(_ffi, "register", tuple)
    jax.clear_caches()
    got = dbj.average(a, b, 0.3, step=5)
    jax.clear_caches()
    np.testing.assert_array_equal(got.bits, want.bits)
    assert np.asarray(got.scale).tobytes() == np.asarray(want.scale).tobytes()
