"""`jax.export`: a step with a symbolic batch, and programs for platforms that this process does not run on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import dualbin.jax as dbj
from dualbin.jax import _ffi
from dualbin.jax._ops import sums
from dualbin.rules import Bop, Counter

V, D = 50, 11
NAMES = ("lookup", "segment_sum", "update", "masks", "xor_rows", "reduce_rows")
CHECKS = [export.DisabledSafetyCheck.custom_call(f"dualbin_{name}") for name in NAMES]


def make_step(rule):
    tx = optax.partition({"dense": optax.sgd(1e-2), "table": dbj.xor(1.0, rule)}, dbj.param_labels)

    @jax.jit
    def step(params, state, ids):
        grads = dbj.grad(lambda p: jnp.sum(jnp.tanh(p["emb"][ids] @ p["w"]) ** 2), ids=lambda _: {"emb": ids})(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


@pytest.mark.parametrize("rule", [Counter(3), Counter(3, every=2), Bop()], ids=str)
def test_a_step_with_a_symbolic_batch(new_table, rule):
    params = {"emb": new_table(V, D), "w": jnp.linspace(-1, 1, D)}
    tx, step = make_step(rule)
    carry = (params, tx.init(params))
    (batch,) = export.symbolic_shape("b")
    exported = export.export(step, disabled_checks=CHECKS)(
        *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), carry), jax.ShapeDtypeStruct((batch, 3), jnp.int32)
    )
    for size in (1, 4, 40):  # fewer ids than rows, and more
        ids = jax.random.randint(jax.random.key(size), (size, 3), 0, V)
        got, carry = exported.call(*carry, ids), step(*carry, ids)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(carry), strict=True):
            np.testing.assert_array_equal(a, b)


def test_other_platforms_get_no_native_call(new_table):
    params = {"emb": new_table(V, D), "w": jnp.linspace(-1, 1, D)}
    tx, step = make_step(Counter(3, every=2))
    arguments = (params, tx.init(params), jnp.array([[1, 2, 3]]))
    text = str(export.export(step, platforms=["tpu"])(*arguments).mlir_module())
    assert "dualbin_" not in text
    both = str(export.export(step, platforms=["cpu", "tpu"], disabled_checks=CHECKS)(*arguments).mlir_module())
    assert all(f"dualbin_{name}" in both for name in ("lookup", "segment_sum", "masks", "xor_rows", "reduce_rows"))


def test_a_program_of_several_platforms_runs_here(new_table):
    table, ids = new_table(V, D), jnp.array([[1, 2], [3, 1]])
    exported = export.export(jax.jit(lambda table, ids: table[ids]), platforms=["cpu", "cuda", "tpu"], disabled_checks=CHECKS)(table, ids)
    np.testing.assert_array_equal(exported.call(table, ids), table[ids])


@pytest.fixture
def cuda_build(monkeypatch):
    """Lowering as in a build with CUDA, on a machine without a GPU."""
    monkeypatch.setattr(_ffi, "register", lambda: ("cpu", "CUDA"))
    monkeypatch.setattr(_ffi.library(), "cuda_device_count", lambda: 0)
    monkeypatch.setattr(_ffi.library(), "workspace_bound", lambda op, dim: (1000 * len(op), 40 + dim))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("rule", [Counter(3), Counter(3, every=2), Bop()], ids=str)
def test_a_step_with_a_symbolic_batch_for_a_gpu(new_table, rule):
    """Workspaces are results of native calls on a GPU, and their size follows the batch."""
    params = {"emb": new_table(V, D), "w": jnp.linspace(-1, 1, D)}
    tx, step = make_step(rule)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, tx.init(params)))
    (batch,) = export.symbolic_shape("b")
    exported = export.export(step, platforms=["cuda"], disabled_checks=CHECKS)(*shapes, jax.ShapeDtypeStruct((batch, 3), jnp.int32))
    calls = [line for line in str(exported.mlir_module()).splitlines() if "@dualbin_" in line or '"dualbin_' in line]
    assert exported.platforms == ("cuda",)
    per_id = sums.most_workspace("update", 0, D)[1]
    for target in ("masks", *(["segment_sum", "reduce_rows"] if rule.every > 1 else [])):
        (call, *_) = [line for line in calls if f"dualbin_{target}" in line]
        assert f"x{per_id}xui8>" in call.partition("->")[2], call
    assert any(f"tensor<?x{per_id}xui8>" in call for call in calls)


@pytest.mark.usefixtures("cuda_build")
def test_a_workspace_for_a_gpu_that_is_not_here(new_table):
    table, ids = new_table(V, D), jnp.arange(7)
    text = str(export.export(jax.jit(dbj.grad(lambda t: jnp.sum(t[ids]))), platforms=["cuda"], disabled_checks=CHECKS)(table).mlir_module())
    more, per_id = sums.most_workspace("segment_sum", 7, D)
    assert f"tensor<{more}x{per_id}xui8>" in text


@pytest.mark.usefixtures("cuda_build")
def test_the_device_tells_the_size_of_a_workspace_if_it_can(monkeypatch):
    """Numbers go to the library, which knows the device; symbols never do."""
    (symbol,) = export.symbolic_shape("b")
    bound = sums.most_workspace("update", 9, D)

    def exact(op, device, threads, count, rows, dim):
        assert (op, device, threads, count, rows, dim) == ("update", 0, 0, 9, V, D)
        return 1234

    monkeypatch.setattr(_ffi.library(), "workspace_bytes", exact)
    for devices, want in ((1, (1234,)), (0, bound)):
        monkeypatch.setattr(_ffi.library(), "cuda_device_count", lambda devices=devices: devices)
        assert sums.workspace("update", 9, V, D).shape == (0,)
        with _ffi.lowering("CUDA"):
            assert sums.workspace("update", 9, V, D).shape == want
            assert sums.workspace("update", 9, symbol, D).shape == bound
            assert sums.workspace("update", symbol, V, D).shape == (symbol + bound[0] - 9, bound[1])


@pytest.mark.usefixtures("cuda_build")
def test_the_bound_of_a_workspace_has_room_for_what_the_library_says():
    for count in (0, 1, 1000, 2**33):
        high, wide = sums.most_workspace("update", count, 24)
        assert wide == 64
        assert 0 <= high * wide - (6000 + 64 * count) < 64
