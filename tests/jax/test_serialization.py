"""Tables in `flax.serialization`: bytes and state dicts of parameters and optimizer state."""

import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualbin.jax as dbj
from dualbin.rules import Counter

V, D = 30, 11


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (np.asarray(a).dtype, np.shape(a)) == (np.asarray(b).dtype, np.shape(b))
        np.testing.assert_array_equal(a, b)


def test_parameters_and_state_come_back(new_table):
    params = {"emb": new_table(V, D, padding_idx=0), "w": jnp.ones((D, 3))}
    tx = optax.partition({"dense": optax.adam(1e-2), "table": dbj.xor(1.0, Counter(2, every=3))}, dbj.param_labels)
    state = tx.init(params)
    ids = jnp.array([[1, 2, 3], [2, 5, 7]])
    grads = dbj.grad(lambda p: jnp.sum(jnp.tanh(p["emb"][ids] @ p["w"])))(params)
    updates, state = tx.update(grads, state, params)
    carry = (optax.apply_updates(params, updates), state)
    like = ({"emb": new_table(V, D, seed=5), "w": jnp.zeros((D, 3))}, tx.init(params))
    restored = flax.serialization.from_bytes(like, flax.serialization.to_bytes(carry))
    same(restored, carry)
    assert isinstance(restored[0]["emb"], dbj.BinaryTable)
    np.testing.assert_array_equal(restored[0]["emb"][ids], carry[0]["emb"][ids])
    same(flax.serialization.from_state_dict(like, flax.serialization.to_state_dict(carry)), carry)


def test_the_state_dict_is_made_of_arrays(new_table):
    state = flax.serialization.to_state_dict({"emb": new_table(V, D)})
    assert set(state["emb"]) == {"bits", "scale", "dim", "planes"}
    assert all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": np.int32(12)}, "dim must be 11, that of the target, got 12"),
        ({"bits": np.zeros((V + 1, 2), np.uint8)}, r"bits must be uint8 \[30, 2\], as in the target, got uint8 \[31, 2\]"),
        ({"scale": np.zeros((V, 1), np.float16)}, r"scale must be float32 \[30, 1\], as in the target, got float16 \[30, 1\]"),
        ({"more": 1}, r"must have bits, scale, dim and planes, got \['bits', 'dim', 'more', 'planes', 'scale'\]"),
    ],
)
def test_another_table_is_refused(new_table, change, message):
    table = new_table(V, D)
    state = flax.serialization.to_state_dict(table) | change
    with pytest.raises(ValueError, match=message):
        flax.serialization.from_state_dict(table, state)


def test_restored_memory_is_its_own(new_table):
    """The bytes may go: a restored table does not look into them."""
    table = new_table(V, D)
    state = {"bits": np.array(table.bits), "scale": np.array(table.scale), "dim": np.int32(D)}
    restored = flax.serialization.from_state_dict(table, state)
    state["bits"][:] = 0
    np.testing.assert_array_equal(restored.bits, table.bits)


@pytest.mark.parametrize("order", ["flax.serialization, dualbin.jax", "dualbin.jax, flax.serialization", "dualbin.jax"])
def test_flax_before_or_after_or_not_at_all(order):
    code = f"""
import {order}
import sys
if "flax" in {order!r}:
    assert flax.serialization.is_serializable(dualbin.jax.BinaryTable)
else:
    assert not any(name.split(".")[0] == "flax" for name in sys.modules), "imported for nothing"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
