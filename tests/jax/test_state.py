"""The window of `every`, telemetry, and the framework-neutral form of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin.io
import dualbin.jax as dbj
from dualbin.rules import Bop, Counter, Sign

V, D = 60, 19


def row_grad(rows, seed, value=None):
    rng = np.random.default_rng(seed)
    sums = rng.normal(size=(len(rows), D)).astype(np.float32) if value is None else np.full((len(rows), D), value, np.float32)
    return dbj.RowGrad(jnp.array([*rows, V, V], jnp.int32), jnp.asarray(np.pad(sums, ((0, 2), (0, 0)))), V)


def apply(tx, table, state, grad):
    updates, state = jax.jit(tx.update)(grad, state, table)
    return optax.apply_updates(table, updates), state


def test_state_is_where_the_table_is(new_table):
    """Also before the first step, for which it would otherwise have to move."""
    device = jax.local_devices()[-1]
    table, tx = jax.device_put(new_table(V, D), device), dbj.xor()
    state = tx.init(table)
    assert state.tables.counter.devices() == {device}
    pointer = state.tables.counter.unsafe_buffer_pointer()
    _, state = jax.jit(tx.update, donate_argnums=1)(row_grad([3, 9], 0), state, table)
    assert state.tables.counter.unsafe_buffer_pointer() == pointer


def test_a_step_without_rows_does_not_count(new_table):
    table, tx = new_table(V, D), dbj.xor()
    state = tx.init(table)
    table, state = apply(tx, table, state, row_grad([3, 9], 0))
    same, state = apply(tx, table, state, row_grad([], 0))
    np.testing.assert_array_equal(same.bits, table.bits)
    assert (int(state.tables.step), int(state.count)) == (1, 2)
    assert dbj.read_stats(state)[""] == {"flips": 0, "rows": 0, "skipped": 0, "clipped": 0}


def test_window(new_table):
    table, tx = new_table(V, D), dbj.xor(rule=Sign(every=3), pending_rows=8)
    state = tx.init(table)
    current = table
    for rows, value in ([3, 9], 1.0), ([], None), ([9, 20], 2.0):
        current, state = apply(tx, current, state, row_grad(rows, 0, value))
        np.testing.assert_array_equal(current.bits, table.bits)
    window = dbj.export_state(state)[""]
    assert window["pending_ids"].tolist() == [3, 9, 20]
    assert window["pending_rows"][:, 0].tolist() == [1.0, 3.0, 2.0]
    assert (window["pending_steps"], window["step"]) == (2, 0)
    current, state = apply(tx, current, state, row_grad([3], 0, -2.0))
    changed = np.nonzero((current.bits != table.bits).any(axis=1))[0]
    assert changed.tolist() == [3, 9, 20]
    window = dbj.export_state(state)[""]
    assert (len(window["pending_ids"]), window["pending_steps"], window["step"]) == (0, 0, 1)
    w = np.asarray(table.dequantize())
    flipped = np.asarray(current.dequantize()) * w < 0
    np.testing.assert_array_equal(flipped[[3, 9, 20]], [w[3] < 0, w[9] > 0, w[20] > 0])


def test_rows_that_do_not_fit_are_reported(new_table):
    table, tx = new_table(V, D), dbj.xor(rule=Counter(8, every=4), pending_rows=3)
    params, tx = {"emb": table}, optax.partition({"table": tx}, dbj.param_labels)
    state = tx.init(params)
    params, state = apply(tx, params, state, {"emb": row_grad([3, 9, 20], 0)})
    dbj.check_errors(state)
    params, state = apply(tx, params, state, {"emb": row_grad([3, 40], 0)})
    with pytest.raises(RuntimeError, match=r"table 'emb': 1 row gradients did not fit.*raise pending_rows"):
        dbj.check_errors(state)


def test_check_errors_without_state():
    dbj.check_errors()


def test_large_tables_need_pending_rows():
    table = jax.eval_shape(lambda: dbj.BinaryTable.create(jax.random.key(0), 2**21, 64))
    with pytest.raises(ValueError, match="pending_rows is needed with every > 1 for a table of 2097152 x 64"):
        dbj.init_state(table, Counter(8, every=2))
    state = jax.eval_shape(
        lambda: dbj.init_state(dbj.BinaryTable.create(jax.random.key(0), 2**21, 64), Counter(8, every=2), pending_rows=5)
    )
    assert state.window.rows.shape == (5, 64)


@pytest.mark.parametrize(
    ("rule", "scale_lr", "names"),
    [
        (Counter(8), 3e-3, {"counter", "count", "squares", "scale_m", "scale_v"}),
        (Counter(8), 0.0, {"counter", "squares"}),
        (Counter(1), 0.0, {"count"}),
        (Counter(1, dead_zone=1.0), 0.0, set()),
        (Bop(), 0.0, {"ema", "count"}),
        (Counter(3, every=2), 0.0, {"counter", "count", "pending_ids", "pending_rows", "pending_steps"}),
    ],
)
def test_round_trip(new_table, tmp_path, rule, scale_lr, names):
    """Training goes on with the same bits after a detour over a file."""
    params = {"block": {"emb": new_table(V, D)}}
    tx = optax.partition({"table": dbj.xor(1.0, rule, scale_lr)}, dbj.param_labels)
    state = tx.init(params)
    for seed in range(3):
        params, state = apply(tx, params, state, {"block": {"emb": row_grad([1, 5, 7 + seed], seed)}})
    exported = dbj.export_state(state)
    assert set(exported) == {"block.emb"}
    assert set(exported["block.emb"]) == names | {"step"}
    assert isinstance(exported["block.emb"]["step"], int)

    dualbin.io.save(tmp_path / "x.safetensors", {"block.emb": params["block"]["emb"]}, exported)
    tables, loaded = dualbin.io.load(tmp_path / "x.safetensors")
    restored_params = {"block": {"emb": dbj.BinaryTable(**tables["block.emb"]._asdict())}}
    restored = dbj.import_state(tx.init(params), loaded)
    for seed in range(3, 6):
        grad = {"block": {"emb": row_grad([1, 5, 7 + seed], seed)}}
        params, state = apply(tx, params, state, grad)
        restored_params, restored = apply(tx, restored_params, restored, grad)
    for got, want in zip(jax.tree.leaves((restored_params, restored)), jax.tree.leaves((params, state)), strict=True):
        if got.shape:  # the number of calls is optax's own
            np.testing.assert_array_equal(got, want)


def test_import_rejects(new_table):
    state = {"emb": dbj.init_state(new_table(V, D), Counter(2, every=2), pending_rows=2)}
    good = dbj.export_state(state)
    with pytest.raises(ValueError, match=r"exported must have the tables \['emb'\], got \[\]"):
        dbj.import_state(state, {})
    with pytest.raises(ValueError, match=r"must have .*'counter'.*got"):
        dbj.import_state(state, {"emb": {"step": 3}})
    with pytest.raises(ValueError, match=r"\['emb'\]\['counter'\] must be uint8 \[60, 3\], got uint8 \[59, 3\]"):
        dbj.import_state(state, {"emb": good["emb"] | {"counter": good["emb"]["counter"][1:]}})
    for name, value in {"step": -1, "pending_steps": 2**31}.items():
        with pytest.raises(ValueError, match=rf"\['emb'\]\['{name}'\] must be between 0 and {2**31 - 1}, got {value}"):
            dbj.import_state(state, {"emb": good["emb"] | {name: value}})
    with pytest.raises(ValueError, match="3 pending rows, the optimizer has room for 2"):
        dbj.import_state(state, {"emb": good["emb"] | {"pending_ids": np.arange(3), "pending_rows": np.zeros((3, D), np.float32)}})
    with pytest.raises(ValueError, match="pending_ids int64"):
        dbj.import_state(state, {"emb": good["emb"] | {"pending_rows": np.zeros((0, D + 1), np.float32)}})
    with pytest.raises(ValueError, match=r"must have tables of dualbin\.jax\.xor"):
        dbj.export_state({"w": jnp.zeros(3)})


def test_from_dlpack_objects():
    class Source:
        bits = np.arange(6, dtype=np.uint8).reshape(3, 2)
        scale = np.ones((3, 1), np.float32)
        dim = 16

    for copy in (False, True):
        table = dbj.from_torch(Source(), copy=copy)
        np.testing.assert_array_equal(table.bits, Source.bits)
        assert table.shape == (3, 16)
    with pytest.raises(TypeError, match="without bits, scale, dim"):
        dbj.from_torch(3)
    Source.dim = 17
    with pytest.raises(ValueError, match="for dim 17"):
        dbj.from_torch(Source())


def test_from_torch_tensors():
    torch = pytest.importorskip("torch", minversion="2.11")

    class Source:
        bits = torch.arange(2**14, dtype=torch.int32).to(torch.uint8).reshape(1024, 16)
        scale = torch.ones((1024, 1), requires_grad=True)
        dim = 128

    shared = dbj.from_torch(Source())
    assert shared.bits.unsafe_buffer_pointer() == Source.bits.data_ptr()
    assert shared.scale.unsafe_buffer_pointer() == Source.scale.data_ptr()
    copied = dbj.from_torch(Source(), copy=True)
    assert copied.bits.unsafe_buffer_pointer() != Source.bits.data_ptr()
    Source.bits.zero_()
    assert copied.bits.any()
