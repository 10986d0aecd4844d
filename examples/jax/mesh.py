"""One training step on a mesh: the batch over one axis, the rows of the table over another, nothing else changed.

On a machine without four devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 python mesh.py
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dualbin.jax as dbj

V, D = 8_000, 64
target = jax.random.normal(jax.random.key(1), (100, D))
tx = dbj.xor(1.0)
run = dbj.value_and_grad(lambda table, ids: jnp.mean((table[ids] - target[ids]) ** 2), ids=lambda table, ids: ids)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(table, state, ids):
    loss, grads = run(table, ids)
    updates, state = tx.update(grads, state, table)
    return optax.apply_updates(table, updates), state, loss


def train(mesh, rows, batch):
    """Train with the rows of the table over the mesh axis `rows` (None: all of them everywhere) and the batch over `batch`."""
    table = dbj.BinaryTable.create(jax.random.key(0), V, D)
    table = jax.device_put(table, NamedSharding(mesh, PartitionSpec(rows)))
    state = tx.init(table)  # sharded as the table is
    for number in range(30):
        ids = jax.random.randint(jax.random.key(number), (64,), 0, 100, jnp.int32)
        table, state, loss = step(table, state, jax.device_put(ids, NamedSharding(mesh, PartitionSpec(batch))))
    shard = table.bits.addressable_shards[0].data.shape
    print(f"rows over {rows}, batch over {batch}: loss {loss:.4f}, {shard[0]} of {V} rows on a device")
    return table


mesh = jax.make_mesh((2, 2), ("data", "rows"), axis_types=(AxisType.Auto,) * 2)
replicated = train(mesh, None, "data")
sharded = train(mesh, "rows", "data")
different = (jnp.bitwise_count(jnp.asarray(jax.device_get(replicated.bits)) ^ jax.device_get(sharded.bits))).sum() / (V * D)
assert different < 1e-3  # sums of floats over another number of devices round differently; nothing else does
