"""A state knows the planes of its table: where all sizes are those of another number of planes, nothing else tells."""

from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from planes_tools import D, V, make

import dualbin.jax as dbj
from dualbin import io
from dualbin.rules import Counter

MESSAGE = "is the state of a table of 2 planes, but this table has 1: its counters are the bits below those planes; train the table"
#: by planes: 2 planes of 8 bits, and one plane of 7: the counters of both have 6 planes
RULES = {planes: Counter(bits, norm="rms") for planes, bits in {1: 7, 2: 8}.items()}
IDS = jnp.array([1, 2, 5], jnp.int32)


def gradient():
    return {"emb": dbj.RowGrad(IDS, jnp.ones((3, D)), num_rows=V)}


def optimizer(planes):
    return dbj.xor(0.7, RULES[planes])


@pytest.fixture
def two():
    """The state of a table of two planes after a step, and a table of one plane that it would fit by its sizes."""
    params = {"emb": make(2)}
    _, state = optimizer(2).update(gradient(), optimizer(2).init(params), params)
    return state, {"emb": make(1)}


def sizes(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype), jax.tree.leaves(state))


def test_a_state_of_other_planes_is_refused(two, tmp_path):
    state, other = two
    fresh = optimizer(1).init(other)
    assert sizes(state) == sizes(fresh)
    assert jax.tree.structure(state) != jax.tree.structure(fresh)
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=rf"state of params\['emb'\] {MESSAGE}"):
            wrap(optimizer(1).update)(gradient(), state, other)
        update = wrap(partial(dbj.xor_update, rule=RULES[1]))
        with pytest.raises(ValueError, match=f"state {MESSAGE}"):
            update(other["emb"], IDS, jnp.ones((3, D)), state.tables["emb"])
    exported = dbj.export_state(state)
    io.save(tmp_path / "t.safetensors", {"emb": make(2)}, exported)
    _, states = io.load(tmp_path / "t.safetensors")
    for given in (exported, states, jax.tree.map(np.copy, exported)):
        assert given["emb"].planes == 2
        with pytest.raises(ValueError, match=rf"exported\['emb'\] {MESSAGE}"):
            dbj.import_state(fresh, given)
    with pytest.raises(ValueError, match=rf"state\['emb'\] {MESSAGE}"):
        io.save(tmp_path / "u.safetensors", other, exported)
    assert not (tmp_path / "u.safetensors").exists()
    with pytest.raises(ValueError, match="is the state of a table of 1 planes, but this table has 2"):
        dbj.import_state(state, dbj.export_state(fresh))
    for given in (exported, states, {"emb": dict(exported["emb"])}):  # of a plain dict nothing is known
        again = dbj.import_state(optimizer(2).init({"emb": make(2)}), given)
        np.testing.assert_array_equal(again.tables["emb"].counter, state.tables["emb"].counter)
        assert again.tables["emb"].planes == 2


def test_the_state_of_a_table_is_not_that_of_its_top_planes(two):
    state, _ = two
    served = {"emb": make(2).with_planes(1)}
    with pytest.raises(ValueError, match=MESSAGE):
        optimizer(1).update(gradient(), state, served)


def test_one_plane_is_no_structure():
    states = {planes: dbj.init_state(make(planes)) for planes in (1, 2, 8)}
    assert {planes: state.planes for planes, state in states.items()} == {1: 1, 2: 2, 8: 8}
    assert states[1].more_planes == ()
    assert [len(jax.tree.leaves(state)) for state in states.values()] == [4, 4, 3]  # nothing is below 8 planes of 8 bits


def test_stacks_know_their_planes():
    stack = jax.tree.map(lambda x: jnp.stack([x] * 3), make(2))
    state = optimizer(2).init({"emb": stack})
    assert state.tables["emb"].planes == 2
    other = jax.tree.map(lambda x: jnp.stack([x] * 3), make(1))
    grads = jax.tree.map(lambda x: jnp.stack([x] * 3), gradient())
    with pytest.raises(ValueError, match=MESSAGE):
        optimizer(1).update(grads, state, {"emb": other})
    member = jax.tree.map(lambda x: x[1], state.tables)
    assert dbj.export_state(member)["emb"].planes == 2


@pytest.mark.skipif(jax.device_count() == 1, reason="one device")
def test_grown_and_sharded_states_know_their_planes():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    table = jax.device_put(make(2), NamedSharding(mesh, PartitionSpec("rows")))
    state = dbj.init_state(table, RULES[2])
    specs = dbj.partition_specs(state, "rows")
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    larger, grown = dbj.grow(make(2), V + 2, jax.random.key(0), state=dbj.init_state(make(2), RULES[2]))
    assert grown.planes == state.planes == specs.planes == 2
    table, grown = jax.jit(partial(dbj.xor_update, rule=RULES[2]))(larger, IDS, jnp.ones((3, D)), grown)
    assert grown.planes == 2


def test_checkpoints_keep_the_planes(two, tmp_path):
    state, other = two
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c", jax.tree.map(jnp.zeros_like, state))
        with pytest.raises(ValueError, match="more_planes"):
            checkpointer.restore(tmp_path / "c", optimizer(1).init(other))
    data = flax.serialization.to_bytes(state)
    for got in (restored, flax.serialization.from_bytes(optimizer(2).init({"emb": make(2)}), data)):
        assert jax.tree.structure(got) == jax.tree.structure(state)
        assert got.tables["emb"].planes == 2
    with pytest.raises(ValueError, match="more_planes"):
        flax.serialization.from_bytes(optimizer(1).init(other), data)


def test_optimizers_of_nnx_know_the_planes():
    models = {planes: dbj.BinaryEmbed(V, D, planes=planes, rngs=nnx.Rngs(0)) for planes in (1, 2)}
    optimizers = {planes: nnx.Optimizer(model, optimizer(planes), wrt=nnx.Param) for planes, model in models.items()}
    exported = {planes: dbj.export_state(each.opt_state) for planes, each in optimizers.items()}
    assert {planes: states["table"].planes for planes, states in exported.items()} == {1: 1, 2: 2}
    with pytest.raises(ValueError, match=MESSAGE):
        dbj.import_state(optimizers[1].opt_state, exported[2])
    _, params = nnx.split(models[1], nnx.Param)
    grads = dbj.grad(lambda params: jnp.sum(nnx.merge(nnx.graphdef(models[1]), params)(IDS)), ids=lambda _: {"table": IDS})(params)
    optimizers[1].opt_state = optimizers[2].opt_state
    with pytest.raises(ValueError, match=MESSAGE):
        optimizers[1].update(models[1], grads)
