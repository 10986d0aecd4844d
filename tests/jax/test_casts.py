"""What is mapped over the leaves of a model: casts of a precision policy, averages of weights, promotion rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter, Sign

V, D = 30, 11
IDS = jnp.array([[1, 2, 3], [2, 5, 7]])


def cast_floats(tree, dtype):
    """What the policies of jmp and of others do to parameters."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.fixture
def params(new_table):
    return {"emb": new_table(V, D), "w": jnp.linspace(-1, 1, D)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_table_with_a_scale_in_half_precision_is_refused(params, dtype, wrap):
    message = r"scale must be float32, got (b?)float16.*dbj.lookup\(table, ids, dtype\)"

    def loss(params):
        params = cast_floats(params, dtype)
        return jnp.sum(params["emb"][IDS].astype(dtype) @ params["w"])

    for run in (lambda: wrap(loss)(params), lambda: wrap(dbj.grad(loss, ids=lambda _: {"emb": IDS}))(params)):
        with pytest.raises(TypeError, match=message):
            run()
    tx = dbj.xor(1.0)
    with pytest.raises(TypeError, match=message):
        tx.init({"emb": cast_floats(params["emb"], dtype)})


def test_the_way_that_the_message_names(params):
    def loss(params, dtype):
        dense = cast_floats({"w": params["w"]}, dtype)
        return jnp.sum(dbj.lookup(params["emb"], IDS, dtype) @ dense["w"]).astype(jnp.float32)

    half = dbj.grad(loss, ids=lambda *_: {"emb": IDS})(params, jnp.bfloat16)["emb"]
    full = dbj.grad(loss, ids=lambda *_: {"emb": IDS})(params, jnp.float32)["emb"]
    assert half.rows.dtype == jnp.float32
    np.testing.assert_allclose(half.rows, full.rows, rtol=1e-2)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_averages_of_leaves_are_refused_with_the_call_that_averages(params, wrap):
    """An average of packed bytes is no table. What comes out has other dtypes, and its first use says what to call."""
    other = params | {"emb": params["emb"]}
    mean = wrap(lambda a, b: optax.incremental_update(a, b, 0.1))(params, other)
    with pytest.raises(TypeError, match=r"bits must be uint8, got float32.*dualbin\.jax\.average"):
        mean["emb"][IDS]
    ema = optax.ema(0.9, accumulator_dtype=jnp.float32)
    average, _ = wrap(ema.update)(params, ema.init(params))
    with pytest.raises(TypeError, match=r"bits must be uint8, got float32.*dualbin\.jax\.average"):
        average["emb"][IDS]


@pytest.mark.parametrize("rule", [Sign(), Counter(8), Counter(2, every=2), Bop()], ids=str)
def test_strict_promotion(params, rule):
    """Nothing relies on implicit promotion, whose rules a program may tighten."""
    with jax.numpy_dtype_promotion("strict"):
        tx = dbj.xor(optax.linear_schedule(1.0, 0.5, 10), rule)
        tables = {"emb": params["emb"]}
        state = tx.init(tables)

        def loss(params):
            rows = dbj.lookup_bag(params["emb"], IDS.reshape(-1), jnp.repeat(jnp.arange(2), 3), 2, mode="mean")
            return jnp.sum(jnp.sin(params["emb"][IDS])) + jnp.sum(rows) + jnp.sum(dbj.attend(params["emb"], rows))

        for way in ({"ids": lambda _: {"emb": jnp.arange(V)}}, {"capacity": V}, {}):
            grads = dbj.grad(loss, **way)(tables)
        updates, state = tx.update(grads, state, tables)
        new = optax.apply_updates(tables, updates)["emb"]
        fused = dbj.xor_update(new, IDS, jnp.ones((*IDS.shape, D)), dbj.init_state(new, rule), rule=rule)
        dbj.accumulate(lambda p, ids: jnp.mean(p["emb"][ids]), 2)(tables, IDS)
        jax.vmap(lambda ids: new[ids])(IDS)
    assert isinstance(fused[0], dbj.BinaryTable)
