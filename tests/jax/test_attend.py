"""All rows of a table at once in a loss: tied output weights by `attend`, and `dequantize`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dualbin.jax as dbj

V, D = 50, 11
IDS = jnp.array([[1, 2, 3], [2, 5, 7]])
ALL = {"ids": lambda *_: {"emb": jnp.arange(V)}}
WAYS = {"declared": ALL, "checked": ALL | {"checked": True}, "recorded": {}, "capacity": {"capacity": V}}


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 0]).mean()


def tied_by_attend(params):
    return cross_entropy(dbj.attend(params["emb"], params["emb"][IDS].mean(1)))


def tied_by_dequantize(params):
    return cross_entropy(params["emb"][IDS].mean(1) @ params["emb"].dequantize().T)


def tied_dense(params):
    return cross_entropy(params["emb"][IDS].mean(1) @ params["emb"].T)


@pytest.fixture
def params(new_table):
    return {"emb": new_table(V, D, padding_idx=9)}


@pytest.mark.parametrize("loss", [tied_by_attend, tied_by_dequantize])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_tied_weights_have_both_gradients(params, dense, loss, way, wrap):
    want = jax.grad(tied_dense)({"emb": params["emb"].dequantize()})["emb"].at[9].set(0)
    value, grads = wrap(dbj.value_and_grad(loss, **way))(params)
    np.testing.assert_allclose(value, tied_dense({"emb": params["emb"].dequantize()}), rtol=1e-6)
    np.testing.assert_allclose(dense(grads["emb"], V).at[9].set(0), want, atol=1e-6)
    assert not grads["emb"].missed()


def test_tied_weights_in_a_scan(params, dense):
    """Where the loss cannot be recorded, `ids` names all rows."""

    def loss(params):
        def body(total, ids):
            return total + jnp.sum(jnp.sin(dbj.attend(params["emb"], params["emb"][ids]))), None

        return jax.lax.scan(body, 0.0, IDS)[0]

    def dense_loss(w):
        return sum(jnp.sum(jnp.sin(w[ids] @ w.T)) for ids in IDS)

    got = dbj.grad(loss, **ALL)(params)["emb"]
    np.testing.assert_allclose(dense(got, V).at[9].set(0), jax.grad(dense_loss)(params["emb"].dequantize()).at[9].set(0), atol=1e-5)


@pytest.mark.parametrize("loss", [tied_by_attend, tied_by_dequantize])
@pytest.mark.parametrize("way", [{"ids": lambda *_: {"emb": IDS}}, {"capacity": V - 1}], ids=["ids", "capacity"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_that_are_not_declared(params, loss, way, wrap):
    """All rows are used, and some have no place in the gradient: an error that says how to declare them."""
    with pytest.raises(ValueError, match=r"uses all 50 rows .* declared.*jnp\.arange\(50\)"):
        wrap(dbj.grad(loss, **way))(params)


def test_as_many_ids_as_rows_that_are_not_all_rows(params):
    """Only the values of the ids tell that a row is missing: the gradient is not a number, so it can train nothing."""
    some = {"ids": lambda *_: {"emb": jnp.tile(jnp.arange(10), 5)}}
    grads = jax.jit(dbj.grad(tied_by_attend, **some))(params)["emb"]
    assert grads.missed()
    assert jnp.isnan(grads.rows[:10]).all()
    with pytest.raises(RuntimeError, match="rows of the table 'emb' that were not declared"):
        dbj.grad(tied_by_attend, **some, checked=True)(params)


def test_a_table_that_does_not_train_is_a_constant(params):
    """The gradient of the rest is right; the table has none."""
    table = params["emb"]
    got = jax.grad(lambda h: jnp.sum(jnp.sin(dbj.attend(table, h))))(jnp.ones((3, D)))
    np.testing.assert_allclose(got, jax.grad(lambda h: jnp.sum(jnp.sin(h @ table.dequantize().T)))(jnp.ones((3, D))), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("projection", [False, True])
def test_module_like_that_of_flax(dtype, projection):
    """`BinaryEmbed.attend` is `nnx.Embed.attend` with the values of the table."""
    embed = dbj.BinaryEmbed(V, D, dtype=dtype, projection=projection, rngs=nnx.Rngs(0))
    if projection:
        embed.projection.set_value(jax.random.normal(jax.random.key(2), (D, D)))
    peer = nnx.Embed(V, D, dtype=dtype, rngs=nnx.Rngs(0))
    peer.embedding.set_value(embed(jnp.arange(V)).astype(jnp.float32))
    query = jax.random.normal(jax.random.key(1), (2, 3, D))
    got, want = embed.attend(query), peer.attend(query)
    assert (got.shape, got.dtype) == (want.shape, want.dtype) == ((2, 3, V), dtype)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-1)


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (jnp.ones((2, D + 1)), ValueError, r"query must have shape \[\.\.\., 11\], got \[2, 12\]"),
        (jnp.ones((2, D), jnp.int32), TypeError, "query must be float32, float16 or bfloat16, got int32"),
        (1.0, ValueError, r"query must have shape \[\.\.\., 11\], got \[\]"),
    ],
)
def test_wrong_queries(params, query, error, message):
    with pytest.raises(error, match=message):
        dbj.attend(params["emb"], query)
