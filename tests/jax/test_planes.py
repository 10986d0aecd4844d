"""Tables of several planes: made, taken apart by the transformations of JAX, trained, served at fewer planes, and kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from planes_tools import IDS, D, V, make, same_bits, trained, values

import dualbin
import dualbin.jax as dbj
from dualbin import reference
from dualbin.rules import Bop, Counter, Sign

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
