"""An update by optax takes the gradient of a lookup as it is where nothing was done to its sums, and the sums are then not made."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import dualbin.jax as dbj
from dualbin.jax._ops.unsummed import _known
from dualbin.jax._ops.update import Update
from dualbin.rules import Bop, Counter, Sign, resolve

V, D, N = 90, 24, 70
IDS = np.random.default_rng(0).integers(0, V, N).astype(np.int32)  # with repeats
DY = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)


def lookup_alone(params, ids, dy, dtype=jnp.float32):
    return (dbj.lookup(params["emb"], ids, dtype) * dy.astype(dtype)).astype(jnp.float32).sum()


def gradient(*, named):
    """`dbj.grad` of `lookup_alone`, whose ids are named, or found by a first run."""
    return dbj.grad(lookup_alone, ids=(lambda _params, ids, _dy: {"emb": ids}) if named else None)


def touched(grads):
    """The same numbers in other arrays: their sums are taken."""
    return jax.tree.map(lambda x: x * jnp.float32(1), grads)


def make_step(tx, grad, between=lambda grads: grads):
    @jax.jit
    def step(params, state, ids, dy):
        updates, state = tx.update(between(grad(params, ids, dy)), state, params)
        return optax.apply_updates(params, updates), state

    return step


def sums_made(step, *operands):
    return step.lower(*operands).compile().as_text().count('"dualbin_segment_sum"')


def leaves(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture
def ids():
    return jnp.asarray(IDS)


@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
@pytest.mark.parametrize("rule", [Counter(8), Counter(1), Bop(), Sign()], ids=str)
def test_the_same_bits_without_sums(new_table, ids, rule, named):
    params = {"emb": new_table(V, D, padding_idx=4)}
    tx = dbj.xor(0.7, rule)
    short, long = make_step(tx, gradient(named=named)), make_step(tx, gradient(named=named), touched)
    got, want = (params, tx.init(params)), (params, tx.init(params))
    assert sums_made(short, *got, ids, DY) == 0
    assert sums_made(long, *want, ids, DY) == 1
    for k in range(3):
        got, want = short(*got, ids, DY * 2.0**k), long(*want, ids, DY * 2.0**k)
        assert leaves(got) == leaves(want)
    assert np.asarray(got[1].tables["emb"].stats)[2] > 30


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda x: x.__name__)
def test_half_precision_and_more_dimensions(new_table, ids, dtype):
    params = {"emb": dbj.BinaryTable.create(jax.random.key(0), V, D, planes=2)}
    tx = dbj.xor(1.0, scale_lr=0.0)

    def grad(params, ids, dy):
        return dbj.grad(lambda p: lookup_alone(p, ids, dy, dtype), ids=lambda _params: {"emb": ids})(params)

    short, long = make_step(tx, grad), make_step(tx, grad, touched)
    batch = ids.reshape(7, 10), DY.reshape(7, 10, D)
    assert sums_made(short, params, tx.init(params), *batch) == 0
    assert leaves(short(params, tx.init(params), *batch)) == leaves(long(params, tx.init(params), *batch))


def test_a_row_that_is_not_finite_is_left_out(new_table, ids):
    params, tx = {"emb": new_table(V, D)}, dbj.xor(1.0)
    dy = DY.copy()
    dy[3, 5] = np.nan
    short, long = make_step(tx, gradient(named=True)), make_step(tx, gradient(named=True), touched)
    got = short(params, tx.init(params), ids, dy)
    assert leaves(got) == leaves(long(params, tx.init(params), ids, dy))
    assert got[1].tables["emb"].stats[4] == 1


def two_lookups(params, ids, dy):
    return lookup_alone(params, ids, dy) + lookup_alone(params, ids, 2 * dy)


def scanned(params, ids, dy):
    return lax.scan(lambda total, part: (total + lookup_alone(params, *part), None), 0.0, (ids.reshape(7, 10), dy.reshape(7, 10, D)))[0]


def in_a_jit(params, ids, dy):
    return jax.jit(lookup_alone)(params, ids, dy)


def in_a_checkpoint(params, ids, dy):
    return jax.checkpoint(lookup_alone)(params, ids, dy)


@pytest.mark.parametrize("function", [two_lookups, scanned, in_a_jit, in_a_checkpoint], ids=lambda f: f.__name__)
def test_other_losses_make_sums(new_table, ids, function):
    params, tx = {"emb": new_table(V, D)}, dbj.xor(1.0)
    grad = dbj.grad(function, ids=lambda _params, ids, _dy: {"emb": ids})
    short, long = make_step(tx, grad), make_step(tx, grad, touched)
    assert sums_made(short, params, tx.init(params), ids, DY) > 0
    assert leaves(short(params, tx.init(params), ids, DY)) == leaves(long(params, tx.init(params), ids, DY))


def other_rows(grads):
    """The same sums for other rows."""
    grad = grads["emb"]
    return {"emb": dbj.RowGrad(jnp.where(grad.ids < V, V - 1 - grad.ids, V), grad.rows, V)}


def clipped(grads):
    return optax.clip_by_global_norm(1e-2).update(grads, optax.EmptyState())[0]


def passed_through_cond(grads):
    return lax.cond(grads["emb"].rows[0, 0] < jnp.inf, lambda g: g, lambda g: g, grads)


@pytest.mark.parametrize("between", [other_rows, clipped, passed_through_cond], ids=lambda f: f.__name__)
def test_what_was_done_to_the_gradient_counts(new_table, ids, between):
    params, tx = {"emb": new_table(V, D)}, dbj.xor(1.0)
    short = make_step(tx, gradient(named=True), between)
    long = make_step(tx, gradient(named=True), lambda grads: between(touched(grads)))
    assert leaves(short(params, tx.init(params), ids, DY)) == leaves(long(params, tx.init(params), ids, DY))


def test_more_rows_are_declared_than_looked_up(new_table, ids):
    """A declared row counts as one with a gradient of zeros, so the sums are what says what happens to it."""
    params, tx = {"emb": new_table(V, D)}, dbj.xor(1.0)
    grad = dbj.grad(lookup_alone, ids=lambda *_: {"emb": jnp.arange(V)})
    step = make_step(tx, grad)
    assert sums_made(step, params, tx.init(params), ids, DY) == 1
    assert step(params, tx.init(params), ids, DY)[1].tables["emb"].stats[2] == V


@pytest.mark.skipif(jax.device_count() == 1, reason="one device")
def test_a_batch_of_more_ids_than_rows_is_not_gathered(new_table, ids):
    params, tx = {"emb": new_table(N // 2, D)}, dbj.xor(1.0)
    assert sums_made(make_step(tx, gradient(named=True)), params, tx.init(params), ids % (N // 2), DY) == 1


def test_a_gradient_that_is_read_is_made(new_table, ids):
    params, tx = {"emb": new_table(V, D)}, dbj.xor(1.0)

    @jax.jit
    def step(params, state, ids, dy):
        grads = gradient(named=True)(params, ids, dy)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads["emb"].rows.sum(), grads["emb"].missed()

    got = step(params, tx.init(params), ids, DY)
    np.testing.assert_allclose(got[2], DY.sum(), rtol=1e-5)
    assert not got[3]


def test_nothing_of_a_trace_is_kept(new_table, ids):
    params, tx = {"emb": new_table(V, D)}, dbj.xor(1.0)
    with jax.checking_leaks():
        make_step(tx, gradient(named=True))(params, tx.init(params), ids, DY)
    gc.collect()
    assert not _known.by_sums


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rule", [Counter(8), Bop(), Sign()], ids=str)
def test_masks_name_a_row_once(new_table, ids, rule, native):
    """Mask and new scale stand at a row's first occurrence, whatever computes them."""
    table, rule = new_table(V, D, padding_idx=4), resolve(rule, 1, D)
    state = dbj.init_state(table, rule).arrays
    context = jnp.zeros(8, jnp.uint32).at[6].set(0x3F800000)  # a rate of 1
    operation = Update(tuple(state), D, rule, masks=True)
    run = operation.on_device if native else jax.jit(operation.fallback)
    mask, scale, *_ = run(table.bits, table.scale, *state.values(), context, ids, jnp.asarray(DY))
    first = np.zeros(N, bool)
    first[np.unique(IDS, return_index=True)[1]] = True
    assert np.asarray(mask)[first].any()
    assert not np.asarray(mask)[~first].any()
    np.testing.assert_array_equal(np.asarray(scale)[:, 0] != 0, first & (IDS != 4))
