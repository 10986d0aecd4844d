"""A flax nnx model with a BinaryEmbed, trained by an nnx.Optimizer."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dualbin.jax as dbj

CLASSES = 5


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.embed = dbj.BinaryEmbed(2_000, 64, rngs=rngs)
        self.head = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed(ids).mean(axis=1))


model = Classifier(nnx.Rngs(0))
tx = optax.partition({"dense": optax.adam(1e-2), "table": dbj.xor(1.0)}, dbj.param_labels)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    graphdef, params = nnx.split(model, nnx.Param)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(batch["ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loss, grads = dbj.value_and_grad(loss_fn, ids=lambda params, batch: {"embed.table": batch["ids"]})(params, batch)
    optimizer.update(model, grads)
    return loss


losses = []
for number in range(40):
    ids = jax.random.randint(jax.random.key(number), (64, 6), 0, 100, jnp.int32)
    losses.append(float(step(model, optimizer, {"ids": ids, "y": ids[:, 0] % CLASSES})))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.9 * losses[0]
