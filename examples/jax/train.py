"""A table and a dense head under one optax optimizer, with the whole step in one jit."""

import functools

import jax
import jax.numpy as jnp
import optax

import dualbin
import dualbin.jax as dbj

V, D, CLASSES = 10_000, 64, 5


def loss_fn(params, batch):
    x = params["emb"][batch["ids"]].mean(axis=1)  # the same as dbj.lookup(params["emb"], batch["ids"])
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def make_batch(key):
    ids = jax.random.randint(key, (64, 6), 0, 100, jnp.int32)
    return {"ids": ids, "y": ids[:, 0] % CLASSES}


params = {"emb": dbj.BinaryTable.create(jax.random.key(0), V, D), "head": jnp.zeros((D, CLASSES))}
tx = optax.partition(
    {
        "dense": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        "table": dbj.xor(optax.cosine_decay_schedule(1.0, 200), rule=dualbin.rules.Counter(8)),
    },
    dbj.param_labels,
)
state = tx.init(params)
run = dbj.value_and_grad(loss_fn, ids=lambda params, batch: {"emb": batch["ids"]})


@functools.partial(jax.jit, donate_argnums=(0, 1))  # donated: the table changes in place
def step(params, state, batch):
    loss, grads = run(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


losses = []
for number in range(60):
    params, state, loss = step(params, state, make_batch(jax.random.key(number)))
    losses.append(float(loss))
stats = dbj.read_stats(state)["emb"]  # only this waits for the device
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; of the last step's bits {stats['flips'] / (stats['rows'] * D):.2%} flipped: {stats}")
assert losses[-1] < 0.9 * losses[0]
