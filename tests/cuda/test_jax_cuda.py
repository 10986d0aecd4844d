"""What only a GPU can show of the JAX frontend: the handlers under their platform, in-place updates, bad ids, command buffers."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest

from dualbin import reference, rules

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")


pytestmark = pytest.mark.cuda

V, D = 5000, 40


@pytest.fixture
def dbj() -> Any:
    # not while pytest collects: JAX reads options of XLA when it first looks for devices, and other files still set some
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    import dualbin.jax as module

    return module


def make_params(dbj: Any, planes: int = 1) -> Any:
    import jax.numpy as jnp

    w = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    bits, scale = jnp.array(reference.pack(w, planes)), jnp.array(reference.row_scale(w, planes))
    table = dbj.BinaryTable(bits=bits, scale=scale, dim=D, planes=planes)
    return {"emb": table, "w": jnp.ones((D, 8)) * 0.1}


def loss_fn(params: Any, batch: Any) -> Any:
    import jax.numpy as jnp

    return jnp.mean((jnp.tanh(params["emb"][batch["ids"]] @ params["w"]) - 1.0) ** 2)


def make_step(dbj: Any, tx: Any) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = dbj.value_and_grad(loss_fn, ids=lambda _, batch: {"emb": batch["ids"]})(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


@pytest.mark.parametrize(
    ("rule", "planes"),
    [(rules.Counter(8), 1), (rules.Counter(2, every=4), 1), (rules.Bop(), 1), (rules.Counter(8), 4), (rules.Counter(3), 3)],
    ids=["counter8", "every4", "bop", "planes4", "planes3"],
)
def test_training_changes_the_table_in_place(dbj: Any, rule: rules.Rule, planes: int) -> None:
    tx = optax.partition({"dense": optax.adam(1e-2), "table": dbj.xor(1.0, rule=rule)}, dbj.param_labels)
    params = make_params(dbj, planes)
    state = tx.init(params)
    step = make_step(dbj, tx)
    batch = {"ids": jax.numpy.asarray(np.random.default_rng(1).integers(0, 300, 256), np.int32)}
    text = step.lower(params, state, batch).compile().as_text()
    assert not re.search(rf"f32\[{V},{D}\]", text) or rule.every > 1 or isinstance(rule, rules.Bop)
    assert not [line for line in text.splitlines() if f"u8[{V},{planes * D // 8}]" in line and " copy(" in line]
    pointer = params["emb"].bits.unsafe_buffer_pointer()
    losses = []
    for _ in range(100):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    assert params["emb"].bits.unsafe_buffer_pointer() == pointer
    assert losses[-1] < 0.5 * losses[0]


def test_bad_ids_give_nan_rows_and_a_later_error(dbj: Any) -> None:
    import jax.numpy as jnp

    params = make_params(dbj)
    dbj.check_errors()
    lookup = jax.jit(dbj.lookup)
    y = lookup(params["emb"], jnp.array([1, V, 2, -5]))
    y.block_until_ready()
    assert np.isnan(np.asarray(y)[[1, 3]]).all()
    assert np.isfinite(np.asarray(y)[[0, 2]]).all()
    with pytest.raises(IndexError, match="2 "):
        dbj.check_errors()
    dbj.check_errors()
    assert float(jnp.ones(3).sum()) == 3.0


@pytest.mark.parametrize("planes", [1, 2, 5])
def test_lookup_types(dbj: Any, planes: int) -> None:
    import jax.numpy as jnp

    params = make_params(dbj, planes)
    ids = np.random.default_rng(2).integers(0, V, (3, 5)).astype(np.int32)
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        want = reference.lookup(np.asarray(params["emb"].bits), np.asarray(params["emb"].scale), ids, D, np.dtype(dtype), planes)
        got = np.asarray(dbj.lookup(params["emb"], jnp.asarray(ids), dtype=dtype))
        assert got.dtype == want.dtype
        assert np.array_equal(got.view(np.uint8), want.view(np.uint8))


def test_fewer_planes(dbj: Any) -> None:
    table = make_params(dbj, 4)["emb"]
    for fewer in (1, 2, 3):
        bits, scale = reference.with_planes(np.asarray(table.bits), np.asarray(table.scale), D, 4, fewer)
        for kept in (table.with_planes(fewer), jax.jit(lambda table, fewer=fewer: table.with_planes(fewer))(table)):
            assert np.array_equal(np.asarray(kept.bits), bits)
            assert np.array_equal(np.asarray(kept.scale), scale)


def test_a_workspace_of_a_symbolic_batch_is_large_enough(dbj: Any) -> None:
    from dualbin import _native
    from dualbin.jax._ops.sums import most_workspace

    for op in ("reduce_rows", "segment_sum", "update"):
        for dim in (1, 8, 40, 768, 8192, 8193, 20000):
            for count in (1, 2, 64, 65, 1000, 4096, 10**5, 10**6, 3 * 10**7, 2**31 + 1):
                for rows in (1, 255, 5000, 10**6, 2**31, 2**33):
                    high, wide = most_workspace(op, count, dim)
                    assert high * wide >= _native.workspace_bytes(op, 0, 0, count, rows, dim), (op, dim, count, rows)


@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(2, every=2)], ids=["counter8", "every2"])
def test_an_exported_step_with_a_symbolic_batch(dbj: Any, rule: rules.Rule) -> None:
    from jax import export

    tx = optax.partition({"dense": optax.sgd(1e-2), "table": dbj.xor(1.0, rule=rule)}, dbj.param_labels)
    params = make_params(dbj)
    step, carry = make_step(dbj, tx), (params, tx.init(params))
    names = ("lookup", "segment_sum", "masks", "xor_rows", "reduce_rows")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), carry)
    batch = {"ids": jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 3), "int32")}
    exported = export.export(step, disabled_checks=[export.DisabledSafetyCheck.custom_call(f"dualbin_{name}") for name in names])(
        *shapes, batch
    )
    for size in (1, 400, 4000):
        ids = {"ids": jax.random.randint(jax.random.key(size), (size, 3), 0, V)}
        got = exported.call(*jax.tree.map(lambda x: x.copy(), carry), ids)
        *carry, loss = step(*carry, ids)
        for a, b in zip(jax.tree.leaves(got[0]["emb"]), jax.tree.leaves(carry[0]["emb"]), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(got[2], loss, rtol=1e-5)
