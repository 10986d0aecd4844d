import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin.jax as dbj

V, D = 40, 19


@pytest.fixture
def flips():
    rng = np.random.default_rng(0)
    return dbj.RowFlips(jnp.array([3, 7, 39, V, V, -1]), jnp.asarray(rng.integers(0, 256, (6, 3), np.uint8)))


def xored(bits, flips):
    want = np.array(bits)
    for row, mask in zip(flips.ids, flips.mask, strict=True):
        if 0 <= row < V:
            want[row] ^= np.asarray(mask)
    return want


def test_row_flips(new_table, flips):
    bits = new_table(V, D).bits
    want = xored(bits, flips)
    assert (want != np.asarray(bits)).any()
    for have in (bits, np.asarray(bits)):
        got = have + flips
        assert got.dtype == jnp.uint8
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jax.jit(lambda b, f: b + f)(bits, flips), want)
    np.testing.assert_array_equal(bits + flips + flips, bits)


def test_row_flips_of_a_stack_of_tables(new_table, flips):
    bits = jnp.stack([new_table(V, D, seed).bits for seed in (1, 2)])
    got = jax.vmap(lambda b: b + flips)(bits)
    np.testing.assert_array_equal(got, np.stack([xored(b, flips) for b in bits]))


def test_row_set_is_exact(new_table):
    scale = jnp.full((V, 1), 1e8, jnp.float32)  # an added difference would be rounded away
    update = dbj.RowSet(jnp.array([3, 7, V, -1]), jnp.array([[0.1], [3e-4], [5.0], [6.0]], jnp.float32))
    want = np.full((V, 1), 1e8, np.float32)
    want[3], want[7] = np.float32(0.1), np.float32(3e-4)
    for have in (scale, np.asarray(scale)):
        np.testing.assert_array_equal(have + update, want)


def test_optax_applies_them_in_place(new_table, flips):
    table = jax.tree.map(jnp.array, new_table(V, D))
    want = xored(table.bits, flips)
    update = jax.tree.unflatten(jax.tree.structure(table), [flips, dbj.RowSet(jnp.array([5]), jnp.array([[9.0]], jnp.float32))])
    apply = jax.jit(optax.apply_updates, donate_argnums=0)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(table)]
    table = apply(table, update)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(table)] == pointers
    np.testing.assert_array_equal(table.bits, want)
    assert float(table.scale[5, 0]) == 9


@pytest.mark.parametrize(
    ("array", "error", "match"),
    [
        (np.zeros((V, 3), np.int8), TypeError, r"bits uint8 \[V, planes \* B\], got int8"),
        (np.zeros((V, 4), np.uint8), ValueError, "belongs to another table"),
        (np.zeros(3, np.uint8), TypeError, r"got uint8 \[3\]"),
        (3, TypeError, "got int"),
    ],
)
def test_row_flips_reject(flips, array, error, match):
    with pytest.raises(error, match=match):
        array + flips


@pytest.mark.parametrize(
    ("array", "error"), [(np.zeros((V, 1)), TypeError), (np.zeros((V, 2), np.float32), ValueError), (np.zeros(V, np.float32), TypeError)]
)
def test_row_set_rejects(array, error):
    with pytest.raises(error, match=r"scale"):
        array + dbj.RowSet(jnp.array([3]), jnp.array([[0.1]], jnp.float32))


@pytest.mark.parametrize(
    ("ids", "rows", "error", "match"),
    [
        (np.zeros(3, np.uint8), np.zeros((3, D), np.float32), TypeError, "ids must be int32 or int64, got uint8"),
        (np.zeros(3, np.int32), np.zeros((3, D), np.float64), TypeError, "rows must be float32, got float64"),
        (np.zeros(3, np.int32), np.zeros((2, D), np.float32), ValueError, r"rows must have shape \[3, 'D'\]"),
        (np.zeros((), np.int32), np.zeros((D,), np.float32), ValueError, "ids must have at least 1 dimension"),
        (np.zeros((3, 2), np.int32), np.zeros((2, D), np.float32), ValueError, r"rows must have shape \[3, 2, 'D'\]"),
        ([1, 2], np.zeros((2, D), np.float32), TypeError, "ids must be an array, got list"),
    ],
)
def test_row_grad_rejects(ids, rows, error, match):
    with pytest.raises(error, match=match):
        dbj.RowGrad(ids, rows)


def test_a_gradient_of_a_stack_is_none_of_a_single_table(new_table):
    """Ids `[3, 2]` are those of three tables: for one table they are refused, not read as six rows."""
    table, tx = new_table(V, D), dbj.xor(1.0)
    grad = dbj.RowGrad(jnp.full((3, 2), V), jnp.zeros((3, 2, D)), V)
    with pytest.raises(ValueError, match=r"gradient of params\.slots must have shape \[2, 'k'\] for this table, got float32 \[3, 2, 4\]"):
        tx.update(grad, tx.init(table), table)
    stack = jax.tree.map(lambda x: jnp.stack([x] * 3), table)
    updates, _ = tx.update(grad, tx.init(stack), stack)
    np.testing.assert_array_equal((stack.bits + updates.bits), stack.bits)


def test_param_labels(new_table):
    params = {"emb": new_table(V, D), "head": {"w": 1.0, "b": None}, "list": [new_table(V, D), 2]}
    assert dbj.param_labels(params) == {"emb": "table", "head": {"w": "dense", "b": None}, "list": ["table", "dense"]}
    grads = {"emb": dbj.RowGrad(jnp.array([V]), jnp.zeros((1, D))), "w": 0.0}
    assert dbj.param_labels(grads) == {"emb": "table", "w": "dense"}


def test_sparse_update_embedding_qweight():
    rng = np.random.default_rng(0)
    qweight, grad = (rng.integers(0, 256, (V, 3)).astype(np.uint8) for _ in range(2))
    grad[5] = 0
    np.testing.assert_array_equal(dbj.sparse_update_embedding_qweight(qweight, grad), qweight ^ grad)
    ids = np.array([[7, 3, 7], [5, 7, 39]])
    want = qweight.copy()
    want[[3, 7, 39]] ^= grad[[3, 7, 39]]
    np.testing.assert_array_equal(dbj.sparse_update_embedding_qweight(jnp.asarray(qweight), grad, ids), want)
    jitted = jax.jit(dbj.sparse_update_embedding_qweight)
    np.testing.assert_array_equal(jitted(qweight, grad, np.append(ids, [-1, V])), want)
    np.testing.assert_array_equal(dbj.sparse_update_embedding_qweight(qweight, grad, []), qweight)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"qweight": np.zeros((V, 3), np.int8)}, TypeError, "qweight must be a uint8 array, got int8"),
        ({"grad_weight": np.zeros((V, 3), np.float32)}, TypeError, "grad_weight must be a uint8 array"),
        ({"grad_weight": np.zeros((V, 2), np.uint8)}, ValueError, "same shape"),
        ({"active_indices": [V]}, IndexError, rf"active_indices must be in \[0, {V}\), got {V}"),
        ({"active_indices": [0.5]}, TypeError, "active_indices must be integers"),
    ],
)
def test_sparse_update_rejects(change, error, match):
    arguments = {"qweight": np.zeros((V, 3), np.uint8), "grad_weight": np.zeros((V, 3), np.uint8)} | change
    with pytest.raises(error, match=match):
        dbj.sparse_update_embedding_qweight(**arguments)
