"""Arithmetic on the leaves of row gradients: right, or an error, and never another row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

import dualbin.jax as dbj
from dualbin import reference
from dualbin.jax import _slots

V, D = 60, 11
LOST = "row numbers of this table's gradient are lost"


def gradient(ids, seed=0, rows=V):
    """A gradient with these ids, in order, and the sentinel."""
    sums = np.random.default_rng(seed).normal(size=(len(ids) + 1, D)).astype(np.float32)
    sums[-1] = 0
    return dbj.RowGrad(jnp.array([*ids, rows], jnp.int32), jnp.asarray(sums), rows)


def through_leaves(grad):
    return jax.tree.map(lambda x: x, grad)


def lists_of(elements, sizes=(1, 6, 40)):
    """Lists of few lengths: JAX compiles for each."""
    return st.sampled_from(sizes).flatmap(lambda size: st.lists(elements, min_size=size, max_size=size))


@settings(deadline=None, max_examples=60)
@given(lists_of(st.integers(0, 2**31 - 1)), st.floats(2.0**-30, 2.0**30), st.sampled_from([-1, 1]))
def test_ids_survive_factors(ids, factor, sign):
    slots = _slots.encode(jnp.array(ids, jnp.int32))
    assert _slots.decode(slots * np.float32(factor * sign)).tolist() == ids
    assert float(jnp.sum(slots * slots)) < 1e-37, "less than the least normal number"


@settings(deadline=None, max_examples=60)
@given(lists_of(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))))
def test_sums_of_different_ids_are_noticed(pairs):
    a, b = jnp.array(pairs, jnp.int32).T
    got = _slots.decode(_slots.encode(a) + _slots.encode(b))
    np.testing.assert_array_equal(got, jnp.where(a == b, a, _slots.lost_id(a.dtype)))


def test_wide_ids():
    with jax.enable_x64(True):
        ids = jnp.array([0, 1, 2**31, 2**40 + 12345, 2**62 + 7])
        assert _slots.decode(_slots.encode(ids) / 3).tolist() == ids.tolist()


@pytest.mark.parametrize("kind", [jnp.float16, jnp.bfloat16])
def test_ids_do_not_survive_half_precision(kind):
    ids = jnp.arange(0, 10**6, 997, dtype=jnp.int32)
    got = _slots.decode(_slots.encode(ids).astype(kind).astype(jnp.float32))
    assert bool(((got == ids) | (got == _slots.lost_id(ids.dtype))).all())
    assert int((got == ids).sum()) < 10


def test_many_sums_of_the_same_ids(new_table):
    grad = gradient([1, 5, 59])
    total = grad
    for _ in range(99):
        total = jax.tree.map(lambda x, y: x + y * np.float32(1.1), total, grad)
    assert jax.tree.map(lambda x: x / 100, total).ids.tolist() == [1, 5, 59, V]


def test_norms_count_rows_only():
    grad = gradient([3, 40, 59])
    want = float(jnp.linalg.norm(grad.rows))
    assert float(optax.tree.norm(grad)) == pytest.approx(want, rel=1e-6)
    clipped, _ = optax.clip_by_global_norm(1.0).update(grad, None)
    assert clipped.ids.tolist() == [3, 40, 59, V]
    np.testing.assert_allclose(jnp.linalg.norm(clipped.rows), 1.0, rtol=1e-5)


def test_leaves_of_other_rows_do_not_add(new_table):
    """Each way to use the ids raises, and names the call that adds."""
    bad = jax.tree.map(jnp.add, gradient([1, 2, 3]), gradient([4, 5, 6]))
    for use in (lambda: bad.ids, bad.missed, lambda: dbj.xor().update(bad, dbj.xor().init(new_table(V, D)), new_table(V, D))):
        with pytest.raises(ValueError, match=rf"{LOST}.*dualbin\.jax\.add\(a, b\)"):
            use()


def test_leaves_of_other_rows_do_not_add_under_jit(new_table, on_gpu):
    table, tx = new_table(V, D), dbj.xor()

    @jax.jit
    def step(a, b, table, state):
        updates, _ = tx.update(jax.tree.map(jnp.add, a, b), state, table)
        return optax.apply_updates(table, updates)

    def run(b):
        return jax.block_until_ready(step(gradient([1, 2, 3]), b, table, tx.init(table)))

    assert sorted(np.flatnonzero((run(gradient([1, 2, 3], 1)).scale != table.scale)[:, 0])) == [1, 2, 3]
    if on_gpu:
        np.testing.assert_array_equal(run(gradient([4, 5, 6])).bits, table.bits)
        with pytest.raises(IndexError, match=str(np.iinfo(np.int32).min)):
            dbj.check_errors()
    else:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=f"id {np.iinfo(np.int32).min}"):
            run(gradient([4, 5, 6]))


def test_a_cast_is_refused(new_table):
    table = new_table(V, D)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradient([1, 2]))
    with pytest.raises(TypeError, match=r"gradient of params.slots must be float32.*leave gradients of tables out of casts"):
        dbj.xor().update(half, dbj.xor().init(table), table)
    back = jax.tree.map(lambda x: x.astype(jnp.float32), jax.tree.map(lambda x: x.astype(jnp.float16), gradient([1, 2])))
    with pytest.raises(ValueError, match=LOST):
        back.missed()


@pytest.mark.parametrize("factor", [0.0, np.nan, np.inf])
def test_a_gradient_without_content_updates_nothing(new_table, factor):
    """As in the warm-up of a rate that is multiplied with the gradients, or a norm that is not finite."""
    table, tx = new_table(V, D), dbj.xor()
    grad = jax.tree.map(lambda x: x * np.float32(factor), gradient([1, 2]))
    updates, state = jax.jit(tx.update)(grad, tx.init(table), table)
    new = optax.apply_updates(table, updates)
    np.testing.assert_array_equal(new.bits, table.bits)
    np.testing.assert_array_equal(new.scale, table.scale)
    assert not np.asarray(state.tables.count).any()


def test_psum_over_devices(mesh, new_table):
    """Gradients of the same declared rows; those of other rows are noticed."""
    table, count = new_table(V, D), mesh.devices.size
    ids = jnp.arange(4 * count, dtype=jnp.int32).reshape(count, 4)

    def summed(declared):
        def local(table, ids):
            rows = lax.all_gather(ids, "batch", tiled=True) if declared == "same" else ids
            return lax.psum(dbj.grad(lambda t: jnp.sum(t[ids] ** 3), ids=lambda _: rows)(table), "batch")

        spec = PartitionSpec()
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec("batch")), out_specs=spec, check_vma=False))(
            table, ids
        )

    want = dbj.grad(lambda t: jnp.sum(t[ids] ** 3), ids=lambda _: ids)(table)
    got = summed("same")
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.rows, want.rows, rtol=1e-6)
    with pytest.raises(ValueError, match=LOST):
        summed("own").missed()


# ---- add ---------------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([0, 1, 8]).flatmap(lambda n: st.sets(st.integers(0, V - 1), min_size=n, max_size=n)), min_size=1, max_size=4)
)
def test_add_is_the_sum_from_the_left(sets):
    grads = [through_leaves(gradient(sorted(ids), seed)) for seed, ids in enumerate(sets)]
    total = sum(grads)
    want = {}
    for grad in grads:
        for row, values in zip(grad.ids[:-1].tolist(), np.asarray(grad.rows[:-1]), strict=True):
            want[row] = want[row] + values if row in want else values
    ids = [row for row in total.ids.tolist() if row < V]
    assert ids == sorted(want)
    np.testing.assert_array_equal(total.rows[: len(ids)], np.array([want[row] for row in ids]).reshape(-1, D))
    assert not total.missed()


def test_add_keeps_what_was_missed_or_lost():
    a, b = gradient([1, 2]), gradient([2, 9])
    missed = dbj.RowGrad(b.ids, b.rows.at[-1].set(1.0), V)
    assert dbj.add(a, missed).missed()
    bad = jax.tree.map(jnp.add, a, gradient([3, 4]))
    ids = jax.jit(lambda a, b: dbj.add(a, b).ids)(a, bad)
    assert np.iinfo(np.int32).min in ids.tolist()


def test_add_refuses():
    with pytest.raises(TypeError, match=r"b must be a dualbin\.jax\.RowGrad, got int"):
        dbj.add(gradient([1]), 3)
    with pytest.raises(ValueError, match=r"gradients of one table, got \[60, 11\] and \[61, 11\]"):
        dbj.add(gradient([1]), gradient([1], rows=61))
    loose = dbj.RowGrad(jnp.array([1, V]), jnp.zeros((2, D)))
    with pytest.raises(ValueError, match=r"must have num_rows: RowGrad\(ids, rows, num_rows=V\)"):
        loose + loose
    with pytest.raises(TypeError):
        loose + 1


def test_accumulate_sums_parts_in_order(new_table):
    """Bit for bit what docs/design.md says of the sum of several gradients."""
    rng = np.random.default_rng(1)
    ids, dy = rng.integers(0, 9, (4, 30)).astype(np.int32), rng.normal(size=(4, 30, D)).astype(np.float32)

    def loss(table, ids, dy):
        return jnp.sum(table[ids] * dy)

    _, grad = jax.jit(dbj.accumulate(loss, 4, ids=lambda _, ids, __: ids))(new_table(V, D), ids, dy)
    total = np.zeros((V, D), np.float32)
    for part_ids, part_dy in zip(ids, dy, strict=True):
        rows, sums = reference.row_gradient(part_ids, part_dy, V)
        total[rows] = total[rows] + sums
    used = grad.ids.tolist()[:9]
    assert used == list(range(9))
    np.testing.assert_array_equal(grad.rows[:9], total[:9] / np.float32(4))
