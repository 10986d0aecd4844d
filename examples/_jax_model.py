"""The demo's language model in JAX: the same computation as in _torch_model, from the same initial values, on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import dualbin.jax as dbj
from _setup import Run, Settings, batches, evaluation_steps, held_out_batches, initial_values
from _text import Corpus
from dualbin.rules import Counter

jax.config.update("jax_default_matmul_precision", "highest")  # as PyTorch, which does not round to TF32 on a GPU either

Params = dict[str, Any]  # "embedding": the table; "dense": everything else


def linear(values: Params, name: str, x: Array) -> Array:
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def layer_norm(values: Params, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * values[f"{name}.weight"] + values[f"{name}.bias"]


def logits_of(params: Params, ids: Array, heads: int) -> Array:
    """float32 `[batch, context, vocabulary]`."""
    dense = params["dense"]
    x = dbj.lookup(params["embedding"], ids) + dense["position"]
    qkv = linear(dense, "qkv", layer_norm(dense, "norm1", x))
    q, k, v = jnp.moveaxis(qkv.reshape(*ids.shape, 3, heads, -1), 2, 0)
    x = x + linear(dense, "mix", jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    x = x + linear(dense, "down", jax.nn.gelu(linear(dense, "up", layer_norm(dense, "norm2", x)), approximate=False))
    return linear(dense, "out", linear(dense, "narrow", layer_norm(dense, "norm3", x)))


def loss_of(params: Params, tokens: Array, heads: int) -> Array:
    logits = logits_of(params, tokens[:, :-1], heads)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW for everything but the table, xor for that."""
    rates = jnp.array([settings.rate(step) for step in range(settings.steps)])
    adamw = optax.adamw(lambda count: settings.lr * rates[count], b1=0.9, b2=0.99, weight_decay=0.01)
    xor = dbj.xor(lambda count: settings.table_lr * rates[count], rule=Counter(8, norm=settings.norm), scale_lr=settings.scale_lr)
    return optax.partition({"dense": optax.chain(optax.clip_by_global_norm(1.0), adamw), "table": xor}, dbj.param_labels)


def make_step(loss: Callable[..., Array], tx: optax.GradientTransformation) -> Callable[..., Any]:
    """One compiled step. Parameters and state are donated: the table changes in place."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: Array) -> tuple[Params, Any, dbj.RowGrad]:
        _, grads = dbj.value_and_grad(loss, ids=lambda _, tokens: {"embedding": tokens[:, :-1]})(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads["embedding"]

    return step


def train(name: str, table: dbj.BinaryTable, corpus: Corpus, settings: Settings) -> Run:
    """Train a model with this table in front, on JAX's default device."""
    run = Run(name)
    start = time.perf_counter()
    params: Params = {"embedding": table, "dense": jax.tree.map(jnp.array, initial_values(settings))}
    tx = make_optimizer(settings)
    state = tx.init(params)
    loss = partial(loss_of, heads=settings.heads)
    step_of, held_out_loss = make_step(loss, tx), jax.jit(loss)

    def perplexity(limit: int) -> float:
        return math.exp(np.mean([float(held_out_loss(params, tokens)) for tokens in held_out_batches(corpus, settings, limit)]))

    marks = evaluation_steps(settings)
    with tqdm(batches(corpus, settings), total=settings.steps, desc=name, unit="step") as progress:
        for step, tokens in enumerate(progress, 1):
            params, state, gradient = step_of(params, state, tokens)
            run.gradient_bytes = byte_count(gradient)
            if step in marks:
                run.curve.append((step, perplexity(limit=8)))
                progress.set_postfix(perplexity=f"{run.curve[-1][1]:.1f}")
    run.perplexity = perplexity(limit=1000)
    run.seconds = time.perf_counter() - start
    run.table_bytes = byte_count(params["embedding"])
    run.kept_bytes = run.table_bytes + byte_count(state.inner_states["table"])
    return run


def byte_count(tree: Any) -> int:
    """Bytes of the arrays in a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
