"""The step of mesh.py on several hosts: one process for each, the rows of the table over all of their devices.

python hosts.py COORDINATOR:PORT PROCESSES PROCESS     on every host; here two processes on one machine will do
"""

import functools
import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dualbin.jax as dbj

jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs; GPUs have their own
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

V, D, BATCH = 1_000, 32, 64
mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("all"))
tx = dbj.xor(1.0)
run = dbj.value_and_grad(lambda table, ids, y: jnp.mean((table[ids] - y) ** 2), ids=lambda table, ids, y: ids)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(table, state, ids, y):
    loss, grads = run(table, ids, y)
    updates, state = tx.update(grads, state, table)
    return optax.apply_updates(table, updates), state, loss


# every host makes its own shards only
table = jax.jit(lambda: dbj.BinaryTable.create(jax.random.key(0), V, D), out_shardings=split)()
state = tx.init(table)
losses = []
for number in range(20):
    rng = np.random.default_rng(number)  # a real program reads its own part of the data
    ids = rng.integers(0, 100, BATCH).astype(np.int32)
    y = np.random.default_rng(99).normal(size=(100, D)).astype(np.float32)[ids]
    part = slice(jax.process_index() * BATCH // jax.process_count(), (jax.process_index() + 1) * BATCH // jax.process_count())
    batch = [jax.make_array_from_process_local_data(split, x[part]) for x in (ids, y)]
    table, state, loss = step(table, state, *batch)
    losses.append(float(loss))
bits = jax.jit(lambda table: table.bits, out_shardings=everywhere)(table)
digest = hashlib.sha256(bytes(jax.device_get(bits.addressable_data(0)))).hexdigest()
print(f"process {jax.process_index()} of {jax.process_count()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, bits {digest}", flush=True)
assert losses[-1] < losses[0]
jax.distributed.shutdown()
