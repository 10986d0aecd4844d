"""Tables and batches on a mesh: the same rows, bits and buffers as on one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter, Sign

V, D, N = 64, 24, 32
W = np.random.default_rng(4).normal(size=D).astype(np.float32)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def batches(steps):
    rng = np.random.default_rng(2)
    return [rng.integers(0, 40, (N // 4, 4)).astype(np.int32) for _ in range(steps)]


def head(y):
    return jnp.sum(jnp.sin(y @ W) ** 2 + y[..., 0] * 0.3)


TX = dbj.xor(1.0, Counter(4, eta=8.0), 1e-2, seed=7)


def plain(table, ids):
    return head(table[ids])


def make_step(loss=plain, tx=TX):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        grads = dbj.grad(loss, ids=lambda _, ids: ids)(table, ids)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state, grads

    return step


@pytest.fixture(scope="module")
def one_device():
    """Table, state and row gradients of ten steps on one device."""
    table = fresh()
    step, state, grads = make_step(), TX.init(table), []
    for ids in batches(10):
        table, state, grad = step(table, state, ids)
        grads.append(grad)
    return jax.tree.map(np.asarray, (table, state, grads))


def fresh():
    return dbj.BinaryTable.create(jax.random.key(5), V, D)


def place(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def pointers(x):
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def flipped(got, want):
    return np.unpackbits(np.asarray(got) ^ want).mean()


def assert_same_training(got, want):
    table, state, grads = got
    one_table, one_state, one_grads = want
    assert flipped(table.bits, one_table.bits) < 1e-3
    assert flipped(one_table.bits, np.asarray(fresh().bits)) > 0.1
    np.testing.assert_allclose(table.scale, one_table.scale, rtol=1e-5)
    np.testing.assert_array_equal(state.tables.count, one_state.tables.count)
    assert int(state.tables.step) == 10
    for grad, one in zip(grads, one_grads, strict=True):
        np.testing.assert_array_equal(grad.ids, one.ids)
        np.testing.assert_allclose(grad.rows, one.rows, rtol=1e-6, atol=1e-6 * np.abs(one.rows).max())


def assert_shards_in_place(table, state, before):
    assert [pointers(x) for x in (table.bits, table.scale, state.tables.counter, state.tables.record)] == before


CASES = {  # axes of the mesh, of the table and of the batch
    "batch": ("x", (), ("x",)),
    "rows": ("x", ("x",), ()),
    "rows, with a second entry": ("x", ("x", None), ()),
    "both on one axis": ("x", ("x",), ("x",)),
    "both on two axes": ("xy", ("y",), ("x", "y")),
    "rows on two axes": ("xy", (("x", "y"),), ("y",)),
}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_training_under_jit(one_device, make_mesh, kind, case):
    names, rows, batch = CASES[case]
    mesh = make_mesh(*names, kind=kind)
    table = place(fresh(), mesh, *rows)
    state = TX.init(table)
    assert state.tables.counter.sharding.is_equivalent_to(table.bits.sharding, 2)
    before = [pointers(x) for x in (table.bits, table.scale, state.tables.counter, state.tables.record)]
    step, grads = make_step(), []
    first, *rest = (place(ids, mesh, *batch) for ids in batches(10))
    text = step.lower(table, state, first).compile().as_text()
    assert_no_table_travels(text, len(table.bits.addressable_shards[0].data))
    for ids in (first, *rest):
        table, state, grad = step(table, state, ids)
        grads.append(jax.tree.map(np.asarray, grad))
    assert table.bits.sharding.is_equivalent_to(NamedSharding(mesh, P(*rows)), 2)
    assert_shards_in_place(table, state, before)
    shards = [np.asarray(shard.data) for shard in table.bits.addressable_shards]
    assert all(np.array_equal(shard, shards[0]) for shard in shards) or rows
    assert_same_training((table, state, grads), one_device)


def assert_no_table_travels(text, share):
    """No collective moves packed bits of the table's size, and each device looks up its own part of the batch only."""
    for results in re.findall(r" = (.*?) (?:all-gather|all-to-all|collective-permute|collective-broadcast)(?:-start)?\(", text):
        assert not re.search(rf"u8\[|f32\[{V},", results), results
    assert f"f32[{V},{D}]" not in text
    assert re.findall(rf"u8\[{share},{D // 8}\][^\n]*custom_call_target=\"dualbin_(?:lookup|masks|xor_rows)", text)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_each_device_looks_up_its_own_slice(make_mesh, kind):
    mesh = make_mesh("x", kind=kind)
    table, ids = place(fresh(), mesh), place(batches(1)[0], mesh, "x")
    run = jax.jit(dbj.lookup)
    want = np.asarray(fresh()[batches(1)[0]])
    got = run(table, ids)
    np.testing.assert_array_equal(got, want)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 3)
    calls = re.findall(r"= \(?f32\[([\d,]+)\]\S* custom-call\([^\n]*\"dualbin_lookup\"", run.lower(table, ids).compile().as_text())
    assert calls == [f"{N // 4 // mesh.size},4,{D}"]


