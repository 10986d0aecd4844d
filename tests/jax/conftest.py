"""Four devices on the CPU, and what several test files need."""

import os

# XLA reads this when the first array is made. The tests compile hundreds of small programs and run each a few times: optimizing costs most.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
).strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualbin.jax as dbj


@pytest.fixture
def new_table():
    """Makes a table of random bits and scales; the padding row, if any, has scale 0."""

    def make(rows, dim, seed=0, padding_idx=None):
        rng = np.random.default_rng(seed)
        bits = np.packbits(rng.integers(0, 2, (rows, dim), np.uint8), axis=1, bitorder="little")
        scale = rng.uniform(0.5, 2.0, (rows, 1)).astype(np.float32)
        if padding_idx is not None:
            scale[padding_idx] = 0
        return dbj.BinaryTable(bits=bits, scale=scale, dim=dim)

    return make


@pytest.fixture
def dense():
    """Turns a RowGrad into the float gradient [V, D] of all rows but the sentinel, for comparisons."""

    def to_dense(grad, rows):
        return jnp.zeros((rows, grad.rows.shape[-1])).at[grad.ids].add(grad.rows, mode="drop")

    return to_dense


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
