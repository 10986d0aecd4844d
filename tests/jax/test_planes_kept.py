"""Tables of several planes: served at fewer planes, averaged, grown, and kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planes_tools import IDS, D, V, make, same_bits, trained, values

import dualbin
import dualbin.jax as dbj
from dualbin import reference
from dualbin.rules import Counter

# ---- served at fewer planes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("planes", [1, 2, 5, 8])
def test_fewer_planes_are_those_of_the_reference(planes, rescale):
    table = make(planes)
    table = dbj.BinaryTable(table.bits, table.scale.at[2].multiply(-1.0).at[3].set(1e-4), D, planes)
    for fewer in range(1, planes + 1):
        bits, scale = reference.with_planes(table.bits, table.scale, D, planes, fewer, rescale=rescale)
        for call in (lambda table: table, jax.jit):
            kept = call(lambda table, fewer=fewer: table.with_planes(fewer, rescale=rescale))(table)
            assert isinstance(kept, dbj.BinaryTable)
            assert kept.planes == fewer
            same_bits(kept.bits, bits)
            same_bits(kept.scale, scale)
    with pytest.raises(ValueError, match=rf"planes must be between 1 and {planes}, got {planes + 1}"):
        table.with_planes(planes + 1, rescale=rescale)


def test_fewer_planes_have_memory_of_their_own():
    table = make(2)
    for kept in (table.with_planes(2), table.with_planes(1, rescale=False)):
        for name in ("bits", "scale"):
            assert getattr(kept, name).unsafe_buffer_pointer() != getattr(table, name).unsafe_buffer_pointer()
    with pytest.raises(TypeError, match="rescale must be True or False"):
        table.with_planes(1, rescale=1)


def test_fewer_planes_in_a_loss_have_no_gradient():
    params = {"emb": make(3), "w": jnp.ones(D)}
    with pytest.raises(ValueError, match="with_planes makes a new table, which has no gradient in this loss"):
        dbj.grad(lambda p: jnp.sum(p["emb"].with_planes(1)[IDS]), ids=lambda _: {"emb": IDS})(params)
    grad = jax.grad(lambda w: jnp.sum(params["emb"].with_planes(1)[IDS] @ w))(params["w"])
    np.testing.assert_allclose(grad, values(params["emb"].with_planes(1))[IDS].reshape(-1, D).sum(0), rtol=1e-6)


# ---- averaged, grown, kept ---------------------------------------------------------------------------------------------------------------


def test_averages_are_those_of_the_reference():
    a, b = make(4, seed=1), make(4, seed=2)
    bits, scale = reference.average(a.bits, a.scale, b.bits, b.scale, 0.3, D, 4, seed=7, step=5)
    got = dbj.average({"emb": a}, {"emb": b}, 0.3, seed=7, step=5)["emb"]
    same_bits(got.bits, bits)
    same_bits(got.scale, scale)
    assert got.planes == 4


@pytest.mark.parametrize("spread", [0.5, 0.1])
def test_grown_tables_keep_what_they_learned(spread):
    table, state, _ = trained(3, Counter(8), 3e-3)
    state = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dbj.TableState))[-1]
    larger, grown = dbj.grow(table, V + 6, jax.random.key(1), state=state, spread=spread)
    assert (larger.planes, larger.shape) == (3, (V + 6, D))
    same_bits(larger.bits[:V], table.bits)
    same_bits(grown.record[:V], state.record)
    assert not np.asarray(grown.record[V:]).any()
    assert np.abs(dualbin.unpack(np.asarray(larger.bits[V:]), D, 3)).max() <= 3
    dbj.BinaryTable(np.asarray(larger.bits), np.asarray(larger.scale), D, 3)
    w = np.random.default_rng(5).normal(size=(2, D)).astype(np.float32)
    same_bits(dbj.grow(table, V + 2, values=w).bits[V:], reference.pack(w, 3))


def test_files_and_torch(tmp_path):
    table, state, _ = trained(3, Counter(8), 3e-3)
    dualbin.io.save(tmp_path / "t", {"emb": table}, {"emb": dbj.export_state(state)["emb"]})
    tables, states = dualbin.io.load(tmp_path / "t")
    again = dbj.BinaryTable(**tables["emb"]._asdict())
    same_bits(again.bits, table.bits)
    assert again.planes == 3
    fresh = dbj.xor(1.0, Counter(8)).init({"emb": again})
    restored = dbj.import_state(fresh, states)
    for name, value in dbj.export_state(state)["emb"].items():
        np.testing.assert_array_equal(dbj.export_state(restored)["emb"][name], value)
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    there = dbt.from_jax(again, copy=True)
    back = dbj.from_torch(there, copy=True)
    assert (there.planes, back.planes) == (3, 3)
    same_bits(back.bits, table.bits)
    with torch.no_grad():
        same_bits(there.dequantize().cpu().numpy(), table.dequantize())


def test_states_without_squares():
    """Files of version 1 have none: zeros, with which a rule that divides by them cannot go on."""
    table, state, _ = trained(1, Counter(8, norm="rms"), 3e-3)
    old = {name: value for name, value in dbj.export_state(state)["emb"].items() if name != "squares"}
    restored = dbj.import_state(dbj.xor(1.0, Counter(8, norm="rms")).init({"emb": table}), {"emb": old})
    assert not np.asarray(restored.tables["emb"].squares).any()
    same_bits(restored.tables["emb"].count, old["count"])
    for scale_lr in (3e-3, 0.0):
        fresh = dbj.xor(1.0, Counter(8, norm="adagrad"), scale_lr).init({"emb": table})
        given = old if scale_lr else {name: old[name] for name in ("counter", "step")}
        with pytest.raises(ValueError, match=r'exported\[.emb.\]: the state has updates but no sums of squares, .*Counter\(norm="rms"\)'):
            dbj.import_state(fresh, {"emb": given})
        dbj.import_state(fresh, {"emb": given | {"step": 0}})
    adagrad = dbj.xor(1.0, Counter(8, norm="adagrad"))
    with pytest.raises(ValueError, match=r'state of params\[.emb.\] has no sums of squares, .*Counter\(norm="rms"\)'):
        adagrad.update({"emb": dbj.RowGrad(jnp.array([1, V]), jnp.ones((2, D)), V)}, restored, {"emb": table})


def test_from_adagrad_to_rms_is_for_good():
    """A state with sums of squares would go on with sums that miss updates: it has to give them up."""
    table, state, _ = trained(1, Counter(8, norm="adagrad"), 3e-3)
    grads = {"emb": dbj.RowGrad(jnp.array([1, V]), jnp.ones((2, D)), V)}
    rms, adagrad = (dbj.xor(1.0, Counter(8, norm=norm)) for norm in ("rms", "adagrad"))
    state = dbj.import_state(adagrad.init({"emb": table}), dbj.export_state(state))
    with pytest.raises(ValueError, match=r"state of params\[.emb.\] has sums of squares .*import_state\(tx.init\(params\)"):
        rms.update(grads, state, {"emb": table})
    with pytest.raises(ValueError, match="state has sums of squares"):
        dbj.xor_update(table, jnp.array([1]), jnp.ones((1, D)), state.tables["emb"], rule=Counter(8, norm="rms"))
    assert np.asarray(state.tables["emb"].squares).any()
    again = dbj.import_state(rms.init({"emb": table}), dbj.export_state(state))
    assert not np.asarray(again.tables["emb"].squares).any()
    same_bits(again.tables["emb"].scale_v, state.tables["emb"].scale_v)
    _, again = rms.update(grads, again, {"emb": table})
    with pytest.raises(ValueError, match=r"exported\[.emb.\]: the state has updates but no sums of squares"):
        dbj.import_state(adagrad.init({"emb": table}), dbj.export_state(again))


@pytest.mark.parametrize(("name", "value"), [("squares", -1.0), ("squares", np.nan), ("scale_v", -1e-9), ("count", -1)])
def test_numbers_that_no_update_leaves_are_refused(name, value):
    table, state, _ = trained(1, Counter(8), 3e-3)
    states = dbj.export_state(state)
    states["emb"][name] = np.append(states["emb"][name][:-1], states["emb"][name].dtype.type(value))
    with pytest.raises(ValueError, match=rf"exported\['emb'\]: state '{name}' must be 0 or more in every row"):
        dbj.import_state(dbj.xor(1.0, Counter(8)).init({"emb": table}), states)


def test_checkpoints(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    ocp = pytest.importorskip("orbax.checkpoint")
    table, state, _ = trained(4, Counter(8), 3e-3)
    carry = {"params": {"emb": table}, "state": state}
    like = jax.tree.map(jnp.zeros_like, carry)
    restored = serialization.from_bytes(like, serialization.to_bytes(carry))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", carry)
        checkpointer.wait_until_finished()
        by_orbax = checkpointer.restore(tmp_path / "c", like)
    for got in (restored, by_orbax):
        assert jax.tree.structure(got) == jax.tree.structure(carry)
        assert got["params"]["emb"].planes == 4
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(carry), strict=True):
            same_bits(a, b)
    with pytest.raises(ValueError, match="planes must be 4, that of the target, got 2"):
        serialization.from_state_dict(table, serialization.to_state_dict(make(2)))
    one = serialization.to_state_dict(make(1))
    del one["planes"]  # of a time when all tables had one
    same_bits(serialization.from_state_dict(make(1, seed=3), one).bits, one["bits"])


def test_nnx_module():
    nnx = pytest.importorskip("flax.nnx")
    module = dbj.BinaryEmbed(V, D, planes=4, dtype=jnp.bfloat16, projection=5, rngs=nnx.Rngs(0))
    table = module.table.get_value()
    assert (table.planes, module(IDS).shape, module(IDS).dtype) == (4, (*IDS.shape, 5), jnp.bfloat16)
    graphdef, params = nnx.split(module, nnx.Param)
    ids = {"table": IDS}
    grads = dbj.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(IDS).astype(jnp.float32)), ids=lambda _: ids)(params)
    optimizer = nnx.Optimizer(module, optax.partition({"dense": optax.sgd(0.1), "table": dbj.xor(1.0)}, dbj.param_labels), wrt=nnx.Param)
    optimizer.update(module, grads)
    trained = module.table.get_value()
    assert trained.planes == 4
    assert (np.asarray(trained.bits) != np.asarray(table.bits)).any()
