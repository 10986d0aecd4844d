"""Ids of every integer dtype mean the rows they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualbin.jax as dbj
from dualbin.rules import Sign

V, D = 300, 11
NARROW = ["uint8", "int8", "uint16", "int16", "uint32", "int32"]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_every_dtype_names_the_same_rows(new_table, dtype, wrap):
    table = new_table(V, D)
    state = dbj.init_state(table, Sign(), 0)
    names = np.array([[1, 2, 3], [2, 5, 127]], np.int32)
    want, want_bags = table[names], dbj.lookup_bag(table, names.reshape(-1), [0, 0, 1, 1, 2, 2], 3)
    plain = dbj.grad(lambda table: jnp.sum(jnp.sin(table[names])))(table)
    look_up = wrap(lambda table, ids: table[ids])
    bags = wrap(lambda table, ids, segments: dbj.lookup_bag(table, ids.reshape(-1), segments, 3))
    gradient = wrap(dbj.grad(lambda table, ids: jnp.sum(jnp.sin(table[ids])), ids=lambda _, ids: ids))
    update = wrap(lambda table, ids, dy: dbj.xor_update(table, ids, dy, state, rule=Sign(), scale_lr=0))
    for library in (np, jnp):
        ids = library.asarray(names, dtype)
        np.testing.assert_array_equal(look_up(table, ids), want)
        np.testing.assert_array_equal(bags(table, ids, library.asarray([0, 0, 1, 1, 2, 2], dtype)), want_bags)
        grads = gradient(table, ids)
        np.testing.assert_array_equal(grads.ids, plain.ids)
        np.testing.assert_array_equal(grads.rows, plain.rows)
        changed, _ = update(table, ids, want)
        assert set(np.flatnonzero((changed.bits != table.bits).any(1))) == {1, 2, 3, 5, 127}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_large_unsigned_ids_are_not_negative_ones(new_table, wrap, on_gpu):
    """2**32 - 1 in int32 would be -1, and 2**31 a negative number: both are outside the table and in nobody's gradient."""
    table = new_table(V, D)
    for big in (2**32 - 1, 2**31):
        ids = jnp.array([1, big], jnp.uint32)
        if on_gpu:
            assert jnp.isnan(wrap(lambda table, ids: table[ids])(table, ids)[1]).all()
        else:
            with pytest.raises((IndexError, jax.errors.JaxRuntimeError), match=r"300"):
                jax.block_until_ready(wrap(lambda table, ids: table[ids])(table, ids))
        active = wrap(dbj.activate)(table, ids)
        assert active.row_ids.tolist() == [1, V, V]


def test_wide_ids_of_numpy(new_table):
    table = new_table(V, D)
    for dtype in (np.uint64, np.int64):
        np.testing.assert_array_equal(table[np.array([1, 2], dtype)], table[[1, 2]])
        with pytest.raises(IndexError, match=r"ids must be in \[0, 300\), got 4294967297"):
            table[np.array([1, 2**32 + 1], dtype)]


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), jnp.array([1 + 0j]), ["a"], jax.random.key(0)])
def test_what_is_no_integer(new_table, ids):
    with pytest.raises(TypeError, match="ids must be integers, got"):
        new_table(V, D)[ids]
