"""One training run in JAX: the model of torch_model, from the same initial values, on the same batches. Only the dropout masks differ."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share one GPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import dualbin.jax as dbj
from _quality import data
from _quality.data import Task, Text
from _quality.variants import Variant
from dualbin.rules import Rule

Params = dict[str, Any]  # "embedding": the input table; "dense": everything else by name


class Runner:
    """Keeps the text on the device for many runs; the same arguments as in train_torch."""

    def __init__(self, text: Text, device: str, threads: int) -> None:
        del threads  # XLA takes those that the process may use
        self._device = jax.devices("gpu" if device == "cuda" else "cpu")[0]
        self._text = text
        self._train, self._valid = (jax.device_put(part, self._device) for part in (text.train, text.valid))

    def run(self, task: Task, variant: Variant, seed: int) -> dict[str, Any]:
        """Train, and return losses on both halves of the held-out text, and bytes.

        Raises:
            ValueError: the JAX frontend has no such table here.
            FloatingPointError: the loss is not finite.
        """
        with jax.default_device(self._device):
            params, state, final = self._trained(task, variant, seed)
            selection, report = self._held_out(task, params)
            fewer = self._served_at_fewer_planes(task, params)
        if not (math.isfinite(selection) and math.isfinite(report)):
            msg = f"the loss on the held-out text is {selection} and {report}"
            raise FloatingPointError(msg)
        outcome = {"selection": selection, "report": report, "train": final, **_memory(params, state), "mode": "jit"}
        return outcome if fewer is None else outcome | {"fewer_planes": fewer}

    def _served_at_fewer_planes(self, task: Task, params: Params) -> dict[str, dict[str, float]] | None:
        """Losses of the finished model with its table served at fewer planes, by their number; None for a table of floats."""
        table, found = params["embedding"], {}
        if not isinstance(table, dbj.BinaryTable):
            return None
        for planes in (1, 2, 4):
            if planes < table.planes:
                selection, report = self._held_out(task, params | {"embedding": table.with_planes(planes)})
                found[str(planes)] = {"selection": selection, "report": report}
        return found

    def _trained(self, task: Task, variant: Variant, seed: int) -> tuple[Params, Any, float]:
        half = self._device.platform == "gpu"
        params = _initial_params(task, variant, self._text, seed)
        rule = variant.rule() if variant.kind == "xor" else variant.options["optimizer"]
        rate = jnp.float32(variant.options.get("lr", 1.0))
        state = _make_optimizer(task, rule, rate, jnp.uint32(seed)).init(params)
        windows = data.training_windows(task, self._train.size, seed)
        step = partial(_compiled_step(task, rule, half), rate=rate, seed=jnp.uint32(seed), tokens=self._train)
        source, target = jnp.array(windows.source), jnp.array(windows.target)
        count, losses = jnp.zeros((), jnp.int32), []
        for _ in range(task.steps):
            params, state, count, loss = step(params, state, count, source=source, target=target)
            losses.append(loss)
        return params, state, float(jnp.mean(jnp.stack(losses[-max(1, task.steps // 10) :])))

    def _held_out(self, task: Task, params: Params) -> tuple[float, float]:
        loss = _compiled_loss(task, self._device.platform == "gpu")
        found = []
        for windows in data.held_out_windows(task, self._valid.size):
            batches = zip(jnp.array(windows.source), jnp.array(windows.target), strict=True)
            found.append(float(jnp.mean(jnp.stack([loss(params, *_windows_of(task, self._valid, *batch)) for batch in batches]))))
        selection, report = found
        return selection, report


def _initial_params(task: Task, variant: Variant, text: Text, seed: int) -> Params:
    dense = {name: jnp.array(value) for name, value in data.initial_weights(task, text, seed).items()}
    if variant.options.get("projection"):
        dense["projection"] = jnp.eye(task.width)
    if variant.kind == "fp32":
        return {"embedding": jnp.array(data.initial_floats((task.vocabulary, task.width), 0.1, seed, stream=0)), "dense": dense}
    if variant.kind != "xor":
        msg = f"variant.kind must be 'fp32' or 'xor' in JAX, got {variant.kind!r}"
        raise ValueError(msg)
    scale = np.full((task.vocabulary, 1), data.INITIAL_SCALE, np.float32)
    planes = variant.options.get("planes", 1)
    bits = data.initial_bits(task, seed, variant.options.get("spread", 0.5), planes)
    return {"embedding": dbj.BinaryTable(bits=bits, scale=scale, dim=task.width, planes=planes), "dense": dense}


def _make_optimizer(task: Task, rule: Rule | str, rate: Array, seed: Array) -> optax.GradientTransformation:
    """A table of floats is trained by "adam" at `rate` times the base rate, or by "adagrad" at `rate` times the share of the full rate."""
    shares = jnp.array(data.schedule(task.steps))
    dense = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda count: task.lr * shares[count], b1=0.9, b2=0.99, weight_decay=0.01)
    )
    if rule == "adam":
        table = optax.adam(lambda count: task.lr * rate * shares[count], b1=0.9, b2=0.99)
    elif rule == "adagrad":
        table = optax.adagrad(lambda count: rate * shares[count], initial_accumulator_value=0.0, eps=1e-20)
    else:
        table = dbj.xor(lambda count: shares[count], rule=rule, scale_lr=task.scale_lr, seed=seed)
    return optax.partition({"dense": dense, "table": table}, {"embedding": "table", "dense": "dense"})


@lru_cache(maxsize=8)
def _compiled_loss(task: Task, half: bool) -> Callable[..., Array]:
    return jax.jit(partial(_loss, task, half, None))


@lru_cache(maxsize=8)  # rate and seed are operands, so that the runs of a family share what was compiled
def _compiled_step(task: Task, rule: Rule | str, half: bool) -> Callable[..., Any]:
    """One compiled step. Parameters and state are donated: a 1-bit table changes in place."""

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(
        params: Params, state: Any, count: Array, *, rate: Array, seed: Array, tokens: Array, source: Array, target: Array
    ) -> tuple[Params, Any, Array, Array]:
        ids, targets = _windows_of(task, tokens, source[count], target[count])
        loss_of = partial(_loss, task, half, jax.random.fold_in(jax.random.key(seed), count))
        if isinstance(params["embedding"], dbj.BinaryTable):
            gradient_of = dbj.value_and_grad(loss_of, ids=lambda _params, ids, _targets: {"embedding": ids})
        else:
            gradient_of = jax.value_and_grad(loss_of)
        loss, gradient = gradient_of(params, ids, targets)
        updates, state = _make_optimizer(task, rule, rate, seed).update(gradient, state, params)
        return optax.apply_updates(params, updates), state, count + 1, loss

    return step


def _windows_of(task: Task, tokens: Array, source: Array, target: Array) -> tuple[Array, Array]:
    places = jnp.arange(task.context)
    return tokens[source[:, None] + places], tokens[target[:, None] + places]


# ---- the model ---------------------------------------------------------------------------------------------------------------------------


def _loss(task: Task, half: bool, key: Array | None, params: Params, ids: Array, targets: Array) -> Array:
    """Mean cross entropy in float32. With `half`, matrices are multiplied in bfloat16; without a key there is no dropout."""
    table, dense = params["embedding"], params["dense"]
    x = dbj.lookup(table, ids) if isinstance(table, dbj.BinaryTable) else table[ids]
    dtype = jnp.bfloat16 if half else jnp.float32
    multiply = partial(_linear, dense, dtype)
    if "projection" in dense:
        x = x.astype(dtype) @ dense["projection"].astype(dtype)
    if task.name == "lm":
        drop = _Dropout(key, task.dropout)
        x = drop(x + dense["position"])
        for layer in range(task.layers):
            x = _block(task, dense, f"blocks.{layer}", multiply, drop, x)
        x = _norm(dense, "norm", x)
    logits = multiply("out", x).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class _Dropout:
    """A new mask at every call."""

    def __init__(self, key: Array | None, rate: float) -> None:
        self._key, self._rate, self._calls = key, rate, 0

    def __call__(self, x: Array) -> Array:
        if self._key is None:
            return x
        self._calls += 1
        kept = jax.random.bernoulli(jax.random.fold_in(self._key, self._calls), 1 - self._rate, x.shape)
        return jnp.where(kept, x / (1 - self._rate), 0)


def _block(task: Task, dense: Params, name: str, multiply: Callable[[str, Array], Array], drop: _Dropout, x: Array) -> Array:
    batch, context, _ = x.shape
    qkv = multiply(f"{name}.qkv", _norm(dense, f"{name}.norm1", x)).reshape(batch, context, 3, task.heads, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    x = x + drop(multiply(f"{name}.mix", jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)))
    hidden = jax.nn.gelu(multiply(f"{name}.up", _norm(dense, f"{name}.norm2", x)), approximate=False)
    return x + drop(multiply(f"{name}.down", hidden))


def _linear(dense: Params, dtype: Any, name: str, x: Array) -> Array:
    return x.astype(dtype) @ dense[f"{name}.weight"].astype(dtype).T + dense[f"{name}.bias"].astype(dtype)


def _norm(dense: Params, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * dense[f"{name}.weight"] + dense[f"{name}.bias"]


# ---- what it holds -----------------------------------------------------------------------------------------------------------------------


def _memory(params: Params, state: Any) -> dict[str, int]:
    """As torch_tables.Memory. The window of `every` is allocated for all V rows."""
    matrix = params["dense"]["projection"].nbytes if "projection" in params["dense"] else 0
    memory = _table_memory(params["embedding"], state)
    for part, share in (("served_bytes", 1), ("weights_bytes", 1), ("rule_bytes", 2)):
        memory[part] += share * matrix
    return memory


def _table_memory(table: Any, state: Any) -> dict[str, int]:
    of_table = state.inner_states["table"].inner_state
    if not isinstance(table, dbj.BinaryTable):
        moments = [leaf.nbytes for leaf in jax.tree.leaves(of_table) if leaf.shape == table.shape]
        return {"served_bytes": table.nbytes, "weights_bytes": table.nbytes, "rule_bytes": sum(moments), "scale_bytes": 0}
    of_rule = of_table.tables["embedding"]
    window = of_rule.window[:2] if of_rule.window else ()  # ids and rows

    def size(*names: str) -> int:
        return sum(of_rule.arrays[name].nbytes for name in names if name in of_rule.arrays)

    return {
        "served_bytes": table.bits.nbytes + table.scale.nbytes,
        "weights_bytes": table.bits.nbytes,
        "rule_bytes": size("counter", "ema") + sum(array.nbytes for array in window),
        "scale_bytes": table.scale.nbytes + size("record", "count", "squares"),
    }
