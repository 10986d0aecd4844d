"""What optax asks of every transformation, for every rule (in the manner of its own common tests), and accumulation of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin.jax as dbj
from dualbin.rules import Bop, Counter, Sign

V, D = 30, 11
RULES = [*(Counter(bits) for bits in (1, 2, 5, 8)), Counter(2, every=3), Bop(), Bop(every=2), Sign()]
IDS = np.random.default_rng(0).integers(0, V, 24).astype(np.int32)
TARGET = np.random.default_rng(1).normal(size=(V, D)).astype(np.float32)


def loss(params, ids):
    return jnp.mean((params["emb"][ids] - jnp.asarray(TARGET)[ids]) ** 2)


@functools.cache
def gradient():
    return jax.jit(dbj.grad(loss, ids=lambda _, ids: {"emb": ids}))


def assert_same_structure(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (jnp.shape(a), jnp.result_type(a), jax.typeof(a).weak_type) == (jnp.shape(b), jnp.result_type(b), jax.typeof(b).weak_type)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rule_is_a_transformation(new_table, rule):
    """Structures and dtypes stay, tracing needs shapes only, an injected hyper-parameter changes nothing, a step descends."""
    params = {"emb": new_table(V, D)}
    tx = optax.inject_hyperparams(dbj.xor, static_args=("rule", "scale_lr", "seed", "pending_rows"))(
        learning_rate=0.5, rule=rule, scale_lr=3e-3, seed=1
    )
    plain = dbj.xor(0.5, rule, seed=1)
    state, grads = tx.init(params), gradient()(params, IDS)

    def step(tx, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new_params, new_state = jax.eval_shape(functools.partial(step, tx), params, state)
    assert_same_structure(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), new_params), params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    jitted = jax.jit(functools.partial(step, tx))
    a, b = (params, state), (params, plain.init(params))
    start = float(loss(params, IDS))
    for _ in range(rule.every):
        a, b = jitted(*a), step(plain, *b)
    assert_same_structure(a, (params, state))
    for got, want in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_array_equal(got, want)
    # Bop and many-bit counters at half rate wait for evidence, so only a step that flips must descend
    assert float(loss(a[0], IDS)) <= start + 1e-6


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_learns(rule):
    """Rows pulled towards given signs take them, in a scan over steps with a schedule."""
    signs = np.where(np.random.default_rng(5).random((V, D)) < 0.5, -0.7, 0.7).astype(np.float32)
    params = {"emb": dbj.BinaryTable.create(jax.random.key(0), V, D)}
    tx = optax.chain(dbj.xor(optax.linear_schedule(1.0, 0.1, 120), rule))
    rng = np.random.default_rng(6)
    # errors of very different weight: a dead zone lets only large ones through
    batches = jnp.asarray(rng.integers(0, V, (120, 20)), jnp.int32), jnp.asarray(rng.exponential(size=(120, 20, D)) ** 2, jnp.float32)

    @jax.jit
    def train(carry):
        def step(carry, batch):
            (params, state), (ids, weights) = carry, batch
            run = dbj.grad(lambda params: jnp.sum(weights * (params["emb"][ids] - signs[ids]) ** 2), ids=lambda _: {"emb": ids})
            updates, state = tx.update(run(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, batches)[0]

    signs = jnp.asarray(signs)
    agree = [
        float(jnp.mean((table.dequantize() > 0) == (signs > 0))) for table in (params["emb"], train((params, tx.init(params)))[0]["emb"])
    ]
    assert 0.4 < agree[0] < 0.6
    assert agree[1] > 0.95


def test_wrappers_of_optax(new_table):
    """Extra arguments, a mask and a name around it change nothing."""
    params = {"emb": new_table(V, D)}
    grads, plain = gradient()(params, IDS), dbj.xor(1.0, Sign())
    want, _ = plain.update(grads, plain.init(params), params)
    for tx in (optax.with_extra_args_support(plain), optax.masked(plain, {"emb": True}), optax.named_chain(("table", plain))):
        got, _ = optax.with_extra_args_support(tx).update(grads, tx.init(params), params, value=1.0)
        np.testing.assert_array_equal(got["emb"].bits.mask, want["emb"].bits.mask)


def test_a_window_equals_the_sum_of_its_steps(new_table):
    """`every=4` over four batches flips what one step with the row gradients of all four flips."""
    params = {"emb": new_table(V, D)}
    batches = IDS.reshape(4, 6)

    def train(tx, gradients):
        state, new = tx.init(params), params
        for grads in gradients:
            updates, state = jax.jit(tx.update)(grads, state, new)
            new = optax.apply_updates(new, updates)
        return new["emb"]

    window = train(dbj.xor(1.0, Counter(4, every=4), 0.0), [gradient()(params, ids) for ids in batches])
    whole = gradient()(params, IDS)["emb"]
    four = dbj.RowGrad(whole.ids, 4 * whole.rows, V)  # the loss is a mean
    once = train(dbj.xor(1.0, Counter(4), 0.0), [{"emb": four}])
    assert np.unpackbits(np.asarray(window.bits) ^ np.asarray(once.bits)).mean() < 1e-3
    assert (window.bits != params["emb"].bits).any()


def test_hyperparams_change_between_steps(new_table):
    params = {"emb": new_table(V, D)}
    tx = optax.inject_hyperparams(dbj.xor, static_args=("rule", "scale_lr", "seed", "pending_rows"))(learning_rate=0.0, rule=Counter(2))
    state, grads = tx.init(params), gradient()(params, IDS)
    update = jax.jit(tx.update)
    still, state = update(grads, state, params)
    assert not still["emb"].bits.mask.any()
    state.hyperparams["learning_rate"] = jnp.asarray(1.0)
    moving, _ = update(grads, state, params)
    assert moving["emb"].bits.mask.any()


@pytest.mark.parametrize("combine", ["partition", "multi_transform"])
def test_beside_a_dense_optimizer(new_table, combine):
    params = {"emb": new_table(V, D), "w": jnp.ones(3)}
    tx = getattr(optax, combine)({"dense": optax.sgd(0.1), "table": optax.chain(dbj.xor(1.0, Sign()))}, dbj.param_labels)
    grads = jax.grad(lambda w: jnp.sum(w**2))(params["w"])
    updates, _ = tx.update({"emb": gradient()({"emb": params["emb"]}, IDS)["emb"], "w": grads}, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["w"], 0.8 * params["w"], rtol=1e-6)
    assert (new["emb"].bits != params["emb"].bits).any()


@pytest.mark.parametrize("way", [{"ids": lambda _, ids, __: {"emb": ids}}, {"capacity": V}, {}], ids=["ids", "capacity", "recorded"])
def test_accumulation_equals_one_big_batch(new_table, way):
    params = {"emb": new_table(V, D), "w": jnp.ones(D)}
    ids, y = IDS.reshape(12, 2), np.random.default_rng(2).normal(size=12).astype(np.float32)

    def mean_loss(params, ids, y):
        return jnp.mean((jnp.tanh(params["emb"][ids].sum(1) @ params["w"]) - y) ** 2)

    want_value, want = jax.jit(dbj.value_and_grad(mean_loss, ids=lambda _, ids, __: {"emb": ids}))(params, ids, y)
    value, got = jax.jit(dbj.accumulate(mean_loss, 4, **way))(params, ids, y)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-7)
    used = np.asarray(want["emb"].ids) < V
    np.testing.assert_array_equal(got["emb"].ids[: used.sum()], want["emb"].ids[used])
    rows = np.asarray(want["emb"].rows)[used]
    np.testing.assert_allclose(got["emb"].rows[: used.sum()], rows, rtol=1e-6, atol=1e-6 * np.abs(rows).max())


def test_accumulation_rejects(new_table):
    with pytest.raises(ValueError, match=r"micro_batches must divide the first axis of every array, got 5 and an array of shape \[24\]"):
        dbj.accumulate(loss, 5)({"emb": new_table(V, D)}, IDS)
    with pytest.raises(ValueError, match="micro_batches must be at least 1"):
        dbj.accumulate(loss, 0)


def test_checked(new_table):
    params = {"emb": new_table(V, D)}
    complete = dbj.grad(loss, ids=lambda *_: {"emb": IDS}, checked=True)
    complete(params, IDS)
    jax.block_until_ready(jax.jit(complete)(params, IDS))
    partial = dbj.grad(loss, ids=lambda *_: {"emb": IDS[:3]}, checked=True)
    with pytest.raises(RuntimeError, match="rows of the table 'emb' that were not declared"):
        partial(params, IDS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="rows of the table 'emb' that were not declared"):
        jax.block_until_ready(jax.jit(partial)(params, IDS))


def test_transformations_that_tables_cannot_have_say_where_they_belong(new_table):
    """Outside of `optax.partition`; in it, for the dense parameters, they work."""
    params = {"emb": new_table(V, D), "w": jnp.ones(D)}
    grads = {"emb": gradient()({"emb": params["emb"]}, IDS)["emb"], "w": jnp.ones(D)}

    def step(wrap_dense=lambda tx: tx, wrap_all=lambda tx: tx):
        tx = wrap_all(optax.partition({"table": dbj.xor(0.5), "dense": wrap_dense(optax.sgd(0.1))}, dbj.param_labels))
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates)

    def finite(tx):
        return optax.apply_if_finite(tx, 3)

    def sharp(tx):
        return optax.contrib.sam(tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.1)))

    with pytest.raises(TypeError, match=r"RowFlips: .*apply_if_finite, belongs into the label 'dense' of optax\.partition"):
        step(wrap_all=finite)
    with pytest.raises(TypeError, match=r"leave what calculates .* such as optax\.contrib\.sam, to the label 'dense' of optax\.partition"):
        step(wrap_all=sharp)
    for wrap in (finite, sharp):
        new = step(wrap_dense=wrap)
        assert bool((new["emb"].bits != params["emb"].bits).any())
        assert bool((new["w"] != params["w"]).any())
