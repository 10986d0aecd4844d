"""Stacks: tables `[L, V, B]` that a scan over layers takes apart, and `vmap` over them. Each member is what it would be alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter, Sign

V, D, L = 50, 11, 3
IDS = jnp.array([[1, 2, 3], [2, 5, 7]])
W = jnp.linspace(-1, 1, D)


def make_stack(seed=0, layers=L):
    return jax.vmap(lambda key: dbj.BinaryTable.create(key, V, D))(jax.random.split(jax.random.key(seed), layers))


def member(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def over_layers(tables, ids=IDS):
    def layer(h, table):
        return jnp.tanh(h + table[ids]), None

    return jnp.sum(jax.lax.scan(layer, jnp.zeros((*ids.shape, D)), tables)[0] @ W)


def dense_stack(stack):
    return jax.vmap(lambda table: table.dequantize())(stack)


@pytest.mark.parametrize("way", [{"ids": lambda _: {"emb": IDS}}, {"capacity": 8}], ids=["ids", "capacity"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_scan_over_layers_has_the_gradient_of_each(way, wrap):
    stack = make_stack()
    grads = wrap(dbj.grad(lambda p: over_layers(p["emb"]), **way))({"emb": stack})["emb"]
    want = jax.grad(over_layers)(dense_stack(stack))
    for layer in range(L):
        grad = member(grads, layer)
        got = jnp.zeros((V, D)).at[grad.ids].add(grad.rows, mode="drop")
        np.testing.assert_allclose(got, want[layer], atol=1e-6)


@pytest.mark.parametrize("rule", [Sign(), Counter(2), Counter(8, every=2), Bop()], ids=str)
def test_each_member_trains_as_if_alone(rule):
    stack = make_stack()
    tx = dbj.xor(1.0, rule)
    targets = jax.random.normal(jax.random.key(3), (L, *IDS.shape, D))

    def loss(params):
        return jnp.sum(jax.vmap(lambda table, target: jnp.sum((table[IDS] - target) ** 2))(params["emb"], targets))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(dbj.grad(loss, ids=lambda _: {"emb": IDS})(params), state, params)
        return optax.apply_updates(params, updates), state

    def step_alone(params, state, target):
        def loss(params):
            return jnp.sum((params["emb"][IDS] - target) ** 2)

        updates, state = tx.update(dbj.grad(loss, ids=lambda _: {"emb": IDS})(params), state, params)
        return optax.apply_updates(params, updates), state

    whole = ({"emb": stack}, tx.init({"emb": stack}))
    alone = [({"emb": member(stack, k)}, tx.init({"emb": member(stack, k)})) for k in range(L)]
    for _ in range(3):
        whole = step(*whole)
        alone = [jax.jit(step_alone)(*carry, target) for carry, target in zip(alone, targets, strict=True)]
    assert (whole[0]["emb"].bits != stack.bits).any()
    for k in range(L):
        for got, want in zip(jax.tree.leaves(member(whole[0], k)), jax.tree.leaves(alone[k][0]), strict=True):
            np.testing.assert_array_equal(got, want)
    stats = dbj.read_stats(whole[1])["emb"]
    parts = [dbj.read_stats(state)["emb"] for _, state in alone]
    assert stats == {name: sum(part[name] for part in parts) for name in stats}


def test_linen_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, ids):
            table = self.param("table", dbj.BinaryTable.create, V, D)
            return nn.tanh(h + table[ids]), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=L)()
            return nn.Dense(1)(blocks(jnp.zeros((*ids.shape, D)), ids)[0])

    model = Model()
    params = model.init(jax.random.key(0), IDS)["params"]
    (name,) = (name for name in params if "Dense" not in name)
    assert params[name]["table"].bits.shape == (L, V, 2)
    tx = optax.partition({"dense": optax.sgd(1e-2), "table": dbj.xor(1.0, Sign())}, dbj.param_labels)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, IDS) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = dbj.value_and_grad(loss, ids=lambda _: {f"{name}/table": IDS})(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    carry, before = (params, tx.init(params)), params[name]["table"].bits
    for _ in range(5):
        *carry, _ = step(*carry)
    changed = np.asarray(carry[0][name]["table"].bits != before).any((0, 2))
    assert set(np.flatnonzero(changed)) <= set(np.unique(IDS))
    assert changed.any()


def test_nnx_scan():
    @nnx.split_rngs(splits=L)
    @nnx.vmap
    def create(rngs):
        return dbj.BinaryEmbed(V, D, rngs=rngs)

    model = create(nnx.Rngs(0))

    def loss(params):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(h, layer):
            return jnp.tanh(h + layer(IDS))

        return jnp.sum(forward(jnp.zeros((*IDS.shape, D)), nnx.merge(graphdef, params)))

    graphdef, params = nnx.split(model, nnx.Param)
    optimizer = nnx.Optimizer(model, dbj.xor(1.0, Sign()), wrt=nnx.Param)
    before = model.table.get_value().bits
    optimizer.update(model, dbj.grad(loss, ids=lambda _: {"table": IDS})(params))
    changed = np.asarray(model.table.get_value().bits != before).any((0, 2))
    assert set(np.flatnonzero(changed)) <= set(np.unique(IDS))
    assert changed.any()


def test_vmap_over_a_stack_copies_no_table():
    """Each member looks its rows up where they are: no table of one member in the program, and its error names the id."""
    stack = make_stack()
    per_member = jax.random.randint(jax.random.key(0), (L, 4), 0, V)
    for ids, axes in ((IDS, (0, None)), (per_member, (0, 0))):
        look = jax.jit(jax.vmap(lambda table, ids: table[ids], in_axes=axes))
        np.testing.assert_array_equal(look(stack, ids), jnp.stack([member(stack, k)[ids if axes[1] is None else ids[k]] for k in range(L)]))
        text = look.lower(stack, ids).compile().as_text()
        assert f"u8[{V},2]" not in text
        assert "while" not in text


def test_vmap_finds_bad_ids(on_gpu):
    stack = make_stack()
    look = jax.jit(jax.vmap(lambda table, ids: table[ids], in_axes=(0, 0)))
    for bad in (V, -1):
        ids = jnp.zeros((L, 4), jnp.int32).at[1, 2].set(bad)
        if on_gpu:
            assert jnp.isnan(look(stack, ids)).any(-1).sum() == 1
            with pytest.raises(IndexError):
                dbj.check_errors()
        else:
            with pytest.raises(jax.errors.JaxRuntimeError, match="outside"):
                jax.block_until_ready(look(stack, ids))


def test_what_needs_one_table_says_so():
    stack = make_stack()
    with pytest.raises(ValueError, match=r"a stack of 3 tables.*scan or vmap"):
        stack[IDS]
    with pytest.raises(ValueError, match=r"a stack of 3 tables.*scan or vmap"):
        dbj.value_and_grad(lambda p: jnp.sum(p["emb"][IDS]), ids=lambda _: {"emb": IDS})({"emb": stack})
    state = dbj.xor(1.0).init({"emb": stack})
    with pytest.raises(ValueError, match="stack of 3 tables"):
        dbj.export_state(state)
