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


# ---- whole tables ------------------------------------------------------------------------------------------------------------------------

MASK = {"emb": True, "w": False}
FREEZING = {
    "partition": lambda: optax.partition({"dense": optax.adam(1e-2), "table": optax.set_to_zero()}, dbj.param_labels),
    "multi_transform": lambda: optax.multi_transform({"dense": optax.sgd(1e-2), "table": optax.set_to_zero()}, dbj.param_labels),
    "masked": lambda: optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.masked(optax.adam(1e-2), {"emb": False, "w": True})),
    "freeze": lambda: optax.chain(optax.freeze(MASK), optax.masked(optax.sgd(1e-2), {"emb": False, "w": True})),
    "selective": lambda: optax.selective_transform(optax.adam(1e-2), freeze_mask=MASK),
    "after xor": lambda: optax.chain(
        optax.partition({"dense": optax.sgd(1e-2), "table": dbj.xor(1.0)}, dbj.param_labels), optax.masked(optax.set_to_zero(), MASK)
    ),
}


@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_frozen_table_stays_among_the_parameters(params, name, wrap):
    tx = FREEZING[name]()

    @wrap
    def step(params, state):
        updates, state = tx.update(dbj.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    new, _ = step(*step(params, tx.init(params)))
    np.testing.assert_array_equal(new["emb"].bits, params["emb"].bits)
    np.testing.assert_array_equal(new["emb"].scale, params["emb"].scale)
    assert (new["w"] != params["w"]).any()


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.identity(), optax.scale_by_sign()], ids=["sgd", "none", "sign"])
def test_a_gradient_that_is_applied_as_it_is(params, tx):
    """The optimizer of the dense parameters given to a table: an error, or where nothing can raise, scales that nobody overlooks."""

    def step(params):
        updates, _ = tx.update(dbj.grad(loss)(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    with pytest.raises((TypeError, ValueError), match=r"dualbin\.jax\.xor|row numbers"):
        step(params)
    new = jax.jit(step)(params)["emb"]
    used = np.unique(IDS)
    assert jnp.isnan(new.scale[used]).all()
    assert jnp.isnan(new[IDS]).all()


@pytest.mark.parametrize(
    ("tx", "error", "message"),
    [
        (optax.adam(0.1), ValueError, r"dualbin\.jax\.xor"),
        (optax.chain(optax.add_decayed_weights(0.1), partition(dbj.xor(1.0))), ValueError, r"dualbin\.jax\.param_labels"),
        (optax.MultiSteps(partition(dbj.xor(1.0)), 2), TypeError, r"got BinaryTable: .*dualbin\.jax\.accumulate sums gradients"),
    ],
    ids=["adam", "decay", "MultiSteps"],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_optimizers_that_keep_something_of_every_parameter(params, tx, error, message, wrap):
    with pytest.raises(error, match=message):
        wrap(tx.update)(dbj.grad(loss)(params), tx.init(params), params)


def test_schedule_free_for_the_dense_parameters(params):
    tx = optax.partition({"dense": optax.contrib.schedule_free_sgd(0.1), "table": dbj.xor(1.0)}, dbj.param_labels)
    updates, _ = tx.update(dbj.grad(loss)(params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert rows_that_differ(new["emb"], params["emb"]) == {1, 2, 3, 5, 7, 29}
    assert (new["w"] != params["w"]).any()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_update_that_is_scaled(params, wrap):
    tx = optax.chain(partition(dbj.xor(1.0)), optax.scale(0.5))
    updates, _ = wrap(tx.update)(dbj.grad(loss)(params), tx.init(params), params)
    with pytest.raises(TypeError, match="the update of a table must have integer ids"):
        wrap(optax.apply_updates)(params, updates)


def test_gradients_fit_the_tree_of_the_parameters(params):
    grads = dbj.grad(loss)(params)
    assert isinstance(grads["emb"], dbj.RowGrad)
    assert not isinstance(params["emb"], dbj.RowGrad)
    alone = dbj.RowGrad(grads["emb"].ids, grads["emb"].rows, V)
    assert isinstance(alone, dbj.RowGrad)
    assert repr(alone) == repr(grads["emb"]) == f"RowGrad(slots={len(alone.ids)}, dim={D}, num_rows={V})"
    total = alone + alone
    for way in (alone + grads["emb"], grads["emb"] + alone, dbj.add(alone, grads["emb"]), sum([grads["emb"], alone])):
        assert isinstance(way, dbj.RowGrad)
        np.testing.assert_array_equal(way.ids, total.ids)
        np.testing.assert_array_equal(way.rows, total.rows)
    with pytest.raises(TypeError, match="table is the gradient of a table"):
        dbj.lookup(grads["emb"], IDS)
    assert "RowGrad" in jax.tree.leaves(jax.tree.map(lambda _, grad: type(grad).__name__, params, grads))
    both = grads["emb"] + grads["emb"]
    np.testing.assert_array_equal(both.rows[:-1][: len(np.unique(IDS))], 2 * grads["emb"].rows[: len(np.unique(IDS))])
    assert sum([grads["emb"]]) is grads["emb"]
    with pytest.raises(TypeError):
        params["emb"] + params["emb"]
    with pytest.raises(AttributeError, match="no attribute 'rows'"):
        params["emb"].rows  # noqa: B018
