"""Tables of several planes: made, taken apart by the transformations of JAX, trained, served at fewer planes, and kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dualbin
import dualbin.jax as dbj
from dualbin import reference
from dualbin.rules import Bop, Counter, Sign

V, D = 24, 13  # padding bits in every plane
IDS = np.array([[1, 2, 3], [2, 5, 7]])


def make(planes, rows=V, seed=0, padding_idx=4):
    w = np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)
    return dbj.BinaryTable.from_float(w, padding_idx, planes)


def values(table):
    return reference.lookup(table.bits, table.scale, np.arange(table.shape[0]), table.dim, planes=table.planes)


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


# ---- made --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", range(1, 9))
def test_from_float_is_the_reference(planes):
    w = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)
    table = dbj.BinaryTable.from_float(w, padding_idx=-1, planes=planes)
    same_bits(table.bits, reference.pack(w, planes))
    same_bits(table.scale[:-1], reference.row_scale(w, planes)[:-1])
    assert (float(table.scale[-1, 0]), table.planes, table.shape) == (0.0, planes, (V, D))
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        want = reference.lookup(table.bits, table.scale, np.arange(V), D, dtype, planes)
        same_bits(dbj.lookup(table, jnp.arange(V), dtype), want)
        same_bits(table.dequantize(dtype), want)
    np.testing.assert_array_equal(dbj.attend(table, jnp.ones((2, D))), jnp.ones((2, D)) @ table.dequantize().T)


@pytest.mark.parametrize("planes", [2, 3, 8])
@pytest.mark.parametrize("spread", [0.5, 0.1])
def test_created_magnitudes_are_below_half_of_their_range(planes, spread):
    create = partial(dbj.BinaryTable.create, jax.random.key(3), 400, D, spread=spread, padding_idx=1, planes=planes)
    table = create()
    levels = dualbin.unpack(np.asarray(table.bits), D, planes)
    magnitudes = np.abs(levels) // 2
    assert magnitudes.max() == max(0, 2 ** (planes - 2) - 1)
    assert magnitudes.min() == 0
    np.testing.assert_allclose(magnitudes.mean(), (2 ** (planes - 2) - 1) / 2, rtol=0.05)
    if spread < 0.5:
        agree = np.maximum((levels > 0).mean(0), (levels < 0).mean(0))
        assert 0.8 < agree.mean() < 0.95
    assert (table.planes, table.bits.shape) == (planes, (400, 2 * planes))
    dbj.BinaryTable(np.asarray(table.bits), np.asarray(table.scale), D, planes)  # padding bits are 0 in every plane
    same_bits(jax.jit(create)().bits, table.bits)


def test_what_is_refused():
    bits, scale = np.zeros((V, 4), np.uint8), np.ones((V, 1), np.float32)
    with pytest.raises(ValueError, match=r"bits must have shape \[V, 2\] with V >= 1 for dim 13, got \[24, 4\]"):
        dbj.BinaryTable(bits, scale, D)
    with pytest.raises(ValueError, match=r"bits must have shape \[V, 6\] with V >= 1 for dim 13 and 3 planes, got \[24, 4\]"):
        dbj.BinaryTable(bits, scale, D, planes=3)
    for planes in (0, 9):
        with pytest.raises(ValueError, match="planes must be between 1 and 8"):
            dbj.BinaryTable(bits, scale, D, planes=planes)
        with pytest.raises(ValueError, match="planes must be between 1 and 8"):
            dbj.BinaryTable.create(jax.random.key(0), V, D, planes=planes)
    with pytest.raises(TypeError, match="planes must be an integer, got True"):
        dbj.BinaryTable.from_float(np.ones((V, D), np.float32), planes=True)
    with pytest.raises(ValueError, match="bits set beyond column 12"):
        dbj.BinaryTable(np.full((V, 4), 128, np.uint8) * np.array([0, 0, 0, 1], np.uint8), scale, D, planes=2)
    with pytest.raises(ValueError, match="w must be finite, got inf at row 0, column 0"):
        dbj.BinaryTable.from_float(np.full((2, D), np.inf, np.float32), planes=2)
    with pytest.raises(ValueError, match="mode 'majority' is defined for tables of one plane, got a table of 2 planes"):
        dbj.lookup_bag(make(2), IDS[0], np.zeros(3, np.int32), 1, "majority")
    with pytest.raises(ValueError, match="a and b must have the same planes, got 2 and 3"):
        dbj.average(make(2), make(3), 0.5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Counter(2), "bits of Counter must be at least the planes of the table, got 2 bits for a table of 3 planes"),
        (Counter(8, center=True), "center must be False for a table of 3 planes"),
        (Bop(), "rule must be a Counter for a table of 3 planes, got Bop"),
        (Sign(), "rule must be a Counter for a table of 3 planes, got Sign"),
    ],
    ids=str,
)
def test_rules_that_cannot_train_them(rule, message):
    table = make(3)
    state = dbj.init_state(table)
    for call in (
        lambda: dbj.init_state(table, rule),
        lambda: dbj.xor(1.0, rule).init({"emb": table}),
        lambda: dbj.xor_update(table, IDS, jnp.ones((*IDS.shape, D)), state, rule=rule),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- trees -------------------------------------------------------------------------------------------------------------------------------


def test_planes_stay_with_the_tree():
    table = make(3)
    again = jax.tree.unflatten(jax.tree.structure(table), jax.tree.leaves(table))
    assert (again.planes, again.dim) == (3, D)
    assert jax.tree.map(lambda x: x, table).planes == 3
    assert jax.eval_shape(lambda: table).planes == 3
    assert jax.jit(lambda table: table)(table).planes == 3
    wide = dbj.BinaryTable(table.bits, table.scale, 48, planes=1)  # the same leaves, another table
    assert jax.tree.structure(wide) != jax.tree.structure(table)
    assert "planes=3" in repr(table)
    assert "planes=3" in repr(jax.eval_shape(lambda: table))
    assert "planes" not in repr(wide)
    grads = dbj.grad(lambda p: jnp.sum(p["emb"][IDS]))({"emb": table})
    assert (grads["emb"].planes, isinstance(grads["emb"], dbj.RowGrad)) == (3, True)
    assert dbj.add(grads["emb"], grads["emb"]).planes == 3
    assert jax.tree.map(lambda x: 2 * x, grads)["emb"].planes == 3
    assert dbj.activate(table, IDS).planes == 3
    assert dbj.partition_specs({"emb": table}, "rows")["emb"].planes == 3


def test_gradients_are_those_of_the_floats(dense):
    """A lookup is linear in the value: the gradient of a row is that of a row of a dense model, at these values."""
    table, weights = make(4), jnp.linspace(-1, 1, D)

    def loss(w):
        return jnp.sum(jnp.tanh(w[IDS] * weights) ** 2) + jnp.sum(jnp.sin(w[IDS[0]]))

    value, grads = jax.jit(dbj.value_and_grad(lambda p: loss(p["emb"]), ids=lambda _: {"emb": IDS}))({"emb": table})
    want_value, want = jax.value_and_grad(loss)(jnp.asarray(values(table)))
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    np.testing.assert_allclose(dense(grads["emb"], V), want, atol=1e-6)


def test_bags_and_their_gradients_are_those_of_the_floats(dense):
    table = make(3)
    ids, segments, weights = IDS.reshape(-1), np.array([0, 0, 1, 1, 1, 3]), jnp.linspace(0.5, 2, 6)
    ids = np.where(ids == 7, 4, ids)  # a padding row

    def loss(bag, w):
        return jnp.sum(jnp.sin(bag(w)))

    def bag(w):
        return dbj.lookup_bag(w, ids, segments, 4, weights=weights)

    def of_floats(w):
        return jax.ops.segment_sum(w[ids] * weights[:, None], segments, 4)

    grads = dbj.grad(lambda p: loss(bag, p["emb"]))({"emb": table})
    want = jax.grad(partial(loss, of_floats))(jnp.asarray(values(table)))
    np.testing.assert_allclose(dense(grads["emb"], V), want, atol=1e-6)
    slopes = jax.grad(lambda weights: jnp.sum(jnp.sin(dbj.lookup_bag(table, ids, segments, 4, weights=weights))))(weights)
    want = jax.grad(lambda weights: jnp.sum(jnp.sin(jax.ops.segment_sum(values(table)[ids] * weights[:, None], segments, 4))))(weights)
    np.testing.assert_allclose(slopes, want, rtol=1e-5, atol=1e-5)


# ---- trained -----------------------------------------------------------------------------------------------------------------------------


def trained(planes, rule, scale_lr, steps=4):
    """The same steps by the optax chain under jit with donation, and by the reference."""
    table = make(planes)
    bits, scale = np.array(table.bits), np.array(table.scale)
    want = reference.init_state(rule, V, D, planes=planes, scale_lr=scale_lr)
    tx = optax.chain(dbj.freeze_rows({"emb": [0]}), optax.partition({"table": dbj.xor(0.7, rule, scale_lr, seed=9)}, dbj.param_labels))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, ids, dy):
        order = jnp.argsort(ids)
        grads = {"emb": dbj.RowGrad(jnp.append(ids[order], V), jnp.pad(dy[order], ((0, 1), (0, 0))), num_rows=V)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"emb": jax.tree.map(jnp.array, table)}
    state = tx.init(params)
    rng = np.random.default_rng(2)
    for _ in range(steps):
        ids = rng.permutation(np.arange(1, V))[:10].astype(np.int32)
        dy = rng.normal(size=(10, D)).astype(np.float32)
        reference.update(bits, scale, want, ids, dy, rule=rule, dim=D, planes=planes, lr=0.7, scale_lr=scale_lr, seed=9)
        params, state = step(params, state, ids, dy)
    return params["emb"], state, (bits, scale, want)


@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
@pytest.mark.parametrize(
    ("planes", "rule"),
    [(2, Counter(2)), (4, Counter(8)), (3, Counter(6, norm="rms", dead_zone=0.25, anneal=3.0)), (2, Counter(8, every=2))],
)
def test_training_is_that_of_the_reference(planes, rule, scale_lr):
    table, state, (bits, scale, want) = trained(planes, rule, scale_lr)
    same_bits(table.bits, bits)
    same_bits(table.scale, scale)
    assert (bits != np.asarray(make(planes).bits)).any()
    exported = dbj.export_state(state)["emb"]
    assert set(exported) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
    arrays = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dbj.TableState))[-1].arrays
    hidden = (rule.bits - planes) * 2
    assert ("counter" in arrays) == (hidden > 0)
    assert ("record" in arrays) == (scale_lr > 0)
    held = sum(x.nbytes for x in arrays.values()) + table.bits.nbytes + table.scale.nbytes
    assert held <= V * (2 * rule.bits + 20)  # exactly `bits` bits a weight, and 20 bytes a row


def test_the_numbers_of_a_record_have_names():
    table, state, (_, _, want) = trained(4, Counter(8), 3e-3)
    state = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dbj.TableState))[-1]
    assert state.record.shape == (V, 4)
    for name in ("count", "squares", "scale_m", "scale_v"):
        same_bits(getattr(state, name), want[name])
        same_bits(jax.jit(lambda state, name=name: getattr(state, name))(state), want[name])
    frozen = dbj.init_state(table, Counter(8, norm="rms"), 0.0)
    assert [frozen.record, frozen.count, frozen.squares, frozen.scale_m] == [None] * 4
    assert dbj.init_state(table, Counter(8), 0.0).squares.shape == (V,)


def test_the_direct_update_is_that_of_optax():
    table, state = make(3), dbj.init_state(make(3))
    ids, dy = IDS, np.random.default_rng(3).normal(size=(*IDS.shape, D)).astype(np.float32)
    bits, scale, want = np.array(table.bits), np.array(table.scale), reference.init_state(Counter(8), V, D, planes=3)
    reference.update(bits, scale, want, ids.reshape(-1), dy.reshape(-1, D), rule=Counter(8), dim=D, planes=3)
    table, state = jax.jit(dbj.xor_update, donate_argnums=(0, 3))(table, ids, dy, state)
    same_bits(table.bits, bits)
    same_bits(state.squares, want["squares"])
    assert (table.planes, dbj.read_stats({"emb": state})["emb"]["rows"]) == (3, 5)


def test_stacks_under_scan_and_vmap():
    stack = jax.vmap(lambda key: dbj.BinaryTable.create(key, V, D, planes=3))(jax.random.split(jax.random.key(0), 2))
    assert (stack.planes, stack.bits.shape) == (3, (2, V, 6))
    one = [jax.tree.map(lambda x, k=k: x[k], stack) for k in range(2)]
    same_bits(stack.dequantize(), np.stack([values(table) for table in one]))
    same_bits(jax.vmap(lambda table: table[IDS])(stack), np.stack([values(table)[IDS] for table in one]))
    tx, target = dbj.xor(1.0), jnp.linspace(-1, 1, D)

    def loss(params):
        return jax.lax.scan(lambda total, table: (total + jnp.sum((table[IDS] - target) ** 2), None), 0.0, params["emb"])[0]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(dbj.grad(loss, ids=lambda _: {"emb": IDS})(params), state, params)
        return optax.apply_updates(params, updates), state

    params, _ = step({"emb": stack}, tx.init({"emb": stack}))
    for k, table in enumerate(one):
        alone = {"emb": jax.tree.map(lambda x: x[None], table)}
        want, state = step(alone, tx.init(alone))
        same_bits(params["emb"].bits[k], want["emb"].bits[0])
        assert state.tables["emb"].count.shape == (1, V)
    fewer = stack.with_planes(2)
    for k, table in enumerate(one):
        same_bits(fewer.scale[k], table.with_planes(2).scale)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_rows_over_devices(make_mesh, kind):
    mesh = make_mesh("rows", kind=kind)
    table, tx = make(3), dbj.xor(1.0, Counter(8))
    target = jnp.linspace(-1, 1, D)

    @jax.jit
    def step(params, state):
        grads = dbj.grad(lambda p: jnp.sum((p["emb"][IDS] - target) ** 2), ids=lambda _: {"emb": IDS})(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(params):
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params["emb"], state.tables["emb"]

    want, want_state = run({"emb": table})
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("rows", None))), table)
    with jax.set_mesh(mesh):
        got, state = run({"emb": placed})
        assert state.record.sharding.is_equivalent_to(got.bits.sharding, 2)
        same_bits(got.bits, want.bits)
        same_bits(state.record, want_state.record)
        few = jax.jit(lambda table: table.with_planes(2))(got)
        assert few.bits.sharding.is_equivalent_to(got.bits.sharding, 2)
    same_bits(few.bits, want.with_planes(2).bits)
    same_bits(few.scale, want.with_planes(2).scale)


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
        with pytest.raises(ValueError, match=r'exported\[.emb.\] has no sums of squares, .*Counter\(norm="rms"\)'):
            dbj.import_state(fresh, {"emb": given})
        dbj.import_state(fresh, {"emb": given | {"step": 0}})
    adagrad = dbj.xor(1.0, Counter(8, norm="adagrad"))
    with pytest.raises(ValueError, match=r'state of params\[.emb.\] has no sums of squares, .*Counter\(norm="rms"\)'):
        adagrad.update({"emb": dbj.RowGrad(jnp.array([1, V]), jnp.ones((2, D)), V)}, restored, {"emb": table})


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
