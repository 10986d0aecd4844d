import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import dualbin.jax as dbj
from dualbin import reference


def expected(table, ids, dtype=np.float32):
    return np.asarray(reference.lookup(np.asarray(table.bits), np.asarray(table.scale), np.asarray(ids), table.dim, np.dtype(dtype)))


def assert_same_bits(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert np.asarray(got).tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("dtype", "shape", "dim"),
    [
        *((jnp.float32, shape, 19) for shape in [(), (0,), (1,), (7,), (3, 0, 2), (2, 3, 4)]),
        *((dtype, (2, 5), dim) for dtype in (jnp.float32, jnp.float16, jnp.bfloat16) for dim in (1, 8, 19)),
    ],
)
def test_values(new_table, dtype, shape, dim):
    table = new_table(50, dim, padding_idx=4)
    ids = np.random.default_rng(0).integers(0, 50, shape, np.int32)
    assert_same_bits(dbj.lookup(table, ids, dtype), expected(table, ids, dtype))
    assert_same_bits(jax.jit(lambda t, i: dbj.lookup(t, i, dtype=dtype))(table, ids), expected(table, ids, dtype))


def test_subscript(new_table):
    table = new_table(50, 9)
    assert_same_bits(table[[[3, 4], [4, 0]]], expected(table, np.array([[3, 4], [4, 0]])))
    assert table[[]].shape == (0, 9)
    assert_same_bits(table[7], expected(table, np.int32(7)))


def test_int64_ids(new_table):
    table = new_table(50, 9)
    ids = np.array([49, 0, 7], np.int64)
    with jax.enable_x64(True):
        array = jnp.asarray(ids)
        assert array.dtype == jnp.int64
        assert_same_bits(jax.jit(dbj.lookup)(table, array), expected(table, ids))
    assert_same_bits(dbj.lookup(table, ids), expected(table, ids))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_narrow_ids(new_table, dtype):
    table = new_table(50, 9)
    ids = np.array([49, 0, 7], dtype)
    assert_same_bits(dbj.lookup(table, ids), expected(table, ids.astype(np.int32)))


def test_vmap(new_table):
    table, ids = new_table(50, 9), np.arange(24).reshape(2, 3, 4)
    assert_same_bits(jax.vmap(jax.vmap(lambda i: table[i]))(ids), expected(table, ids))
    assert_same_bits(jax.vmap(lambda i: table[i], in_axes=2, out_axes=2)(ids), np.moveaxis(expected(table, np.moveaxis(ids, 2, 0)), 0, 2))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), new_table(50, 9, 1), new_table(50, 9, 2))
    want = [expected(new_table(50, 9, seed), ids[seed - 1]) for seed in (1, 2)]
    assert_same_bits(jax.vmap(lambda t, i: t[i])(stacked, ids), np.stack(want))
    want = [expected(new_table(50, 9, seed), ids[0]) for seed in (1, 2)]
    assert_same_bits(jax.vmap(lambda t: t[ids[0]])(stacked), np.stack(want))
    active = jax.vmap(lambda t, i: dbj.activate(t, i)[i])(stacked, ids)
    assert_same_bits(active, np.stack([expected(new_table(50, 9, seed), ids[seed - 1]) for seed in (1, 2)]))


TRANSFORMED = {
    "nested jit": lambda t, ids: jax.jit(lambda i: jax.jit(lambda j: t[j])(i + 0))(ids),
    "scan": lambda t, ids: lax.scan(lambda carry, i: (carry, t[i]), 0, ids)[1],
    "fori_loop": lambda t, ids: lax.fori_loop(0, len(ids), lambda k, out: out.at[k].set(t[ids[k]]), jnp.zeros((*ids.shape, t.dim))),
    "while_loop": lambda t, ids: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, t[ids]), (0, jnp.zeros((*ids.shape, t.dim))))[1],
    "map": lambda t, ids: lax.map(lambda i: t[i], ids),
    "cond": lambda t, ids: lax.cond(ids[0, 0] >= 0, lambda: t[ids], lambda: 2 * t[ids]),
    "checkpoint": lambda t, ids: jax.checkpoint(lambda i: t[i])(ids),
    "checkpoint in scan": lambda t, ids: lax.scan(jax.checkpoint(lambda carry, i: (carry, t[i])), 0, ids)[1],
    "computed ids": lambda t, ids: t[(ids * 3 - ids * 2) % t.shape[0]],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(new_table, name):
    table, ids = new_table(50, 9), np.arange(24).reshape(4, 6) * 2
    for run in (TRANSFORMED[name], jax.jit(TRANSFORMED[name])):
        assert_same_bits(run(table, jnp.asarray(ids)), expected(table, ids))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(new_table, mesh, check_vma):
    table, ids = new_table(50, 9), np.arange(48).reshape(8, 6)
    spec = PartitionSpec("batch")
    local = jax.shard_map(lambda t, i: t[i], mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=check_vma)
    assert_same_bits(jax.jit(local)(table, ids), expected(table, ids))


