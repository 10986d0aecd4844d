"""What JAX does at both ends of a large table: `python huge_jax.py '{"rows": ..., ...}'` runs `check` of these arguments.

A process of its own, since JAX gives memory back when it ends.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dualbin.jax as dbj
from dualbin.rules import Counter
from ends import Ends


def check(rows: int, dim: int, bits: int, planes: int, scale_lr: float, wide_ids: bool, path: str) -> None:
    """Train by `path`, "fused" or "optax", and compare with the reference at both ends."""
    with jax.enable_x64(wide_ids):
        _check(rows, dim, Counter(bits), planes, scale_lr, jnp.int64 if wide_ids else jnp.int32, path)


def _check(rows: int, dim: int, rule: Counter, planes: int, scale_lr: float, id_type: Any, path: str) -> None:
    table = dbj.BinaryTable(_random_bits(rows, planes * -(-dim // 8)), jnp.full((rows, 1), 0.3, jnp.float32), dim, planes=planes)
    ends = Ends(partial(_read, table), rows, dim, rule, planes, scale_lr)
    step, state = (_fused if path == "fused" else _optax)(table, rule, scale_lr)
    lookup = jax.jit(dbj.lookup)
    for ids, dy in ends.batches(3):
        here = jnp.asarray(ids, id_type)
        np.testing.assert_array_equal(np.asarray(here), ids)
        np.testing.assert_array_equal(np.asarray(lookup(table, here)), ends.lookup(ids))
        table, state = step(table, state, here, jnp.asarray(dy))
        assert ends.step(ids, dy) > 0
        ends.check(partial(_read, table))
    dbj.check_errors()


def _random_bits(rows: int, width: int) -> Any:
    """Random at the ends, where it matters."""
    rng = np.random.default_rng(5)
    blocks = [jnp.asarray(rng.integers(0, 256, (4000, width), np.uint8)) for _ in range(2)]

    @jax.jit
    def make(first: Any, last: Any) -> Any:
        bits = jnp.zeros((rows, width), jnp.uint8)
        return bits.at[: len(first)].set(first).at[rows - len(last) :].set(last)

    return make(*blocks)


def _read(table: Any, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(table.bits[start:stop]), np.array(table.scale[start:stop])


def _fused(table: Any, rule: Counter, scale_lr: float) -> tuple[Any, Any]:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, ids: Any, dy: Any) -> Any:
        return dbj.xor_update(table, ids, dy, state, rule=rule, scale_lr=scale_lr)

    return step, dbj.init_state(table, rule, scale_lr=scale_lr)


def _optax(table: Any, rule: Counter, scale_lr: float) -> tuple[Any, Any]:
    tx = dbj.xor(rule=rule, scale_lr=scale_lr)

    def loss(params: Any, ids: Any, dy: Any) -> Any:
        return (dbj.lookup(params["table"], ids) * dy).sum()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(table: Any, state: Any, ids: Any, dy: Any) -> Any:
        params = {"table": table}
        grads = dbj.grad(loss, ids=lambda _params, ids, _dy: {"table": ids})(params, ids, dy)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates)["table"], state

    return step, tx.init({"table": table})


if __name__ == "__main__":
    check(**json.loads(sys.argv[1]))
