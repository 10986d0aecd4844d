"""What does not train: some rows of a table, or whole tables that stay among the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dualbin.jax as dbj
from dualbin.rules import Counter, Sign

V, D = 30, 11
FROZEN = [2, 5, 29, 0]
IDS = jnp.array([[1, 2, 3, 29], [2, 5, 7, 5]])


def loss(params, ids=IDS):
    return jnp.sum(jnp.tanh(params["emb"][ids] @ params["w"]))


def partition(table):
    return optax.partition({"dense": optax.set_to_zero(), "table": table}, dbj.param_labels)


@pytest.fixture
def params(new_table):
    return {"emb": new_table(V, D), "w": jnp.linspace(-1, 1, D)}


def rows_that_differ(a, b):
    a, b = ((np.asarray(x.bits), np.asarray(x.scale)) for x in (a, b))
    return set(np.flatnonzero((a[0] != b[0]).any(1) | (a[1] != b[1])[:, 0]).tolist())


@pytest.mark.parametrize("rule", [Sign(), Counter(3), Counter(3, every=2)], ids=str)
def test_frozen_rows_stay_and_the_others_train_as_without(params, rule):
    tx = optax.chain(dbj.freeze_rows({"emb": FROZEN}), partition(dbj.xor(1.0, rule)))
    free = partition(dbj.xor(1.0, rule))

    def train(tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(dbj.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        new, state = params, tx.init(params)
        for _ in range(4):
            new, state = step(new, state)
        return new["emb"], dbj.export_state(state)["emb"]

    (some, some_state), (every, every_state) = train(tx), train(free)
    trained = {1, 3, 7}
    assert rows_that_differ(every, params["emb"]) == trained | {2, 5, 29}
    assert rows_that_differ(some, params["emb"]) == trained
    for name, array in some_state.items():
        if np.ndim(array) and not name.startswith("pending"):
            assert not array[FROZEN].any(), name
    if rule.every == 1:
        assert rows_that_differ(some, every) == {2, 5, 29}
        assert some_state["step"] == every_state["step"] == 4


def test_ids_come_in_the_ways_of_value_and_grad(params, new_table):
    params = {"block": {"emb": params["emb"], "other": new_table(V, D, seed=1)}, "w": params["w"]}
    grads = dbj.grad(lambda p: jnp.sum(p["block"]["emb"][IDS] * p["block"]["other"][IDS]))(params)
    ways = {"block": {"emb": FROZEN}}, {"block/emb": np.array(FROZEN, np.uint8)}, {"block.emb": jnp.array([FROZEN]), "block.other": None}
    for ids in ways:
        got, _ = dbj.freeze_rows(ids).update(grads, optax.EmptyState())
        used = np.asarray(got["block"]["emb"].ids)
        assert set(used[used < V]) == {1, 3, 7}
        np.testing.assert_array_equal(got["block"]["other"].ids, grads["block"]["other"].ids)
    alone = dbj.grad(lambda table: jnp.sum(table[IDS]))(params["block"]["emb"])
    got, _ = dbj.freeze_rows([]).update(alone, optax.EmptyState())
    np.testing.assert_array_equal(got.ids, alone.ids)
    got, _ = dbj.freeze_rows(jnp.arange(V)).update(alone, optax.EmptyState())
    assert (got.ids == V).all()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ({"emb": [V]}, IndexError, r"ids of the table 'emb' must be in \[0, 30\), got 30"),
        ({"emb": [-1]}, IndexError, r"ids of the table 'emb' must be in \[0, 30\), got -1"),
        ({"emb": [0.5]}, TypeError, "ids of the table 'emb' must be integers, got float64"),
        ({"w": [1]}, ValueError, "ids names 'w', which is no table; tables are 'emb'"),
        (np.array([1]), ValueError, "ids must be a dict by path of the table, got ndarray; tables are 'emb'"),
    ],
)
def test_wrong_ids(params, ids, error, message):
    with pytest.raises(error, match=message):
        dbj.freeze_rows(ids).update(dbj.grad(loss)(params), optax.EmptyState(), params)


def test_in_nnx():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = dbj.BinaryEmbed(V, D, rngs=nnx.Rngs(0))

    model = Model()
    tx = optax.chain(dbj.freeze_rows({"embed.table": FROZEN}), dbj.xor(1.0, Sign()))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split(model, nnx.Param)
    before = model.embed.table.get_value()
    grads = dbj.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p).embed(IDS))))(state)
    optimizer.update(model, grads)
    assert rows_that_differ(model.embed.table.get_value(), before) == {1, 3, 7}
