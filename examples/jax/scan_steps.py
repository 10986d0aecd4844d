"""Many steps in one compiled call, and a batch in micro-batches: the table is one buffer from the first step to the last."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax

import dualbin.jax as dbj

V, D, STEPS = 10_000, 64, 50
target = jax.random.normal(jax.random.key(1), (100, D))


def loss_fn(table, ids):
    return jnp.mean((table[ids] - target[ids]) ** 2)


run = dbj.accumulate(loss_fn, 4, ids=lambda table, ids: ids)  # the gradient of the whole batch, with a quarter of it in memory
tx = dbj.xor(1.0)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train(table, state, batches):
    def body(carry, ids):
        table, state = carry
        loss, grads = run(table, ids)
        updates, state = tx.update(grads, state, table)
        return (optax.apply_updates(table, updates), state), loss

    return lax.scan(body, (table, state), batches)


table = dbj.BinaryTable.create(jax.random.key(0), V, D)
state = tx.init(table)
before = table.bits.unsafe_buffer_pointer()
batches = jax.random.randint(jax.random.key(2), (STEPS, 64), 0, 100, jnp.int32)
(table, state), losses = train(table, state, batches)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, same buffer: {table.bits.unsafe_buffer_pointer() == before}")
assert losses[-1] < 0.9 * losses[0]
assert table.bits.unsafe_buffer_pointer() == before
