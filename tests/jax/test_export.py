"""`jax.export`: a step with a symbolic batch, and programs for platforms that this process does not run on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import dualbin.jax as dbj
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
