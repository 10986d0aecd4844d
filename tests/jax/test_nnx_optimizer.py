"""`nnx.Optimizer` with `dualbin.jax.xor` in it: one tree, one trace, and a resume to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter

V, D = 30, 11
IDS = jnp.array([[1, 2, 3], [2, 5, 7]])
RULES = [Counter(8), Counter(2, every=3), Bop()]


class Model(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = dbj.BinaryEmbed(V, D, rngs=rngs)
        self.blocks = nnx.List([dbj.BinaryEmbed(V, D, rngs=rngs)])
        self.head = nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, ids):
        return jnp.sum(jnp.tanh(self.head(self.embed(ids) + self.blocks[0](ids))) ** 2)


def start(seed, rule):
    model = Model(seed)
    tx = optax.partition({"dense": optax.adam(1e-2), "table": optax.chain(dbj.xor(1.0, rule))}, dbj.param_labels)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def train(model, optimizer, ids):
    graphdef, params = nnx.split(model, nnx.Param)
    value, grads = dbj.value_and_grad(lambda p: nnx.merge(graphdef, p)(ids), ids=lambda _: {"embed.table": ids, "blocks.0.table": ids})(
        params
    )
    optimizer.update(model, grads)
    return value


def leaves(*objects):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(objects))]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_tree_and_one_trace(rule):
    model, optimizer = start(0, rule)
    traces = []

    @nnx.jit
    def step(model, optimizer, ids):
        traces.append(None)
        return train(model, optimizer, ids)

    before = jax.tree.structure(nnx.state(optimizer))
    types = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(optimizer))
    for _ in range(4):
        step(model, optimizer, IDS)
    assert len(traces) == 1
    assert jax.tree.structure(nnx.state(optimizer)) == before
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(optimizer)) == types


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_state_can_be_read_and_resumed(rule, tmp_path):
    model, optimizer = start(0, rule)
    step = nnx.jit(train)
    for _ in range(4):
        step(model, optimizer, IDS)
    names = {"embed.table", "blocks.0.table"}
    stats = dbj.read_stats(optimizer.opt_state)
    assert set(stats) == names
    assert stats["embed.table"]["rows"] == (0 if rule.every > 1 else 5)  # the fourth step of `every=3` opens a window
    dbj.check_errors(optimizer.opt_state)
    exported = dbj.export_state(optimizer.opt_state)
    assert {name: state["step"] for name, state in exported.items()} == dict.fromkeys(names, 4 // rule.every)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "4", nnx.state((model, optimizer)))
    resumed = start(1, rule)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(resumed))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(resumed, checkpointer.restore(tmp_path / "4", like))
    other, optimizer2 = start(1, rule)
    nnx.update(other, nnx.state(model))
    nnx.update(optimizer2, nnx.state(optimizer))
    assert leaves(*resumed) == leaves(model, optimizer)
    for _ in range(3):
        for pair in ((model, optimizer), resumed, (other, optimizer2)):
            step(*pair, IDS)
    assert leaves(*resumed) == leaves(other, optimizer2) == leaves(model, optimizer)


def test_state_of_a_file_into_an_optimizer():
    """`import_state` takes the state of an optimizer that has taken steps, for one of nnx as for one of optax."""
    model, optimizer = start(0, Counter(3, every=2))
    for _ in range(3):
        train(model, optimizer, IDS)
    exported = dbj.export_state(optimizer.opt_state)
    _, fresh = start(1, Counter(3, every=2))
    before = jax.tree.structure(nnx.state(fresh))
    fresh.opt_state = nnx.data(dbj.import_state(fresh.opt_state, exported))
    assert jax.tree.structure(nnx.state(fresh)) == before
    again = dbj.export_state(fresh.opt_state)
    assert jax.tree.structure(again) == jax.tree.structure(exported)
    jax.tree.map(np.testing.assert_array_equal, again, exported)
