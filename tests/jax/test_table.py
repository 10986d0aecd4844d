import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualbin.jax as dbj
from dualbin import reference


def test_create():
    table = dbj.BinaryTable.create(jax.random.key(0), 300, 19, padding_idx=-1)
    assert table.shape == (300, 19)
    assert (table.bits.dtype, table.bits.shape, table.scale.dtype, table.scale.shape) == (jnp.uint8, (300, 3), jnp.float32, (300, 1))
    assert not (np.asarray(table.bits)[:, -1] >> 3).any(), "padding bits are 0"
    assert set(np.unique(table.scale[:-1])) == {np.float32(0.3)}
    assert float(table.scale[-1, 0]) == 0
    assert 0.45 < np.mean(reference.unpack(np.asarray(table.bits), 19) > 0) < 0.55
    again = dbj.BinaryTable.create(jax.random.key(0), 300, 19)
    other = dbj.BinaryTable.create(jax.random.key(1), 300, 19)
    assert (again.bits == table.bits).all()
    assert (other.bits != table.bits).any()


@pytest.mark.parametrize(("spread", "digits"), [(0.1, 26), (0.25, 64), (0.0, 0)])
def test_spread(spread, digits):
    table = dbj.BinaryTable.create(jax.random.key(0), 4000, 21, spread=spread)
    signs = reference.unpack(np.asarray(table.bits), 21)
    assert not (np.asarray(table.bits)[:, -1] >> 5).any(), "padding bits are 0"
    np.testing.assert_allclose((signs != np.sign(signs.mean(0))).mean(0), digits / 256, atol=0.03)
    other = dbj.BinaryTable.create(jax.random.key(1), 4000, 21, spread=spread)
    assert (table.bits != other.bits).any(), "another pattern"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_from_float(dtype):
    w = np.random.default_rng(0).normal(size=(50, 13)).astype(dtype)
    w[3] = 0
    table = dbj.BinaryTable.from_float(jnp.asarray(w), padding_idx=7)
    scale = reference.row_scale(w)
    scale[7] = 0
    np.testing.assert_array_equal(table.bits, reference.pack(w))
    np.testing.assert_array_equal(table.scale, scale)


@pytest.mark.parametrize(
    ("w", "error", "match"),
    [
        (np.zeros((3, 4)), TypeError, "w must be float32"),
        (np.zeros(3, np.float32), ValueError, r"w must have shape \[V, D\]"),
        (np.zeros((0, 4), np.float32), ValueError, "at least 1"),
        (np.full((2, 2), np.nan, np.float32), ValueError, "w must be finite, got nan"),
    ],
)
def test_from_float_rejects(w, error, match):
    with pytest.raises(error, match=match):
        dbj.BinaryTable.from_float(w)


def test_from_float_rejects_tracers():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(dbj.BinaryTable.from_float)(jnp.zeros((2, 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dequantize(new_table, dtype):
    table = new_table(40, 11, padding_idx=2)
    want = reference.lookup(np.asarray(table.bits), np.asarray(table.scale), np.arange(40), 11, np.dtype(dtype))
    got = np.asarray(table.dequantize(dtype))
    assert got.dtype == dtype
    assert got.tobytes() == np.asarray(want).tobytes()  # also the sign of zero


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"bits": np.zeros((4, 2), np.int32)}, TypeError, "bits must be uint8, got int32"),
        ({"bits": np.zeros((4, 3), np.uint8)}, ValueError, r"bits must have shape \[V, 2\]"),
        ({"bits": np.zeros((0, 2), np.uint8)}, ValueError, "V >= 1"),
        ({"bits": np.full((4, 2), 255, np.uint8)}, ValueError, "bits has bits set beyond column 8, which must be 0"),
        ({"bits": jnp.full((4, 2), 255, jnp.uint8)}, ValueError, "bits has bits set beyond column 8"),
        ({"bits": [[1, 2]]}, TypeError, "bits must be an array, got list"),
        ({"scale": np.zeros((4, 1), np.float64)}, TypeError, "scale must be float32"),
        ({"scale": np.zeros(4, np.float32)}, ValueError, r"scale must have shape \[4, 1\]"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 17}, ValueError, "for dim 17"),
        ({"dim": 9.0}, TypeError, "dim must be an integer"),
    ],
)
def test_constructor_rejects(change, error, match):
    arguments = {"bits": np.zeros((4, 2), np.uint8), "scale": np.ones((4, 1), np.float32), "dim": 9} | change
    with pytest.raises(error, match=match):
        dbj.BinaryTable(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"V": 0}, ValueError, "V must be at least 1"),
        ({"D": 0}, ValueError, "D must be at least 1"),
        ({"V": 2.0}, TypeError, "V must be an integer"),
        ({"scale": 1e-5}, ValueError, "scale must be finite and at least 0.0001, got 1e-05"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"padding_idx": 5}, ValueError, "padding_idx must be between -5 and 4"),
        ({"spread": 0.6}, ValueError, "spread must be finite and between 0.0 and 0.5, got 0.6"),
        ({"spread": "wide"}, TypeError, "spread must be a number"),
    ],
)
def test_create_rejects(change, error, match):
    with pytest.raises(error, match=match):
        dbj.BinaryTable.create(jax.random.key(0), **({"V": 5, "D": 3} | change))


def test_is_a_pytree_of_two_leaves(new_table):
    table = new_table(5, 9)
    leaves, treedef = jax.tree.flatten(table)
    assert [leaf.shape for leaf in leaves] == [(5, 2), (5, 1)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"emb": table})]
    assert paths == ["['emb'].bits", "['emb'].scale"]
    for fake in (None, object(), jax.ShapeDtypeStruct((1,), jnp.int8)):
        assert treedef.unflatten([fake, fake]).dim == 9
    shapes = jax.eval_shape(lambda: dbj.BinaryTable.create(jax.random.key(0), 5, 9))
    assert shapes.shape == (5, 9)
    assert jax.tree.structure(shapes) == treedef


def test_numpy_arrays_are_copied():
    bits, scale = np.zeros((1000, 64), np.uint8), np.ones((1000, 1), np.float32)
    table = dbj.BinaryTable(bits=bits, scale=scale, dim=512)
    flips = dbj.RowFlips(jnp.array([3]), jnp.full((1, 64), 255, jnp.uint8))
    new = jax.jit(lambda x: x + flips, donate_argnums=0)(table.bits)
    assert int(new[3, 0]) == 255
    assert not bits.any()
