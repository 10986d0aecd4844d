"""Row gradients against `jax.grad` of a dense float model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import dualbin.jax as dbj
from dualbin import reference

V, D = 50, 19
IDS = np.random.default_rng(3).integers(0, 20, (4, 8)).astype(np.int32)  # many repeats
W = np.random.default_rng(4).normal(size=D).astype(np.float32)


def head(y):
    return jnp.sum(jnp.sin(y @ W) ** 2 + y[..., 0] * 0.3)


def once(look_up, ids):
    return head(look_up(ids))


def twice(look_up, ids):
    return head(look_up(ids[0])) + 2 * head(look_up(ids[1:])) + jnp.sum(look_up(ids[0]) * look_up(ids[1]))


def computed(look_up, ids):
    return head(look_up(lax.fori_loop(0, 3, lambda _, i: (i * 3 + 1) % 20, ids)))


def inner_jit(look_up, ids):
    return jax.jit(lambda i: head(look_up(i)))(ids)


def nested_jit(look_up, ids):
    return jax.jit(lambda i: jax.jit(lambda j: head(look_up(j)))(i[:2]) + head(look_up(i[2:])))(ids)


def fori_loop(look_up, ids):
    return lax.fori_loop(0, 4, lambda k, total: total + head(look_up(jnp.asarray(ids)[k])) * (1 + total * 0.01), 0.0)


def scan(look_up, ids):
    return lax.scan(lambda total, i: (total + head(look_up(i)) * (1 + total * 0.01), None), 0.0, ids)[0]


def checkpoint(look_up, ids):
    return jax.checkpoint(lambda i: head(look_up(i)))(ids)


def scan_checkpoint(look_up, ids):
    return lax.scan(jax.checkpoint(lambda total, i: (total + head(look_up(i)), None)), 0.0, ids)[0]


def vmap(look_up, ids):
    return jax.vmap(lambda i: head(look_up(i)))(ids).sum()


def vmap_twice(look_up, ids):
    return jax.vmap(jax.vmap(lambda i: head(look_up(i[None]))))(ids).sum()


def vmap_jit(look_up, ids):
    return jax.vmap(jax.jit(lambda i: head(look_up(i))))(ids).sum()


def vmap_of_gradients(look_up, ids):
    return jax.vmap(lambda i, k: jax.checkpoint(lambda j: head(look_up(j)) * k)(i))(ids, jnp.arange(4.0)).sum()


def cond(look_up, ids):
    return lax.cond(ids[0, 0] >= 0, lambda i: head(look_up(i)), lambda i: 3.0 * head(look_up(i)), ids)


def cond_in_scan(look_up, ids):
    """Both branches are taken, and one looks nothing up."""

    def step(total, i):
        return total + lax.cond(i[0] % 2 == 0, lambda i: head(look_up(i)), lambda _: 1.0, i), None

    return lax.scan(step, 0.0, ids)[0]


def vmap_switch(look_up, ids):
    """Under vmap a cond becomes a select: both branches run for every member."""
    return jax.vmap(lambda i: lax.cond(i[0] % 2 == 0, lambda j: head(look_up(j)), lambda j: 2.0 * head(look_up(j[:3])), i))(ids).sum()


NESTED = [inner_jit, nested_jit, scan, fori_loop, checkpoint, scan_checkpoint]
NESTED += [vmap, vmap_twice, vmap_jit, vmap_of_gradients, cond, cond_in_scan, vmap_switch]


def declared(loss):
    return dbj.value_and_grad(loss, ids=lambda _, ids: {"emb": [ids, jnp.arange(20)]})


def marked(loss):
    return dbj.value_and_grad(loss, capacity=40)


def recorded(loss):
    return dbj.value_and_grad(loss)


CASES = [(way, case, True) for case in (twice, computed) for way in (declared, marked, recorded)]
CASES += [(way, case, True) for case in NESTED for way in (declared, marked)]  # those of one case follow each other: they share a model
CASES += [(declared, vmap, False), (recorded, once, False)]


@pytest.fixture(scope="module")
def dense_model():
    """Value and gradient of a case with the rows of a float matrix, compiled once for all ways."""

    @functools.cache
    def compiled(case):
        return jax.jit(jax.value_and_grad(lambda w: case(lambda i: w[i], IDS)))

    return lambda case, w: compiled(case)(w)


@pytest.mark.parametrize(("way", "case", "jit"), CASES, ids=lambda x: getattr(x, "__name__", "jit" if x else "eager"))
def test_matches_dense_model(new_table, dense, dense_model, on_gpu, way, case, jit):
    table = new_table(V, D)
    want_value, want = dense_model(case, table.dequantize())

    def loss(params, ids):
        return case(lambda i: params["emb"][i], ids) + params["b"] ** 2

    run = way(loss)
    value, grads = (jax.jit(run) if jit else run)({"emb": table, "b": 3.0}, IDS)
    assert isinstance(grads["emb"].scale, dbj.RowGrad)
    assert not grads["emb"].missed()
    np.testing.assert_allclose(dense(grads["emb"], V), want, atol=1e-4)
    np.testing.assert_allclose(value, want_value + 9, rtol=1e-5 if on_gpu else 1e-6)
    assert float(grads["b"]) == 6.0


@pytest.mark.parametrize("case", NESTED, ids=lambda x: x.__name__)
def test_lookups_that_cannot_be_recorded(new_table, case):
    with pytest.raises(ValueError, match=r"rows of the table 'emb' cannot be found.*ids=lambda"):
        dbj.value_and_grad(lambda params: case(lambda i: params["emb"][i], IDS))({"emb": new_table(V, D)})


def test_vmap_over_tables(new_table, dense):
    """An ensemble: each member has a table, a declaration and a gradient of its own."""
    tables = [new_table(V, D, seed) for seed in (1, 2, 3)]
    stacked, ids = jax.tree.map(lambda *x: jnp.stack(x), *tables), np.stack([IDS, IDS[::-1] + 9, IDS * 2])
    for case in (twice, scan_checkpoint):
        for way in ({"ids": lambda _, i: {"emb": i}}, {"capacity": 40}):
            run = dbj.value_and_grad(lambda params, i, case=case: case(lambda j: params["emb"][j], i), **way)
            values, grads = jax.jit(jax.vmap(run))({"emb": stacked}, ids)
            for k, table in enumerate(tables):
                value, want = jax.jit(jax.value_and_grad(lambda w, k=k, case=case: case(lambda j: w[j], ids[k])))(table.dequantize())
                np.testing.assert_allclose(values[k], value, rtol=1e-5)
                np.testing.assert_allclose(dense(jax.tree.map(lambda x, k=k: x[k], grads["emb"]), V), want, atol=1e-4)


def test_per_example_gradients(new_table, dense):
    table = new_table(V, D)
    active = dbj.activate(table, IDS)
    taps = jax.vmap(lambda i: jax.grad(lambda tap: head(dataclasses.replace(active, tap=tap)[i]))(active.tap))(IDS)
    for i, tap in zip(IDS, taps, strict=True):
        want = jax.grad(lambda w, i=i: head(w[i]))(table.dequantize())
        np.testing.assert_allclose(dense(dbj.RowGrad(active.row_ids, tap), V), want, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_order_of_summation(new_table, dtype):
    """Bit for bit the documented sum, with a row that occurs thousands of times."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(5000) < 0.7, 5, rng.integers(0, V, 5000)).astype(np.int32)
    dy = np.asarray(jnp.asarray(rng.normal(size=(5000, D)), dtype))

    def loss(table):
        return jnp.sum(dbj.lookup(table, ids, dtype) * dy, dtype=jnp.float32)

    grad = jax.jit(dbj.grad(loss, ids=lambda _: ids))(new_table(V, D))
    rows, want = reference.row_gradient(ids, dy, V)
    assert grad.ids[: len(rows)].tolist() == rows.tolist()
    assert np.asarray(grad.rows[: len(rows)]).tobytes() == want.tobytes()


