"""Checkpoints with orbax: a run that was killed goes on to the very bits of one that was not.

python checkpoint.py DIRECTORY
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import dualbin
import dualbin.jax as dbj

STEPS = 12
target = jax.random.normal(jax.random.key(1), (100, 16))
tx = dbj.xor(1.0, rule=dualbin.rules.Counter(4, every=2))


@jax.jit
def step(table, state, ids):
    grads = dbj.grad(lambda table: jnp.mean((table[ids] - target[ids]) ** 2))(table)
    updates, state = tx.update(grads, state, table)
    return optax.apply_updates(table, updates), state


table = dbj.BinaryTable.create(jax.random.key(0), 1_000, 16)
carry = {"table": table, "state": tx.init(table)}
with ocp.CheckpointManager(Path(sys.argv[1]).resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
    start = manager.latest_step()
    if start is not None:
        carry = manager.restore(start, args=ocp.args.StandardRestore(carry))
    for number in range(0 if start is None else start + 1, STEPS):
        ids = jax.random.randint(jax.random.key(number), (32,), 0, 100, jnp.int32)
        carry["table"], carry["state"] = step(carry["table"], carry["state"], ids)
        manager.save(number, args=ocp.args.StandardSave(carry))
        manager.wait_until_finished()
        print(f"step {number}", flush=True)

digest = hashlib.sha256(b"".join(bytes(jax.device_get(leaf)) for leaf in jax.tree.leaves(carry))).hexdigest()
print(f"started after {start}, ended with {digest}")
