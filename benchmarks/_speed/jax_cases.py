"""The JAX side: dualbin.jax under jit and what else there is in JAX."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import dualbin.jax as dbj
from _speed.cases import FORWARD, LOOKUPS, UPDATE, UPDATES, Case, Group
from _speed.timing import Call, Clock, CpuClock, JaxCudaClock
from _speed.workloads import DTYPES, GRADIENTS, ID_SETS, Data, data_of, workloads
from dualbin.rules import Counter

_DTYPES = {"fp32": jnp.dtype(jnp.float32), "bf16": jnp.dtype(jnp.bfloat16)}
_ID_BYTES = 4  # int32, what JAX has by default


def start(device: str) -> str:
    """Check that JAX runs on the device and return its name ("" for a CPU)."""
    backend = jax.default_backend()
    if backend != {"cpu": "cpu", "cuda": "gpu"}[device]:
        msg = f"JAX runs on {backend!r}"
        raise RuntimeError(msg)
    return "" if device == "cpu" else jax.devices()[0].device_kind


def clock(device: str, copy_bytes: int) -> Clock:
    if device == "cuda":
        return JaxCudaClock(copy_bytes)
    source = np.zeros(copy_bytes // 2, np.uint8)
    target = np.zeros_like(source)
    return CpuClock(lambda _: np.copyto(target, source), copy_bytes, jax.block_until_ready)


def release() -> None:
    """JAX frees what nothing refers to by itself."""


def peak_memory() -> int | None:
    """JAX does not say it for a part of a run."""
    return None


def groups(topic: str, device: str, small: bool) -> Iterator[Group]:
    """The cases of a topic, workload by workload. Only tables have any: other topics are those of PyTorch."""
    if topic not in (LOOKUPS, UPDATES):
        return
    cases = _lookups if topic == LOOKUPS else _updates
    for workload in workloads(device, small):
        for dtype in DTYPES:
            yield Group(str(workload), dtype, cases(_Inputs(data_of(workload), _DTYPES[dtype]), dtype))


def _lookups(inputs: _Inputs, dtype: str) -> list[Case]:
    forward = inputs.data.workload.forward_bytes(DTYPES[dtype], _ID_BYTES)
    return [Case(FORWARD, "dualbin.jax.lookup", forward, inputs.lookup), Case(FORWARD, "jnp.take", forward, inputs.take, peer=True)]


def _updates(inputs: _Inputs, dtype: str) -> list[Case]:
    size = inputs.data.workload
    update = {bits: size.update_bytes(DTYPES[dtype], _ID_BYTES, bits, inputs.data.unique) for bits in (8, 1)}
    return [
        Case(UPDATE, "dualbin.jax.xor_update, Counter(8)", update[8], lambda: inputs.update(Counter(8))),
        Case(UPDATE, "dualbin.jax.xor_update, Counter(1)", update[1], lambda: inputs.update(Counter(1))),
        Case(UPDATE, "dualbin.jax.grad, xor, optax.apply_updates, Counter(8)", update[8], lambda: inputs.optax_update(Counter(8))),
        Case(UPDATE, "SGD by scatter-add into the table, donated", update[1], inputs.scatter_add, peer=True),
    ]


class _Inputs:
    """The arrays of a workload in one dtype, and the calls on them."""

    def __init__(self, data: Data, dtype: jnp.dtype) -> None:
        self.data, self._dtype = data, dtype

    @cached_property
    def ids(self) -> list[Array]:
        return [jnp.asarray(ids.astype(np.int32)) for ids in self.data.ids]

    @cached_property
    def gradients(self) -> list[Array]:
        count = self.data.workload.count
        return [jnp.tile(jnp.asarray(block, self._dtype), (self.data.repeats, 1))[:count] for block in self.data.blocks]

    def table(self) -> dbj.BinaryTable:
        size = self.data.workload
        bits = jax.random.bits(jax.random.key(0), (size.rows, size.width), jnp.uint8)
        return dbj.BinaryTable(bits, jnp.full((size.rows, 1), 0.3, jnp.float32), size.dim)

    def dense(self) -> Array:
        return jnp.full((self.data.workload.rows, self.data.workload.dim), 0.3, self._dtype)

    def lookup(self) -> Call:
        table, ids = self.table(), self.ids
        function = jax.jit(partial(dbj.lookup, dtype=self._dtype))
        return lambda index: function(table, ids[index % ID_SETS])

    def take(self) -> Call:
        dense, ids = self.dense(), self.ids
        function = jax.jit(partial(jnp.take, axis=0))
        return lambda index: function(dense, ids[index % ID_SETS])

    def update(self, rule: Counter) -> Call:
        ids, gradients = self.ids, self.gradients
        table = self.table()
        state = dbj.init_state(table, rule)
        step = jax.jit(partial(dbj.xor_update, rule=rule), donate_argnums=(0, 3))

        def call(index: int) -> Array:
            nonlocal table, state
            table, state = step(table, ids[index % ID_SETS], gradients[index % GRADIENTS], state)
            return state.stats

        return call

    def optax_update(self, rule: Counter) -> Call:
        """The same from the same gradient of the rows, as a transformation of optax: sums of rows, masks, and their XOR into the table."""
        all_ids, gradients = self.ids, self.gradients
        tx = dbj.xor(rule=rule)
        params = {"table": self.table()}
        state = tx.init(params)

        def loss(params: dict, ids: Array, dy: Array) -> Array:
            return (dbj.lookup(params["table"], ids, dtype=self._dtype) * dy).sum()

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: dict, state: dbj.XorState, ids: Array, dy: Array) -> tuple[dict, dbj.XorState]:
            grads = dbj.grad(loss, ids=lambda _params, ids, _dy: {"table": ids})(params, ids, dy)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def call(index: int) -> Array:
            nonlocal params, state
            params, state = step(params, state, all_ids[index % ID_SETS], gradients[index % GRADIENTS])
            return params["table"].scale

        return call

    def scatter_add(self) -> Call:
        dense, ids, gradients = self.dense(), self.ids, self.gradients
        step = jax.jit(lambda dense, ids, rows: dense.at[ids].add(-1e-3 * rows), donate_argnums=0)

        def call(index: int) -> Array:
            nonlocal dense
            dense = step(dense, ids[index % ID_SETS], gradients[index % GRADIENTS])
            return dense

        return call
