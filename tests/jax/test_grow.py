"""`grow`: more rows for a table that trains, and everything learned stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter, Sign

V, D, MORE = 30, 11, 47
IDS = jnp.array([[1, 2, 3], [2, 5, 29]])


def trained(table, rule, steps=4):
    tx, ids = dbj.xor(1.0, rule), IDS
    carry = (table, tx.init(table))

    @jax.jit
    def step(table, state):
        grads = dbj.grad(lambda table: jnp.sum(jnp.sin(table[ids])), ids=lambda _: ids)(table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    for _ in range(steps):
        carry = step(*carry)
    return carry, step, tx


@pytest.mark.parametrize("rule", [Sign(), Counter(8), Counter(2, every=3), Bop()], ids=str)
def test_old_rows_train_on_as_without(new_table, rule):
    """The same steps with and without new rows: equal bits, scales and state of the old rows, an open window included."""
    (table, state), step, tx = trained(new_table(V, D, padding_idx=0), rule)
    larger, larger_tables = dbj.grow(table, MORE, jax.random.key(1), state=state.tables)
    assert larger.shape == (MORE, D)
    fresh = tx.init(larger)
    grown = state._replace(tables=larger_tables)
    assert jax.tree.structure(grown) == jax.tree.structure(fresh)
    assert [x.shape for x in jax.tree.leaves(grown)] == [x.shape for x in jax.tree.leaves(fresh)]
    a, b = (table, state), (larger, grown)
    for _ in range(3):
        a, b = step(*a), step(*b)
    np.testing.assert_array_equal(b[0].bits[:V], a[0].bits)
    np.testing.assert_array_equal(b[0].scale[:V], a[0].scale)
    np.testing.assert_array_equal(b[0].bits[V:], larger.bits[V:])
    want, got = dbj.export_state({"emb": a[1].tables}), dbj.export_state({"emb": b[1].tables})
    for name, array in want["emb"].items():
        by_row = np.ndim(array) and not name.startswith("pending")
        np.testing.assert_array_equal(got["emb"][name][:V] if by_row else got["emb"][name], array)
        assert not by_row or not got["emb"][name][V:].any()


def test_new_rows_train(new_table):
    (table, state), _, tx = trained(new_table(V, D), Counter(2, every=2), steps=3)
    larger, tables = dbj.grow(table, MORE, jax.random.key(1), state=state.tables)
    ids = jnp.arange(V - 2, MORE)
    carry = (larger, state._replace(tables=tables))
    for _ in range(4):
        grads = dbj.grad(lambda table: jnp.sum(table[ids]), ids=lambda _: ids)(carry[0])
        updates, new_state = tx.update(grads, carry[1], carry[0])
        carry = optax.apply_updates(carry[0], updates), new_state
    assert (carry[0].bits[V:] != larger.bits[V:]).any(1).sum() > 10
    dbj.check_errors(carry[1])


def test_new_rows_are_like_the_others(new_table):
    table = new_table(V, D, padding_idx=3)
    larger = dbj.grow(table, 5000, jax.random.key(1))
    used = np.delete(np.asarray(table.scale), 3)
    np.testing.assert_allclose(larger.scale[V:], used.mean(), rtol=1e-6)
    signs = larger.dequantize()[V:] > 0
    np.testing.assert_allclose(signs.mean(0), 0.5, atol=0.04)
    assert not (np.asarray(larger.bits)[:, -1] >> D % 8).any(), "padding bits stay 0"
    near = dbj.BinaryTable.create(jax.random.key(0), 300, D, spread=0.1)
    pattern = near.dequantize().mean(0) > 0
    differ = (dbj.grow(near, 5000, jax.random.key(1), spread=0.1).dequantize()[300:] > 0) != pattern
    np.testing.assert_allclose(differ.mean(0), 0.1, atol=0.02)
    other = dbj.grow(table, 5000, jax.random.key(2))
    assert (other.bits != larger.bits).any()
    jitted = jax.jit(lambda table, key: dbj.grow(table, 5000, key))(table, jax.random.key(1))
    np.testing.assert_array_equal(jitted.bits, larger.bits)


def test_values_and_padding_only(new_table):
    table = new_table(V, D)
    values = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)
    larger = dbj.grow(table, V + 2, values=values)
    packed = dbj.BinaryTable.from_float(values)
    np.testing.assert_array_equal(larger.bits[V:], packed.bits)
    np.testing.assert_array_equal(larger.scale[V:], packed.scale)
    empty = dbj.BinaryTable(table.bits, jnp.zeros_like(table.scale), D)
    np.testing.assert_allclose(dbj.grow(empty, V + 1, jax.random.key(0)).scale[V:], 0.3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": V}, ValueError, "rows must be at least 31, got 30"),
        ({"key": None}, ValueError, "needs a key for random rows, or values, got neither"),
        ({"values": np.zeros((17, D), np.float32)}, ValueError, "or values, got both"),
        ({"key": None, "values": np.zeros((2, D), np.float32)}, ValueError, r"values must have shape \[17, 11\], got \[2, 11\]"),
        ({"key": None, "values": np.full((17, D), np.nan, np.float32)}, ValueError, "values of grow: "),
        ({"state": {}}, TypeError, "state must be a dualbin.jax.TableState, as in XorState.tables, got dict"),
        ({"spread": 0.7}, ValueError, "spread must be finite and between 0.0 and 0.5, got 0.7"),
        ({"table": jnp.zeros(3)}, TypeError, "table must be a dualbin.jax.BinaryTable"),
    ],
)
def test_what_is_refused(new_table, change, error, message):
    arguments = {"table": new_table(V, D), "rows": MORE, "key": jax.random.key(0)} | change
    with pytest.raises(error, match=message):
        dbj.grow(**arguments)