def test_vmap_costs_no_memory_for_each_member(new_table):
    table, ids = new_table(V, D), np.tile(IDS, (8, 1))
    run = declared(lambda params, ids: vmap(lambda i: params["emb"][i], ids))
    text = jax.jit(run).lower({"emb": table}, ids).as_text()
    slots = dbj.activate(table, (ids, np.arange(20))).tap.shape[0]
    assert f"tensor<{slots}x{D}xf32>" in text
    assert f"tensor<{len(ids)}x{slots}x{D}xf32>" not in text


def test_nothing_of_table_size_in_floats(new_table):
    table = new_table(3001, D)
    run = jax.jit(declared(lambda params, ids: twice(lambda i: params["emb"][i], ids)))
    assert "f32[3001,19]" not in run.lower({"emb": table}, IDS).compile().as_text()


def test_missed(new_table):
    def missed(used, given):
        run = dbj.value_and_grad(lambda table, ids, _: jnp.sum(table[ids] ** 3), ids=lambda _, __, given: given)
        return bool(jax.jit(run)(new_table(V, D), jnp.array(used), jnp.array(given))[1].missed())

    assert not missed([1, 2, 7], [7, 2, 1, 9])
    assert missed([1, 2, 7], [1, 2])
    run = dbj.value_and_grad(lambda table: jnp.sum(table[IDS]), capacity=3)
    assert run(new_table(V, D))[1].missed()