@pytest.mark.parametrize("make", [list, np.array, jnp.array])
@pytest.mark.parametrize("bad", [-1, 50])
def test_bad_ids_that_can_be_seen(new_table, on_gpu, make, bad):
    if on_gpu and make is jnp.array:
        pytest.skip("seeing them would wait for the device")
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 50\), got {bad}"):
        new_table(50, 9)[make([0, bad])]


def test_wide_ids_do_not_wrap(new_table):
    with pytest.raises(IndexError, match=str(2**32 + 1)):
        new_table(50, 9)[np.array([2**32 + 1])]


def test_bad_ids_under_jit(new_table, on_gpu):
    table = new_table(50, 9)
    if on_gpu:
        dbj.check_errors()
        assert np.isnan(jax.jit(dbj.lookup)(table, jnp.array([0, 77]))).all(1).tolist() == [False, True]
        with pytest.raises(IndexError, match="77"):
            dbj.check_errors()
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="77"):
            jax.block_until_ready(jax.jit(dbj.lookup)(table, jnp.array([0, 77])))
    assert_same_bits(jax.jit(dbj.lookup)(table, jnp.array([0, 7])), expected(table, np.array([0, 7])))


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.zeros(3, np.float32), "ids must be integers, got float32"),
        ([0.5], "got float64"),
        (np.zeros(3, bool), "got bool"),
    ],
)
def test_ids_of_other_types(new_table, ids, match):
    with pytest.raises(TypeError, match=match):
        new_table(50, 9)[ids]


def test_a_key_is_no_id(new_table):
    with pytest.raises(TypeError, match="got key"):
        new_table(50, 9)[jax.random.key(0)]


def test_other_arguments(new_table):
    table = new_table(50, 9)
    with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, got int32"):
        dbj.lookup(table, [0], jnp.int32)
    with pytest.raises(TypeError, match=r"table must be a dualbin\.jax\.BinaryTable, got ArrayImpl"):
        dbj.lookup(table.bits, [0])
    broken = jax.tree.map(lambda x: x[:, :1], table)
    with pytest.raises(ValueError, match="bits must have shape"):
        dbj.lookup(broken, [0])


def test_activate(new_table):
    table = new_table(50, 9)
    active = dbj.activate(table, {"a": np.array([[7, 3], [7, 60]]), "b": [-1, 3]})
    assert active.row_ids.tolist() == [3, 7, 50, 50, 50, 50, 50]
    assert active.row_ids.dtype == jnp.int32
    assert active.tap.shape == (7, 9)
    assert not active.tap.any()
    assert dbj.activate(table, np.arange(50), capacity=4).row_ids.tolist() == [0, 1, 2, 3, 50]
    assert dbj.activate(table, np.arange(500) % 50).row_ids.shape == (51,)
    assert dbj.activate(table, None).row_ids.tolist() == [50]
    assert dbj.activate(table, np.array([2**32 + 1, 5])).row_ids.tolist() == [5, 50, 50]
    with pytest.raises(TypeError, match="ids must be integers"):
        dbj.activate(table, np.zeros(3))
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        dbj.activate(table, [1], capacity=0)


def exported_forward(table, ids):
    allowed = [jax.export.DisabledSafetyCheck.custom_call("dualbin_lookup")]
    return jax.export.export(jax.jit(lambda bits, scale, ids: dbj.BinaryTable(bits, scale, 9)[ids]), disabled_checks=allowed)(
        table.bits, table.scale, ids
    )


def test_export(new_table):
    table, ids = new_table(50, 9), jnp.arange(6)
    assert_same_bits(exported_forward(table, ids).call(table.bits, table.scale, ids), expected(table, np.arange(6)))


def test_exported_file_in_another_process(new_table, tmp_path):
    """Of dualbin it knows no more than the import and `backends()`."""
    pytest.importorskip("flatbuffers")  # JAX writes the file with it
    table, ids = new_table(50, 9), jnp.arange(6)
    (tmp_path / "forward").write_bytes(exported_forward(table, ids).serialize())
    np.savez(tmp_path / "table.npz", bits=table.bits, scale=table.scale)
    code = (
        "import sys, numpy as np, jax, dualbin, dualbin.jax; dualbin.backends()\n"
        "table = np.load(sys.argv[1] + '/table.npz')\n"
        "run = jax.export.deserialize(bytearray(open(sys.argv[1] + '/forward', 'rb').read())).call\n"
        "np.save(sys.argv[1] + '/y.npy', run(table['bits'], table['scale'], np.arange(6, dtype=np.int32)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_bits(np.load(tmp_path / "y.npy"), expected(table, np.arange(6)))
