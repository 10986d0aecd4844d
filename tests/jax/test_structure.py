"""A table within a loss: one tree structure, and nothing that looks differentiable and is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import dualbin.jax as dbj

V, D = 40, 9
IDS = np.random.default_rng(3).integers(0, 20, (4, 6)).astype(np.int32)
W = np.linspace(-1, 1, D, dtype=np.float32)


def head(y):
    return jnp.sum(jnp.tanh(y @ W) ** 2)


def run(loss, params, jit=True, **given):
    given = given or {"ids": lambda params: {path: IDS for path in params if isinstance(params[path], dbj.BinaryTable)}}
    function = dbj.value_and_grad(loss, **given)
    return (jax.jit(function) if jit else function)(params)


WAYS = [{}, {"capacity": 40}]


@pytest.mark.parametrize("way", [*WAYS, None], ids=["ids", "capacity", "recorded"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_two_trees_in_a_loss(new_table, dense, way, jit):
    """A proximal term, a combination with a tree from outside, and both again in a jit within the loss."""
    params, start = {"emb": new_table(V, D), "w": jnp.ones(3)}, {"emb": new_table(V, D), "w": jnp.zeros(3)}
    parts = {"emb": dbj.BinaryTable.tree_unflatten(params["emb"].tree_flatten()[1], (None, None)), "w": None}

    def loss(p):
        assert jax.tree.structure(p) == jax.tree.structure(start)
        near = jax.tree.map(lambda a, b: jnp.sum((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2), p, start)
        whole = jax.tree.map(lambda a, b: b if a is None else a, p, parts, is_leaf=lambda x: x is None)
        return head(whole["emb"][IDS]) + near["w"] + sum(jax.tree.leaves(lax.stop_gradient(near["emb"])))

    function = dbj.value_and_grad(loss) if way is None else dbj.value_and_grad(loss, **(way or {"ids": lambda _: {"emb": IDS}}))
    value, grads = (jax.jit(function) if jit else function)(params)
    want, want_grad = jax.value_and_grad(lambda w: head(w[IDS]))(params["emb"].dequantize())
    np.testing.assert_allclose(value, want + 3, rtol=1e-5)
    np.testing.assert_allclose(dense(grads["emb"], V), want_grad, atol=1e-5)
    np.testing.assert_allclose(grads["w"], 2 * np.ones(3))


@pytest.mark.parametrize("swapped", [False, True])
def test_tables_of_one_size_have_leaves_of_one_shape(new_table, dense, swapped):
    """Also where fewer rows of one are declared, and where one is a constant: some frameworks compare shapes."""
    names = ("b", "a") if swapped else ("a", "b")
    params = {name: new_table(V, D, seed) for seed, name in enumerate(names)}
    constant, few = new_table(V, D, 7), IDS[:1, :2]

    def loss(p):
        shapes = [[x.shape for x in jax.tree.leaves(table)] for table in (p["a"], p["b"], constant)]
        assert shapes[0] == shapes[1] == shapes[2]
        assert len(shapes[0]) == 4
        return head(p[names[0]][IDS]) + head(p[names[1]][few])

    _, grads = run(loss, params, ids=lambda _: {names[0]: IDS, names[1]: few})
    for name, ids in zip(names, (IDS, few), strict=True):
        want = jax.grad(lambda w, ids=ids: head(w[ids]))(params[name].dequantize())
        np.testing.assert_allclose(dense(grads[name], V), want, atol=1e-5)


def test_outside_a_loss_a_table_has_its_data_alone(new_table):
    table, seen = new_table(V, D), []

    def loss(p):
        seen.append(p["emb"])
        return head(p["emb"][IDS]), p

    (_, aux), _ = run(loss, {"emb": table}, has_aux=True, ids=lambda _: {"emb": IDS})
    for each in (aux["emb"], *seen):
        assert len(jax.tree.leaves(each)) == 2
    np.testing.assert_array_equal(aux["emb"].bits, table.bits)


module_level = jax.jit(lambda table, ids: head(table[ids]))


@pytest.mark.parametrize("way", WAYS, ids=["ids", "capacity"])
def test_one_jitted_function_inside_and_outside(new_table, dense, way):
    """Its traces for constant tables, for two tables of one size and for two calls are never mixed up."""
    a, b, constant = (new_table(V, D, seed) for seed in (1, 2, 3))
    want = [jax.value_and_grad(lambda w: head(w[IDS]))(table.dequantize()) for table in (a, b, constant)]
    before = float(module_level(constant, IDS))
    given = way or {"ids": lambda _: {"a": IDS, "b": [IDS, np.arange(25)]}}

    def loss(p):
        return module_level(constant, IDS) + module_level(p["a"], IDS) + 2 * module_level(p["b"], IDS)

    for jit in (True, False):
        for x, y, want_x, want_y in ((a, b, want[0], want[1]), (b, a, want[1], want[0])):
            value, grads = run(loss, {"a": x, "b": y}, jit, **given)
            np.testing.assert_allclose(value, want[2][0] + want_x[0] + 2 * want_y[0], rtol=1e-5)
            np.testing.assert_allclose(dense(grads["a"], V), want_x[1], atol=1e-5)
            np.testing.assert_allclose(dense(grads["b"], V), 2 * want_y[1], atol=1e-5)
    assert float(module_level(constant, IDS)) == before


def test_eager_steps_trace_an_inner_jit_once(new_table):
    traces = []

    @jax.jit
    def inner(table, ids):
        traces.append(0)
        return head(table[ids])

    for seed in range(3):
        run(lambda p: inner(p["emb"], IDS), {"emb": new_table(V, D, seed)}, jit=False)
    assert len(traces) == 1


def in_carry(table):
    return lax.scan(lambda carry, i: ((carry[0], carry[1] + head(carry[0][i])), None), (table, 0.0), IDS)[0][1]


def in_cond(table):
    return lax.cond(IDS[0, 0] >= 0, lambda t: head(t[IDS]), lambda t: 2 * head(t[IDS]), table)


def in_vmap(table):
    return jax.vmap(lambda t, i: head(t[i]), in_axes=(None, 0))(table, IDS).sum()


def in_checkpoint(table):
    return jax.checkpoint(lambda t, i: head(t[i]))(table, IDS)


def in_switch_of_jits(table):
    return jax.jit(lambda t: 1.0 * jax.jit(lambda u: head(u[IDS]))(t))(table)


def mapped(table):
    return head(jax.tree.map(lambda x: x * 1, table)[IDS])


@pytest.mark.parametrize("case", [in_carry, in_cond, in_vmap, in_checkpoint, in_switch_of_jits, mapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", WAYS, ids=["ids", "capacity"])
def test_tables_as_arguments(new_table, dense, case, way):
    table = new_table(V, D)
    value, grads = run(lambda p: case(p["emb"]), {"emb": table}, **way)
    want, want_grad = jax.value_and_grad(lambda w: sum(head(w[i]) for i in IDS))(table.dequantize())
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(dense(grads["emb"], V), want_grad, atol=1e-5)


def test_stop_gradient_of_a_table(new_table):
    _, grads = run(lambda p: head(lax.stop_gradient(p["emb"])[IDS]), {"emb": new_table(V, D)})
    assert not grads["emb"].rows.any()


def test_specs_from_outside(new_table, dense, mesh):
    params = {"emb": new_table(V, D)}
    specs = dbj.partition_specs(params)

    def local(p, ids):
        return lax.psum(head(p["emb"][ids]), "batch")

    def loss(p):
        whole = PartitionSpec()
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, PartitionSpec("batch")), out_specs=whole)(p, IDS)

    _, grads = run(loss, params)
    want = jax.grad(lambda w: head(w[IDS]))(params["emb"].dequantize())
    np.testing.assert_allclose(dense(grads["emb"], V), want, atol=1e-5)


def test_tables_of_one_size_may_declare_different_numbers_of_rows(new_table, dense):
    params = {"a": new_table(V, D, 1), "b": new_table(V, D, 2)}
    _, grads = run(lambda p: head(p["a"][IDS]) + head(p["b"][IDS[0]]), params, ids=lambda _: {"a": IDS, "b": IDS[0]})
    for name, ids in (("a", IDS), ("b", IDS[0])):
        want = jax.grad(lambda w, ids=ids: head(w[ids]))(params[name].dequantize())
        np.testing.assert_allclose(dense(grads[name], V), want, atol=1e-5)
        assert not grads[name].missed()


# ---- what has no gradient ----------------------------------------------------------------------------------------------------------------

PENALTIES = {
    "scale": lambda p: jnp.sum(p["emb"].scale ** 2),
    "leaves": lambda p: sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(p)),
    "jit": lambda p: jax.jit(lambda t: jnp.sum(jnp.abs(t.scale)))(p["emb"]),
    "scan": lambda p: lax.scan(lambda total, _: (total + p["emb"].scale.sum(), None), 0.0, IDS)[0],
    "norm": lambda p: optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), p)),
}


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_without_a_gradient_raises(new_table, name, jit):
    params = {"emb": new_table(V, D)}
    with pytest.raises(ValueError, match=r"depends on the scales or the leaves of the table 'emb'.*table\[ids\].*stop_gradient"):
        run(lambda p: head(p["emb"][IDS]) + 1e-3 * PENALTIES[name](p), params, jit)
    run(lambda p: head(p["emb"][IDS]) + 1e-3 * lax.stop_gradient(PENALTIES[name](p)), params, jit)


def test_a_metric_of_scales_is_no_penalty(new_table):
    table = new_table(V, D)
    (_, aux), _ = run(lambda p: (head(p["emb"][IDS]), p["emb"].scale.mean()), {"emb": table}, has_aux=True, ids=lambda _: {"emb": IDS})
    np.testing.assert_allclose(aux, table.scale.mean(), rtol=1e-6)


def test_nested_gradients(new_table):
    table = new_table(V, D)

    def inner(w, table):
        return jnp.sum(jnp.tanh(table[IDS] @ w) ** 2)

    _, grads = run(lambda p: inner(p["w"] - 0.1 * jax.grad(inner)(p["w"], p["emb"]), p["emb"]), {"emb": table, "w": jnp.asarray(W)})
    want = jax.grad(lambda t, w: jnp.sum(jnp.tanh(t[IDS] @ (w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(t[IDS] @ w) ** 2))(w))) ** 2))
    full = want(table.dequantize(), jnp.asarray(W))
    np.testing.assert_allclose(jnp.zeros((V, D)).at[grads["emb"].ids].add(grads["emb"].rows, mode="drop"), full, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"'emb' is already part of a loss.*BinaryTable\(table.bits, .*table.planes\)"):
        run(lambda p: run(lambda q: head(q["emb"][IDS]), p, jit=False)[0], {"emb": table})
