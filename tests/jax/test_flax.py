"""Tables in flax modules, train states and checkpoints."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter

V, D = 100, 16


def make_tx(rule=None):
    return optax.partition({"dense": optax.adam(1e-2), "table": dbj.xor(1.0, rule)}, dbj.param_labels)


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(0, 30, (8, 4)).astype(np.int32)
    return {"ids": jnp.asarray(ids), "y": jnp.asarray(ids[:, 0] % 3)}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = dbj.BinaryEmbed(V, D, padding_idx=0, rngs=rngs)
        self.head = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed(ids).mean(1))


def loss_of(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_nnx():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)
    before = np.asarray(model.embed.table.get_value().bits)

    @nnx.jit
    def step(model, optimizer, batch):
        graphdef, params = nnx.split(model, nnx.Param)
        run = dbj.value_and_grad(
            lambda params, batch: loss_of(nnx.merge(graphdef, params)(batch["ids"]), batch["y"]),
            ids=lambda _, batch: {"embed.table": batch["ids"]},
        )
        loss, grads = run(params, batch)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, batch())) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    table = model.embed.table.get_value()
    assert isinstance(table, dbj.BinaryTable)
    rows = np.unique(np.nonzero(table.bits != before)[0])
    assert len(rows)
    assert set(rows) <= set(np.unique(batch()["ids"])) - {0}
    assert [leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model.embed, nnx.Param))] == ["uint8", "float32"]


def test_nnx_module():
    embed = dbj.BinaryEmbed(V, D, dtype=jnp.bfloat16, scale=0.5, rngs=nnx.Rngs(1))
    y = embed(jnp.array([[1, 2], [3, 1]]))
    assert (y.shape, y.dtype) == ((2, 2, D), jnp.bfloat16)
    assert (jnp.abs(y) == 0.5).all()
    np.testing.assert_array_equal(y[0, 0], y[1, 1])
    other = nnx.merge(*nnx.split(embed))
    np.testing.assert_array_equal(other([1]), embed([1]))
    frozen = nnx.grad(lambda head, y: jnp.sum(head(y) ** 2))(nnx.Linear(D, 3, rngs=nnx.Rngs(0)), embed([1, 2]).astype(jnp.float32))
    assert jnp.isfinite(frozen["kernel"][...]).all()
    with pytest.raises(TypeError, match="dtype must be float32"):
        dbj.BinaryEmbed(V, D, dtype=jnp.int32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_embeddings must be at least 1"):
        dbj.BinaryEmbed(0, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="features must be at least 1"):
        dbj.BinaryEmbed(V, 0, rngs=nnx.Rngs(0))


def test_nnx_projection():
    embed = dbj.BinaryEmbed(V, D, padding_idx=0, projection=True, rngs=nnx.Rngs(1))
    ids = jnp.array([[1, 2], [3, 0]])
    np.testing.assert_array_equal(embed(ids), dbj.lookup(embed.table.get_value(), ids), "the identity at first")
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(D, D)), jnp.float32)
    embed.projection.set_value(matrix)
    np.testing.assert_allclose(embed(ids), dbj.lookup(embed.table.get_value(), ids) @ matrix, rtol=1e-6)
    graphdef, params = nnx.split(embed, nnx.Param)
    grads = dbj.value_and_grad(lambda params, ids: (nnx.merge(graphdef, params)(ids) ** 2).sum(), ids=lambda _, ids: {"table": ids})(
        params, ids
    )[1]
    dense = embed.table.get_value().dequantize()
    want = jax.grad(lambda m: ((dense[ids] @ m) ** 2).sum())(matrix)
    np.testing.assert_allclose(grads["projection"].get_value(), want, rtol=1e-5)
    with pytest.raises(TypeError, match=r"projection must be True, False or an output width, got 1\.0 of type float"):
        dbj.BinaryEmbed(V, D, projection=1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="projection must be True, False or an output width of at least 1, got 0"):
        dbj.BinaryEmbed(V, D, projection=0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("width", [1, 2, D + 5])
def test_nnx_projection_to_a_width(width):
    embed, plain = (dbj.BinaryEmbed(V, D, padding_idx=0, projection=projection, rngs=nnx.Rngs(1)) for projection in (width, False))
    ids = jnp.array([[1, 2], [3, 0]])
    np.testing.assert_array_equal(embed.table.get_value().bits, plain.table.get_value().bits, "drawn first")
    assert embed(ids).shape == (2, 2, width)
    np.testing.assert_array_equal(embed(ids), plain(ids) @ embed.projection.get_value())
    same = dbj.BinaryEmbed(V, D, projection=width, rngs=nnx.Rngs(1)).projection.get_value()
    np.testing.assert_array_equal(embed.projection.get_value(), same)
    other = dbj.BinaryEmbed(V, D, projection=width, rngs=nnx.Rngs(2)).projection.get_value()
    assert (embed.projection.get_value() != other).any()
    np.testing.assert_array_equal(nnx.merge(*nnx.split(embed))(ids), embed(ids))


def test_nnx_projection_starts_with_the_variance_of_the_rows():
    matrix = np.asarray(dbj.BinaryEmbed(4, 400, projection=300, rngs=nnx.Rngs(1)).projection.get_value())
    assert matrix.std() == pytest.approx(400**-0.5, rel=0.02)
    assert abs(matrix.mean()) < 0.002
    embed = dbj.BinaryEmbed(V, D, projection=D, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(embed.projection.get_value(), np.eye(D), "the width that the rows have")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = self.param("table", dbj.BinaryTable.create, V, D)
        return nn.Dense(3)(table[ids].mean(1))


def test_linen_and_train_state():
    model = Linen()
    params = model.init(jax.random.key(0), batch()["ids"])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make_tx())

    def loss(params, batch):
        return loss_of(model.apply({"params": params}, batch["ids"]), batch["y"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        value, grads = dbj.value_and_grad(loss)(state.params, batch)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(20):
        state, value = step(state, batch())
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert isinstance(state.params["table"], dbj.BinaryTable)
    assert int(state.step) == 20


@pytest.mark.parametrize("rule", [Counter(3, every=3), Bop()], ids=str)
def test_orbax_resumes_to_the_same_bits(tmp_path, new_table, rule):
    tx = make_tx(rule)
    params = {"emb": new_table(V, D), "w": jnp.ones((D, 3))}

    @jax.jit
    def step(params, state, batch):
        grads = dbj.grad(lambda params, batch: loss_of(params["emb"][batch["ids"]].mean(1) @ params["w"], batch["y"]))(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry = (params, tx.init(params))
    for seed in range(7):
        carry = step(*carry, batch(seed))
        if seed == 3:  # in the middle of a window
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "4", carry)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), carry)
    with ocp.StandardCheckpointer() as checkpointer:
        resumed = checkpointer.restore(tmp_path / "4", like)
    assert isinstance(resumed[0]["emb"], dbj.BinaryTable)
    for seed in range(4, 7):
        resumed = step(*resumed, batch(seed))
    for got, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(carry), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
