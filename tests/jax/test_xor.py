"""The optax transformation, bit for bit against `dualbin.reference`, and its place in optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import dualbin.jax as dbj
from dualbin import reference
from dualbin.rules import Bop, Counter, Sign

V, D = 60, 19
RULES = [Counter(8), Counter(3), Counter(1), Bop(), Sign(), Counter(2, every=3), Bop(every=2)]


def batches(steps, size=40, rows=V, dim=D, seed=1):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, rows, size).astype(np.int32), rng.normal(size=(size, dim)).astype(np.float32)) for _ in range(steps)]


def row_grad(ids, dy, rows=V):
    """The RowGrad of a loss whose gradient with respect to the looked-up rows is dy."""
    unique, sums = reference.row_gradient(ids, dy, rows)
    pad = len(ids) + 1 - len(unique)
    return dbj.RowGrad(
        jnp.asarray(np.append(unique, [rows] * pad).astype(np.int32)),
        jnp.asarray(np.pad(sums, ((0, pad), (0, 0))).astype(np.float32)),
        rows,
    )


def assert_equal(table, state, bits, scale, want):
    assert np.asarray(table.bits).tobytes() == bits.tobytes()
    assert np.asarray(table.scale).tobytes() == scale.tobytes()
    got = dbj.export_state({"emb": state})["emb"]
    assert set(got) == set(want)
    for name, value in want.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.mark.parametrize(("rule", "scale_lr"), [*((rule, 3e-3) for rule in RULES), (Counter(3), 0.0), (Sign(every=2), 0.0)], ids=str)
def test_matches_reference(new_table, rule, scale_lr):
    table = new_table(V, D, padding_idx=4)
    bits, scale = np.array(table.bits), np.array(table.scale)
    want = reference.init_state(rule, V, D, scale_lr=scale_lr)
    tx = dbj.xor(0.7, rule, scale_lr, seed=2**40 + 9)
    direct_table, direct = jax.tree.map(jnp.array, table), dbj.init_state(table, rule, scale_lr)
    state = tx.init(table)

    @jax.jit
    def step(table, state, grad):
        updates, state = tx.update(grad, state, table)
        return optax.apply_updates(table, updates), state

    @jax.jit
    def direct_step(table, state, ids, dy):
        return dbj.xor_update(table, ids, dy, state, learning_rate=0.7, rule=rule, scale_lr=scale_lr, seed=2**40 + 9)

    for number, (ids, dy) in enumerate(batches(8)):
        if number == 5:
            dy[3, 2] = np.nan  # the row is skipped and counted
        if number == 6:
            ids[:] = V  # no valid id: nothing happens
        stats = reference.update(bits, scale, want, ids, dy, rule=rule, dim=D, lr=0.7, scale_lr=scale_lr, seed=2**40 + 9)
        table, state = step(table, state, row_grad(ids, dy))
        direct_table, direct = direct_step(direct_table, direct, ids, dy)
        assert_equal(table, state.tables, bits, scale, want)
        assert_equal(direct_table, direct, bits, scale, want)
        assert list(dbj.read_stats(state)[""].values()) == list(stats)
        assert list(dbj.read_stats(direct)[""].values()) == list(stats)
    assert int(state.count) == 8
    assert not np.array_equal(bits, np.asarray(new_table(V, D).bits))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_xor_update_widens_half_gradients(new_table, dtype):
    table = new_table(V, D)
    ids, dy = batches(1)[0]
    dy = jnp.asarray(dy, dtype)
    state = dbj.init_state(table, Sign())
    got, _ = dbj.xor_update(table, ids.reshape(5, 8), dy.reshape(5, 8, D), state, rule=Sign())
    want, _ = dbj.xor_update(table, ids, dy.astype(jnp.float32), state, rule=Sign())
    np.testing.assert_array_equal(got.bits, want.bits)
    assert (got.bits != table.bits).any()


def test_gradient_of_the_scale(new_table):
    """After one step the first moment is a tenth of the gradient that autodiff finds for a dense model."""
    table = new_table(V, D)
    ids = np.random.default_rng(0).integers(0, 30, 40)

    def loss(values):
        return jnp.sum(jnp.sin(values * jnp.arange(1, D + 1)) ** 2)

    signs = table.dequantize() / table.scale
    want = jax.grad(lambda scale: loss((scale * signs)[ids]))(table.scale)[:, 0]
    tx = dbj.xor(1.0, scale_lr=0.01)
    grads = dbj.grad(lambda table: loss(table[ids]))(table)
    updates, state = tx.update(grads, tx.init(table), table)
    np.testing.assert_allclose(state.tables.scale_m, 0.1 * want, rtol=1e-3, atol=1e-3)  # an update sees 16 bits of a gradient
    moved = np.asarray(optax.apply_updates(table, updates).scale - table.scale)[:, 0]
    np.testing.assert_allclose(moved, -0.01 * np.sign(want), atol=1e-6)


CLASSES = 5


def model(rows=5000, dim=60):
    params = {
        "emb": dbj.BinaryTable.create(jax.random.key(0), rows, dim),
        "head": {"w": jnp.zeros((dim, CLASSES)), "b": jnp.zeros(CLASSES)},
    }

    def loss(params, batch):
        x = jax.checkpoint(lambda ids: jnp.tanh(params["emb"][ids]).mean(1))(batch["ids"]) + params["emb"][batch["ids"][:, 0]]
        logits = x @ params["head"]["w"] + params["head"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return params, loss


def class_batch(rng):
    ids = rng.integers(0, 500, (64, 6)).astype(np.int32)
    return {"ids": jnp.asarray(ids), "y": jnp.asarray(ids[:, 0] % CLASSES)}


def make_step(tx, loss):
    run = dbj.value_and_grad(loss, ids=lambda _, batch: {"emb": batch["ids"]})

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, grads = run(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def partitioned(table):
    return optax.partition({"dense": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)), "table": table}, dbj.param_labels)


def test_trains_in_place(new_table):
    params, loss = model()
    before = np.array(params["emb"].bits)
    tx = partitioned(dbj.xor(1.0))
    state = tx.init(params)
    step = make_step(tx, loss)
    rng = np.random.default_rng(0)
    params, state, _ = step(params, state, class_batch(rng))
    text = step.lower(params, state, class_batch(rng)).compile().as_text()
    big = [leaf for leaf in jax.tree.leaves((params["emb"], state)) if leaf.size >= 5000]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in big]
    assert len(pointers) == 4  # bits, scale, counter and record
    losses = []
    for _ in range(100):
        params, state, value = step(params, state, class_batch(rng))
        losses.append(float(value))
        big = [leaf for leaf in jax.tree.leaves((params["emb"], state)) if leaf.size >= 5000]
        assert [leaf.unsafe_buffer_pointer() for leaf in big] == pointers
    assert losses[0] > 1.4
    assert losses[-1] < 0.5
    changed = np.nonzero((before != np.asarray(params["emb"].bits)).any(axis=1))[0]
    assert 0 < len(changed) <= 500
    assert changed.max() < 500
    assert "dualbin_xor_rows" in text
    assert "u8[5000,8]" in text
    assert not [line for line in text.splitlines() if "[5000" in line and " copy" in line]
    assert "f32[5000,60]" not in text


@pytest.mark.parametrize("rule", [Counter(2, every=3), Bop()], ids=str)
def test_other_rules_in_place(rule):
    params, loss = model()
    tx = partitioned(dbj.xor(1.0, rule, pending_rows=900))
    state = tx.init(params)
    step = make_step(tx, loss)
    rng = np.random.default_rng(0)
    params, state, _ = step(params, state, class_batch(rng))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params["emb"], state)) if leaf.size >= 5000 and leaf.ndim != 2]
    pointers.append(params["emb"].bits.unsafe_buffer_pointer())
    for _ in range(7):
        params, state, _ = step(params, state, class_batch(rng))
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params["emb"], state)) if leaf.size >= 5000 and leaf.ndim != 2]
    assert [*after, params["emb"].bits.unsafe_buffer_pointer()] == pointers
    dbj.check_errors(state)


def test_direct_update_in_place(new_table):
    table = jax.tree.map(jnp.array, new_table(V, D))
    state = dbj.init_state(table)
    step = jax.jit(lambda t, s, i, d: dbj.xor_update(t, i, d, s), donate_argnums=(0, 1))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((table, state)) if leaf.size >= V]
    for ids, dy in batches(5):
        table, state = step(table, state, ids, dy)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((table, state)) if leaf.size >= V] == pointers
    assert int(state.step) == 5


def run_steps(tx, table, steps=6):
    state = tx.init(table)

    @jax.jit
    def step(table, state, grad):
        updates, state = tx.update(grad, state, table)
        return optax.apply_updates(table, updates), state

    for ids, dy in batches(steps):
        table, state = step(table, state, row_grad(ids, dy))
    return table, state


def assert_same_table(a, b):
    assert np.asarray(a.bits).tobytes() == np.asarray(b.bits).tobytes()
    assert np.asarray(a.scale).tobytes() == np.asarray(b.scale).tobytes()


def test_schedule(new_table):
    """A schedule is called with the number of calls so far, and its value is the rate."""
    table = new_table(V, D)
    rates = jnp.array([1.0, 0.0, 0.5, 0.0, 2.0, 0.25])
    got, state = run_steps(dbj.xor(lambda count: rates[count]), table)
    direct = dbj.init_state(table)
    want = table
    for (ids, dy), rate in zip(batches(6), rates.tolist(), strict=True):
        want, direct = dbj.xor_update(want, ids, dy, direct, learning_rate=rate)
    assert_same_table(got, want)
    assert int(state.count) == 6
    constant, _ = run_steps(dbj.xor(1.0), table)
    assert (constant.bits != got.bits).any()
    same, _ = run_steps(dbj.xor(optax.constant_schedule(1.0)), table)
    assert_same_table(constant, same)


def test_inject_hyperparams(new_table):
    table = new_table(V, D)
    want, _ = run_steps(dbj.xor(0.5, Counter(4), 0.01, seed=7), table)
    got, state = run_steps(optax.inject_hyperparams(dbj.xor)(learning_rate=0.5, rule=Counter(4), scale_lr=0.01, seed=7), table)
    assert_same_table(got, want)
    assert float(state.hyperparams["learning_rate"]) == 0.5
    static = optax.inject_hyperparams(dbj.xor, static_args=("seed", "scale_lr"))
    got, _ = run_steps(static(learning_rate=optax.constant_schedule(0.5), rule=Counter(4), scale_lr=0.01, seed=7), table)
    assert_same_table(got, want)


def test_chain(new_table):
    table = new_table(V, D)
    want, _ = run_steps(dbj.xor(0.5), table)
    got, _ = run_steps(optax.chain(optax.identity(), dbj.xor(0.5)), table)
    assert_same_table(got, want)


def test_scan_over_steps():
    params, loss = model(rows=600)
    tx = partitioned(dbj.xor(1.0))
    run = dbj.value_and_grad(loss, ids=lambda _, batch: {"emb": batch["ids"]})
    rng = np.random.default_rng(0)
    data = [class_batch(rng) for _ in range(3)]

    def step(carry, batch):
        params, state = carry
        value, grads = run(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *data)
    (scanned, _), values = jax.jit(lambda carry: lax.scan(step, carry, stacked))((params, tx.init(params)))
    carry, want = (params, tx.init(params)), []
    for batch in data:
        carry, value = jax.jit(step)(carry, batch)
        want.append(float(value))
    np.testing.assert_allclose(values, want, rtol=1e-5)
    # XLA may round the head differently inside the loop, so a few bits of the table may too
    assert float(jnp.mean(scanned["emb"].bits == carry[0]["emb"].bits)) > 0.99


def test_a_stack_of_tables(new_table):
    """vmap over whole updates, for ensembles."""
    tables = [jax.tree.map(jnp.array, new_table(V, D, seed)) for seed in (1, 2)]
    tx = dbj.xor(1.0)
    (ids, dy), (ids2, dy2) = batches(2)
    grads = [row_grad(ids, dy), row_grad(ids2, dy2)]

    def step(table, state, grad):
        updates, state = tx.update(grad, state, table)
        return optax.apply_updates(table, updates), state

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    got, _ = jax.jit(jax.vmap(step))(stack(*tables), stack(*(tx.init(t) for t in tables)), stack(*grads))
    for i, (table, grad) in enumerate(zip(tables, grads, strict=True)):
        want, _ = step(table, tx.init(table), grad)
        assert_same_table(jax.tree.map(lambda x, i=i: x[i], got), want)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be finite and at least 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got str"),
        ({"learning_rate": jnp.ones(2)}, ValueError, "learning_rate must be a scalar"),
        ({"scale_lr": None}, TypeError, "scale_lr must be a number"),
        ({"scale_lr": float("inf")}, ValueError, "scale_lr must be finite"),
        ({"seed": 2**64}, ValueError, "seed must be between 0 and"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"rule": "counter"}, TypeError, "rule must be a dualbin.rules.Counter"),
        ({"pending_rows": 0}, ValueError, "pending_rows must be at least 1"),
        ({"pending_rows": jnp.array(3)}, TypeError, "static_args"),
    ],
)
def test_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        dbj.xor(**arguments)


def test_wrong_trees(new_table):
    table, tx = new_table(V, D), dbj.xor()
    state, grad = tx.init(table), row_grad(*batches(1)[0])
    other = row_grad(*batches(1, dim=D + 1)[0])
    taller = row_grad(*batches(1)[0], rows=V + 1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grad, state)
    with pytest.raises(TypeError, match="gradient of params must be a dualbin"):
        tx.update(table, state, table)
    with pytest.raises(ValueError, match="belongs to another table: its rows have 20 columns, the table has 19"):
        tx.update(other, state, table)
    with pytest.raises(ValueError, match="belongs to another table: one of 61 rows, this table has 60"):
        tx.update(taller, state, table)
    with pytest.raises(ValueError, match=r"state of params.counter must be uint8 \[60, 21\]"):
        tx.update(grad, dbj.xor(rule=Counter(2)).init(table), table)
    with pytest.raises(ValueError, match="no window"):
        dbj.xor(rule=Counter(8, every=2)).update(grad, state, table)
    with pytest.raises(TypeError, match=r"xor updates tables only, params\['w'\] is a float: use optax.partition"):
        tx.init({"emb": table, "w": 1.0})


def test_xor_update_rejects(new_table):
    table = new_table(V, D)
    state = dbj.init_state(table)
    ids, dy = batches(1)[0]
    with pytest.raises(IndexError, match=r"ids must be in \[0, 60\), got 60"):
        dbj.xor_update(table, [60], dy[:1], state)
    with pytest.raises(TypeError, match="dy must be float32 or float16 or bfloat16, got int32"):
        dbj.xor_update(table, ids, dy.astype(np.int32), state)
    with pytest.raises(ValueError, match="dy must have shape"):
        dbj.xor_update(table, ids[:3], dy, state)
    with pytest.raises(ValueError, match="dy must have 19 columns"):
        dbj.xor_update(table, ids, dy[:, :3], state)
    with pytest.raises(TypeError, match=r"state must be a dualbin\.jax\.TableState"):
        dbj.xor_update(table, ids, dy, dbj.xor().init(table))
    with pytest.raises(TypeError, match="learning_rate must be a number, got function"):
        dbj.xor_update(table, ids, dy, state, learning_rate=lambda _: 1.0)
    with pytest.raises(ValueError, match=r"state\.counter must be"):
        dbj.xor_update(table, ids, dy, state, rule=Counter(3))
