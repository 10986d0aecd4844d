"""The JAX side: dualbin.jax under jit and what else there is in JAX."""

from __future__ import annotations

from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import dualbin.jax as dbj
from _speed.timing import Call, Clock, CpuClock, JaxCudaClock
from _speed.workloads import DTYPES, FORWARD, GRADIENTS, ID_SETS, UPDATE, Case, Data
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


def cases(data: Data, dtype: str, device: str) -> list[Case]:  # noqa: ARG001  (the device is JAX's default)
    inputs = _Inputs(data, _DTYPES[dtype])
    size = data.workload
    forward = size.forward_bytes(DTYPES[dtype], _ID_BYTES)
    update = {bits: size.update_bytes(DTYPES[dtype], _ID_BYTES, bits, data.unique) for bits in (8, 1)}
    return [
        Case(FORWARD, "dualbin.jax.lookup", forward, inputs.lookup),
        Case(FORWARD, "jnp.take", forward, inputs.take, peer=True),
        Case(UPDATE, "dualbin.jax.xor_update, Counter(8)", update[8], lambda: inputs.update(Counter(8))),
        Case(UPDATE, "dualbin.jax.xor_update, Counter(1)", update[1], lambda: inputs.update(Counter(1))),
        Case(UPDATE, "SGD by scatter-add into the table, donated", update[1], inputs.scatter_add, peer=True),
    ]


class _Inputs:
    """The arrays of a workload in one dtype, and the calls on them."""

    def __init__(self, data: Data, dtype: jnp.dtype) -> None:
        self._data, self._dtype = data, dtype

    @cached_property
    def ids(self) -> list[Array]:
        return [jnp.asarray(ids.astype(np.int32)) for ids in self._data.ids]

    @cached_property
    def gradients(self) -> list[Array]:
        count = self._data.workload.count
        return [jnp.asarray(np.tile(block.astype(self._dtype), (self._data.repeats, 1))[:count]) for block in self._data.blocks]

    def table(self) -> dbj.BinaryTable:
        return dbj.BinaryTable(self._data.bits(), self._data.scale, self._data.workload.dim)

    def dense(self) -> Array:
        return jnp.full((self._data.workload.rows, self._data.workload.dim), 0.3, self._dtype)

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

    def scatter_add(self) -> Call:
        dense, ids, gradients = self.dense(), self.ids, self.gradients
        step = jax.jit(lambda dense, ids, rows: dense.at[ids].add(-1e-3 * rows), donate_argnums=0)

        def call(index: int) -> Array:
            nonlocal dense
            dense = step(dense, ids[index % ID_SETS], gradients[index % GRADIENTS])
            return dense

        return call