def test_has_aux_and_grad(new_table):
    table = new_table(V, D)

    def loss(table, ids, *, factor):
        y = table[ids]
        return factor * jnp.sum(y), y

    (value, aux), grads = dbj.value_and_grad(loss, has_aux=True)(table, IDS, factor=2.0)
    assert float(value) == float(2 * aux.sum())
    only, aux = dbj.grad(loss, capacity=30, has_aux=True)(table, IDS, factor=2.0)
    assert aux.shape == (*IDS.shape, D)
    np.testing.assert_array_equal(only.rows[:5], grads.rows[:5])
    assert isinstance(dbj.grad(lambda table: jnp.sum(table[IDS]))(table), dbj.RowGrad)


@pytest.mark.parametrize(
    "ids",
    [
        {"block": {"emb": IDS}, "list": [IDS, IDS]},
        {"block/emb": IDS, "list/0": IDS, "list.1": [IDS]},
        {"block.emb": {"a": IDS[0], "b": IDS[1:]}, "list": {"0": IDS, 1: IDS}},
        {"block": {"emb": IDS, "w": None}, "list": (IDS, IDS)},
    ],
)
def test_paths(new_table, ids):
    params = {"block": {"emb": new_table(V, D), "w": W}, "list": [new_table(V, D, 1), new_table(V, D, 2)]}

    def loss(params):
        return sum(head(table[IDS]) for table in (params["block"]["emb"], *params["list"])) + params["block"]["w"].sum()

    grads = dbj.grad(loss, ids=lambda _: ids)(params)
    want = dbj.grad(loss)(params)
    for got, right in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert got.tobytes()[:100] == right.tobytes()[:100]


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ({"emb": IDS, "embedding": IDS}, ValueError, "ids names 'embedding', which is no table; tables are 'emb', 'other'"),
        ({"emb": IDS}, ValueError, "does not name the tables 'other'"),
        ({"emb": IDS, "/emb": IDS, "other": None}, ValueError, "names the table 'emb' twice"),
        (IDS, ValueError, "ids must be a dict by path of the table, got ndarray; tables are 'emb', 'other'"),
        ({"emb": IDS * 0.5, "other": None}, TypeError, "ids of the table 'emb': ids must be integers, got float64"),
    ],
)
def test_ids_that_name_no_table(new_table, ids, error, match):
    params = {"emb": new_table(V, D), "other": new_table(V, D)}
    with pytest.raises(error, match=match):
        dbj.value_and_grad(lambda params: head(params["emb"][IDS]), ids=lambda _: ids)(params)


def test_arguments(new_table):
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        dbj.value_and_grad(3)
    with pytest.raises(TypeError, match="ids must be a function"):
        dbj.value_and_grad(head, ids={"emb": IDS})
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        dbj.value_and_grad(head, capacity=0)
    with pytest.raises(TypeError, match="int32"):
        dbj.value_and_grad(lambda _: 1.0)({"emb": new_table(V, D), "n": jnp.array(3)})


def test_a_table_without_lookups(new_table):
    grad = dbj.grad(lambda table: 0.0 * jnp.sum(table.scale) * 0)(new_table(V, D))
    assert grad.ids.tolist() == [V]
    assert not grad.rows.any()


@pytest.mark.parametrize("case", [once, twice, *NESTED], ids=lambda x: x.__name__)
def test_frozen_table_under_plain_grad(new_table, case):
    """`jax.grad` of the rest of a model: the table is a constant, closed over or an argument."""
    table = new_table(V, D)

    def loss(rest, table, ids):
        return case(lambda i: table[i] * rest["w"], ids)

    rest = {"w": jnp.linspace(0.5, 1.5, D)}
    want = jax.jit(jax.grad(lambda rest, w: case(lambda i: w[i] * rest["w"], IDS)))(rest, table.dequantize())
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(rest, table, IDS)["w"], want["w"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda rest: loss(rest, table, IDS)))(rest)["w"], want["w"], rtol=1e-4, atol=1e-4)


def test_micro_batches_in_a_scan(new_table, dense):
    table = new_table(V, D)
    active = dbj.activate(table, IDS)

    def add(total, ids):
        return total + jax.grad(lambda tap: head(dataclasses.replace(active, tap=tap)[ids]))(active.tap), None

    total, _ = jax.jit(lambda: lax.scan(add, active.tap, IDS))()
    want = jax.grad(lambda w: sum(head(w[ids]) for ids in IDS))(table.dequantize())
    np.testing.assert_allclose(dense(dbj.RowGrad(active.row_ids, total, V), V), want, atol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_around_the_loss(new_table, dense, mesh, check_vma):
    table = new_table(V, D)
    everywhere, split = PartitionSpec(), PartitionSpec("batch")

    def loss(table, ids):
        def local(table, ids):
            return lax.psum(head(table[ids]), "batch")

        return jax.shard_map(local, mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere, check_vma=check_vma)(table, ids)

    grad = jax.jit(dbj.grad(loss, ids=lambda _, ids: ids))(table, IDS)
    want = jax.grad(lambda w: once(lambda i: w[i], IDS))(table.dequantize())
    np.testing.assert_allclose(dense(grad, V), want, atol=1e-4)
