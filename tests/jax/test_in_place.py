"""A donated table keeps its buffers: over steps, inside a scan over steps, after bad input; and what a step reports about itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import dualbin.jax as dbj
from dualbin import rules

V, D, STEPS = 5000, 60, 100
RULES = [rules.Counter(8), rules.Counter(2, every=3), rules.Bop(), rules.Sign()]


def loss(params, ids):
    return jnp.mean((jnp.tanh(params["emb"][ids] @ params["w"]) - 1.0) ** 2)


def start(rule):
    params = {"emb": dbj.BinaryTable.create(jax.random.key(0), V, D), "w": jnp.full((D, 8), 0.1)}
    table = dbj.xor(1.0, rule, pending_rows=900 if rule.every > 1 else None)
    tx = optax.partition({"dense": optax.adam(1e-2), "table": table}, dbj.param_labels)
    return tx, params, tx.init(params)


def make_step(tx, checked=False):
    def step(carry, ids):
        params, state = carry
        value, grads = dbj.value_and_grad(loss, ids=lambda _, ids: {"emb": ids}, checked=checked)(params, ids)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return step


def large(carry):
    """The arrays with an entry for every row. The moving average of Bop is float32 [V, D] by definition."""
    return [leaf for leaf in jax.tree.leaves(carry) if leaf.size >= V]


def pointers(carry):
    return [leaf.unsafe_buffer_pointer() for leaf in large(carry)]


def batches(steps=STEPS):
    return jnp.asarray(np.random.default_rng(1).integers(0, 300, (steps, 64)), jnp.int32)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scan_over_steps(rule):
    """A hundred steps in one call: no copy of the table in the compiled program, no float table, the buffers it began with."""
    tx, params, state = start(rule)
    train = jax.jit(lambda carry, ids: lax.scan(make_step(tx), carry, ids), donate_argnums=0)
    carry = jax.tree.map(jnp.array, (params, state))
    before, bits = pointers(carry), np.array(params["emb"].bits)
    text = train.lower(carry, batches()).compile().as_text()
    assert not [line for line in text.splitlines() if f"[{V}," in line and " copy" in line]
    assert f"f32[{V},{D}]" not in text or isinstance(rule, rules.Bop)
    carry, losses = train(carry, batches())
    assert pointers(carry) == before
    assert losses[-1] < losses[0]
    changed = np.nonzero((np.asarray(carry[0]["emb"].bits) != bits).any(1))[0]
    assert 0 < len(changed) <= 300
    assert changed.max() < 300


def test_without_donation_the_old_table_stays():
    tx, params, state = start(rules.Sign())
    bits = np.array(params["emb"].bits)
    (after, _), _ = jax.jit(make_step(tx))((params, state), batches()[0])
    np.testing.assert_array_equal(params["emb"].bits, bits)
    assert (after["emb"].bits != bits).any()


# ---- errors ------------------------------------------------------------------------------------------------------------------------------


def test_errors_before_the_call_donate_nothing():
    tx, params, state = start(rules.Counter(8))
    step = jax.jit(make_step(tx), donate_argnums=0)
    other = dbj.xor(1.0, rules.Counter(3)).init({"emb": params["emb"]})
    with pytest.raises(TypeError, match="ids must be integers, got float32"):
        step((params, state), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"counter must be"):
        jax.jit(dbj.xor(1.0).update, donate_argnums=1)({"emb": row_grad()}, other, {"emb": params["emb"]})
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state, other)))
    (params, _), _ = step((params, state), batches()[0])
    assert not params["emb"].bits.is_deleted()


def row_grad():
    return dbj.RowGrad(jnp.array([1, V], jnp.int32), jnp.ones((2, D)), V)


def test_an_error_inside_the_call_takes_the_donated_table(on_gpu):
    """The rule of JAX that docs/jax.md tells of: only a checkpoint helps then. A copy that was not donated lives on."""
    tx, params, state = start(rules.Counter(8))
    kept = jax.tree.map(jnp.array, (params, state))
    step = jax.jit(make_step(tx), donate_argnums=0)
    bad = batches()[0].at[3].set(V)
    if on_gpu:  # no error there, and no row is lost to the bad id
        dbj.check_errors()
        (params, state), value = step((params, state), bad)
        assert not np.isfinite(value)
        with pytest.raises(IndexError, match=str(V)):
            dbj.check_errors()
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=str(V)):
            jax.block_until_ready(step((params, state), bad))
        assert params["emb"].bits.is_deleted()
    (after, _), value = step(kept, batches()[0])
    assert np.isfinite(value)
    assert after["emb"].bits.shape == (V, 8)


# ---- telemetry ---------------------------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened():
    """Flips, updated and skipped rows, and counters at their maximum, against a count by hand."""
    table = dbj.BinaryTable.create(jax.random.key(0), 50, 12, padding_idx=3)
    tx = dbj.xor(1.0, rules.Counter(2))
    update = jax.jit(tx.update)
    state = tx.init(table)
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(4):
        rows = rng.normal(size=(6, 12)).astype(np.float32)
        rows[2, 5] = np.inf
        grad = dbj.RowGrad(jnp.array([1, 3, 7, 20, 30, 50], jnp.int32), jnp.asarray(rows), 50)
        updates, state = update(grad, state, table)
        assert isinstance(state.tables.stats, jax.Array)  # on the device until someone reads it
        new = optax.apply_updates(table, updates)
        flips = int(np.unpackbits(np.asarray(new.bits) ^ np.asarray(table.bits)).sum())
        at_maximum = int(np.unpackbits(np.asarray(state.tables.counter)[[1, 20, 30]]).sum())  # of one magnitude bit the maximum is 1
        assert dbj.read_stats(state) == {"": {"flips": flips, "rows": 3, "skipped": 1, "clipped": at_maximum}}
        table, total = new, total + flips
    assert total > 0


def test_stats_of_every_step_of_a_scan():
    """They can be collected inside compiled code, and read after it."""
    table = dbj.BinaryTable.create(jax.random.key(0), 50, 12)
    tx = dbj.xor(1.0, rules.Sign())

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry, ids):
        def step(carry, ids):
            table, state = carry
            grads = dbj.grad(lambda table: jnp.sum((table[ids] - 1.0) ** 2), ids=lambda _: ids)(table)
            updates, state = tx.update(grads, state, table)
            return (optax.apply_updates(table, updates), state), state

        return lax.scan(step, carry, ids)

    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (5, 7)), jnp.int32)
    _, states = train((table, tx.init(table)), ids)
    each = [dbj.read_stats(jax.tree.map(lambda x, k=k: x[k], states))[""] for k in range(5)]
    assert [stats["rows"] for stats in each] == [len(np.unique(batch)) for batch in ids]
    assert all(stats["flips"] <= stats["rows"] * 12 for stats in each)
    assert each[0]["flips"] > 0
