"""Tables of several planes, and their training, for the tests of them in JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dualbin.jax as dbj
from dualbin import reference

V, D = 24, 13  # padding bits in every plane
IDS = np.array([[1, 2, 3], [2, 5, 7]])


def make(planes, rows=V, seed=0, padding_idx=4):
    w = np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)
    return dbj.BinaryTable.from_float(w, padding_idx, planes)


def values(table):
    return reference.lookup(table.bits, table.scale, np.arange(table.shape[0]), table.dim, planes=table.planes)


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def trained(planes, rule, scale_lr, steps=4):
    """The same steps by the optax chain under jit with donation, and by the reference."""
    table = make(planes)
    bits, scale = np.array(table.bits), np.array(table.scale)
    want = reference.init_state(rule, V, D, planes=planes, scale_lr=scale_lr)
    tx = optax.chain(dbj.freeze_rows({"emb": [0]}), optax.partition({"table": dbj.xor(0.7, rule, scale_lr, seed=9)}, dbj.param_labels))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, ids, dy):
        order = jnp.argsort(ids)
        grads = {"emb": dbj.RowGrad(jnp.append(ids[order], V), jnp.pad(dy[order], ((0, 1), (0, 0))), num_rows=V)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"emb": jax.tree.map(jnp.array, table)}
    state = tx.init(params)
    rng = np.random.default_rng(2)
    for _ in range(steps):
        ids = rng.permutation(np.arange(1, V))[:10].astype(np.int32)
        dy = rng.normal(size=(10, D)).astype(np.float32)
        reference.update(bits, scale, want, ids, dy, rule=rule, dim=D, planes=planes, lr=0.7, scale_lr=scale_lr, seed=9)
        params, state = step(params, state, ids, dy)
    return params["emb"], state, (bits, scale, want)
