"""A flax linen model: the table is a parameter like any other, and TrainState works unchanged."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import dualbin.jax as dbj

V, D, CLASSES = 2_000, 64, 5


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = self.param("table", dbj.BinaryTable.create, V, D)
        return nn.Dense(CLASSES)(dbj.lookup(table, ids).mean(axis=1))


def make_batch(key):
    ids = jax.random.randint(key, (64, 6), 0, 100, jnp.int32)
    return {"ids": ids, "y": ids[:, 0] % CLASSES}


model = Classifier()
tx = optax.partition({"dense": optax.adam(1e-2), "table": dbj.xor(1.0)}, dbj.param_labels)
params = model.init(jax.random.key(0), make_batch(jax.random.key(0))["ids"])["params"]
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def loss_fn(params, batch):
    logits = model.apply({"params": params}, batch["ids"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


@functools.partial(jax.jit, donate_argnums=0)  # donated: the table changes in place
def step(state, batch):
    loss, grads = dbj.value_and_grad(loss_fn, ids=lambda params, batch: {"table": batch["ids"]})(state.params, batch)
    return state.apply_gradients(grads=grads), loss


losses = []
for number in range(60):
    state, loss = step(state, make_batch(jax.random.key(number)))
    losses.append(float(loss))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.9 * losses[0]