@pytest.mark.parametrize("spread", [True, False], ids=["sharded batch", "whole batch"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT, "shard_map"], ids=str)
@pytest.mark.parametrize(("dim", "array"), [(24, "u8["), (96, "u32[")], ids=["bytes", "words"])
def test_packed_rows_travel(make_mesh, kind, spread, dim, array):
    """What a lookup in a table sharded by rows exchanges are ids, packed bits and scales, and no floats of D columns."""
    mesh, spec = make_mesh("x", kind=AUTO if kind == "shard_map" else kind), P("x" if spread else None)
    whole = dbj.BinaryTable.create(jax.random.key(3), V, dim)
    table, ids = place(whole, mesh, "x"), place(batches(1)[0], mesh, *spec)
    run = jax.jit(dbj.lookup)
    if kind == "shard_map":
        local = dataclasses.replace(table, axis="x")
        specs = jax.tree.map(lambda _: P("x"), local)
        run = jax.jit(jax.shard_map(dbj.lookup, mesh=mesh, in_specs=(specs, spec), out_specs=spec))
        table = local
    np.testing.assert_array_equal(run(table, ids), np.asarray(whole[batches(1)[0]]))
    text = run.lower(table, ids).compile().as_text()
    moved = re.findall(r" = (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    count = dim // 8 + 4 if array == "u8[" else dim // 32 + 1
    assert any(f",{count}]" in results and array in results for results in moved)
    assert not any("f32[" in results or "f16[" in results for results in moved)


def of_vmap(table, ids):
    return jax.vmap(lambda i: plain(table, i))(ids).sum()


LOSSES = {
    "checkpoint": lambda table, ids: jax.checkpoint(lambda i: plain(table, i))(ids),
    "jit": lambda table, ids: jax.jit(lambda i: plain(table, i))(ids),
    "vmap": of_vmap,
    "scan": lambda table, ids: lax.scan(lambda total, i: (total + plain(table, i), None), 0.0, ids.T)[0],
    "twice": lambda table, ids: plain(table, ids) + 2 * plain(table, ids[:, :2]),
}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("rows", ["replicated", "rows"])
@pytest.mark.parametrize("name", LOSSES)
def test_transformations(make_mesh, kind, rows, name):
    """A sharded batch with a replicated or sharded table; the simplest with a capacity, too."""
    mesh, ids = make_mesh("x", kind=kind), batches(1)[0]
    table, sharded = place(fresh(), mesh, "x" if rows == "rows" else None), place(ids, mesh, "x")
    if (name, kind, rows) == ("vmap", EXPLICIT, "rows"):
        with pytest.raises(ValueError, match="Explicit mesh axis x, over which this vmap maps: look all ids up before the vmap"):
            dbj.grad(of_vmap, ids=lambda _, ids: ids)(table, sharded)
        return
    want = jax.jit(dbj.grad(LOSSES[name], ids=lambda _, ids: ids))(fresh(), ids)
    used = np.asarray(want.ids) < V
    for way in ({"ids": lambda _, ids: ids}, {"capacity": N})[: 1 + (name == "twice")]:
        got = jax.device_get(jax.jit(dbj.grad(LOSSES[name], **way))(table, sharded))
        np.testing.assert_array_equal(got.ids[: len(used)][used], want.ids[used])
        np.testing.assert_allclose(got.rows[: len(used)][used], want.rows[used], rtol=1e-5, atol=1e-6 * np.abs(want.rows).max())


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
def test_no_ids_at_all(make_mesh, kind):
    mesh = make_mesh("x", kind=kind)
    table = place(fresh(), mesh, "x")
    state, bits = TX.init(table), np.asarray(fresh().bits)
    table, state, grads = make_step(lambda table, ids: jnp.sum(table[ids] ** 2))(table, state, jnp.zeros((0, 4), jnp.int32))
    assert grads.ids.tolist() == [V]
    assert int(state.tables.step) == 0
    np.testing.assert_array_equal(table.bits, bits)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bad_ids_in_a_sharded_table_are_nan(make_mesh, kind, dtype):
    mesh = make_mesh("x", kind=kind)
    table = place(fresh(), mesh, "x")
    ids = np.array([0, V, 17, -1, V - 1, 2**31 - 1, -(2**31), 3], np.int32)
    good = (ids >= 0) & (ids < V)
    for spec in ((), ("x",)):
        got = np.asarray(jax.jit(dbj.lookup, static_argnums=2)(table, place(ids, mesh, *spec), dtype).astype(jnp.float32))
        assert np.isnan(got[~good]).all()
        np.testing.assert_array_equal(got[good], dbj.lookup(fresh(), ids[good], dtype).astype(jnp.float32))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rows", [False, True], ids=["replicated", "rows"])
def test_training_inside_shard_map(one_device, make_mesh, kind, check_vma, rows):
    """The loss inside a shard_map, and the update inside another."""
    mesh = make_mesh("x", kind=kind)
    table = dataclasses.replace(place(fresh(), mesh, "x" if rows else None), axis="x" if rows else None)
    state = TX.init(table)

    def loss(table, ids):
        local = jax.shard_map(
            lambda table, ids: lax.psum(plain(table, ids), "x"),
            mesh=mesh,
            in_specs=(dbj.partition_specs(table), P("x")),
            out_specs=P(),
            check_vma=check_vma,
        )
        return local(table, ids)

    def update(table, state, grads):
        updates, state = TX.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    specs = dbj.partition_specs(table), dbj.partition_specs(state, "x" if rows else None)
    step_of_shard = jax.shard_map(update, mesh=mesh, in_specs=(*specs, P()), out_specs=specs, check_vma=check_vma)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        grads = dbj.grad(loss, ids=lambda _, ids: ids)(table, ids)
        return *step_of_shard(table, state, grads), grads

    before = [pointers(x) for x in (table.bits, table.scale, state.tables.counter, state.tables.record)]
    grads = []
    for ids in batches(10):
        table, state, grad = step(table, state, place(ids, mesh, "x"))
        grads.append(jax.tree.map(np.asarray, grad))
    assert_shards_in_place(table, state, before)
    assert_same_training((table, state, grads), one_device)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_inside_shard_map(one_device, make_mesh, check_vma):
    """Everything inside: ids are gathered before the rows are declared, sums are added after."""
    mesh = make_mesh("x")
    table = dataclasses.replace(place(fresh(), mesh, "x"), axis="x")

    def local(table, ids):
        declared = lax.all_gather(ids, "x", tiled=True)
        grads = dbj.grad(plain, ids=lambda *_: declared)(table, ids)
        # with check_vma JAX knows that the tap is the same everywhere, and has added the sums by itself
        return lax.pmax(grads.ids, "x"), grads.rows if check_vma else lax.psum(grads.rows, "x")

    run = jax.shard_map(local, mesh=mesh, in_specs=(dbj.partition_specs(table), P("x")), out_specs=P(), check_vma=check_vma)
    ids, rows = jax.jit(run)(table, batches(1)[0])
    want = one_device[2][0]
    np.testing.assert_array_equal(ids, want.ids)
    np.testing.assert_allclose(rows, want.rows, rtol=1e-6, atol=1e-6 * np.abs(want.rows).max())


def test_scan_over_steps_in_place(one_device, make_mesh):
    mesh = make_mesh("x")
    table = place(fresh(), mesh, "x")
    state = TX.init(table)
    step = make_step()
    all_ids = jnp.asarray(np.stack(batches(10)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(table, state, all_ids):
        def body(carry, ids):
            table, state, grads = step(*carry, ids)
            return (table, state), grads

        return lax.scan(body, (table, state), all_ids)

    text = run.lower(table, state, all_ids).compile().as_text()
    assert not [line for line in text.splitlines() if " copy" in line and f"u8[{V // mesh.size}," in line]
    before = pointers(table.bits)
    (table, state), _ = run(table, state, all_ids)
    assert pointers(table.bits) == before
    want, want_state, _ = one_device
    assert flipped(table.bits, want.bits) < 1e-3
    np.testing.assert_array_equal(state.tables.count, want_state.tables.count)


def test_hash_takes_the_row_of_the_whole_table(one_device, make_mesh):
    """With replicated ids no sum changes its order, so a sharded table must end with the very same bits."""
    mesh = make_mesh("x")
    table = place(fresh(), mesh, "x")
    state, step = TX.init(table), make_step()
    for ids in batches(10):
        table, state, _ = step(table, state, place(ids, mesh))
    np.testing.assert_array_equal(table.bits, one_device[0].bits)
    np.testing.assert_array_equal(state.tables.counter, one_device[1].tables.counter)
    assert dbj.read_stats(state) == dbj.read_stats(one_device[1])


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize(
    ("rule", "scale_lr"), [(Sign(), 0.0), (Counter(1, dead_zone=1.0), 0.01), (Counter(2, every=2), 0.0), (Bop(every=2), 0.01)], ids=str
)
def test_other_rules_in_shards(make_mesh, kind, rule, scale_lr):
    """States with other arrays, and with none, end with the bits of one device."""
    mesh, tx = make_mesh("x", kind=kind), dbj.xor(1.0, rule, scale_lr, seed=7)
    ends = []
    for on_mesh in (False, True):
        table, step = place(fresh(), mesh, "x") if on_mesh else fresh(), make_step(tx=tx)
        state = tx.init(table)
        for ids in batches(4):
            table, state, _ = step(table, state, place(ids, mesh) if on_mesh else ids)
        ends.append((table.bits, table.scale, dbj.export_state(state)[""], dbj.read_stats(state)[""]))
    one, many = ends
    assert flipped(one[0], np.asarray(fresh().bits)) > 0.01
    for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(got, want)


def test_direct_update(one_device, make_mesh):
    mesh = make_mesh("x")
    rule = Counter(4, eta=8.0)
    rng = np.random.default_rng(0)
    ids, dy = batches(1)[0], rng.normal(size=(N // 4, 4, D)).astype(np.float32)
    run = jax.jit(functools.partial(dbj.xor_update, rule=rule, seed=3), donate_argnums=(0, 3))
    want, want_state = run(fresh(), ids, dy, dbj.init_state(fresh(), rule))
    for rows, batch in (((), ("x",)), (("x",), ()), (("x",), ("x",))):
        table = place(fresh(), mesh, *rows)
        state = dbj.init_state(table, rule)
        before = pointers(table.bits)
        got, got_state = run(table, place(ids, mesh, *batch), place(dy, mesh, *batch), state)
        assert pointers(got.bits) == before
        np.testing.assert_array_equal(got.bits, want.bits)
        np.testing.assert_array_equal(got.scale, want.scale)
        np.testing.assert_array_equal(got_state.stats, want_state.stats)


def test_orbax_keeps_shards(make_mesh, tmp_path):
    mesh, step = make_mesh("x"), make_step()
    table = place(fresh(), mesh, "x")
    carry = (table, TX.init(table))
    for number, ids in enumerate(batches(6)):
        carry = step(*carry, place(ids, mesh, "x"))[:2]
        if number == 2:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "3", carry)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), carry)
    with ocp.StandardCheckpointer() as checkpointer:
        resumed = checkpointer.restore(tmp_path / "3", like)
    assert len(resumed[0].bits.addressable_shards[0].data) == V // mesh.size
    for ids in batches(6)[3:]:
        resumed = step(*resumed, place(ids, mesh, "x"))[:2]
    for got, want in zip(jax.tree.leaves(resumed), jax.tree.leaves(carry), strict=True):
        np.testing.assert_array_equal(got, want)
