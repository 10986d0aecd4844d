"""Where this suite runs, and what several of its files need.

It runs where JAX does by default. `DUALBIN_TEST_PLATFORM=cpu` or `cuda` chooses, and with `cuda` every test here counts as marked `cuda`. A
test on a mesh takes four devices, or two where there are no more; with one it is skipped.
"""

import contextlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import dualbin.jax as dbj
from dualbin import backends

PLATFORM = os.environ.get("DUALBIN_TEST_PLATFORM", "")
if PLATFORM != "cuda":
    # The tests compile thousands of small programs and run each a few times: optimizing costs most, and of two ways to emit a fusion the
    # one by way of MLIR, twice the other; later versions do not know that choice and stop the process. XLA reads this with its first array.
    # `make parity` runs with what XLA does by itself.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1"
    ).strip()
    if jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
else:  # trying kernels for every small product would take longer than all tests
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes of one suite share a GPU
if PLATFORM not in {"", "cpu", "cuda"}:
    message = f"DUALBIN_TEST_PLATFORM must be cpu or cuda, got {PLATFORM!r}"
    raise pytest.UsageError(message)
if PLATFORM == "cuda" and not backends()["cuda"]["devices"]:
    message = "DUALBIN_TEST_PLATFORM=cuda, but dualbin has no NVIDIA GPU here or is built without CUDA"
    raise pytest.UsageError(message)
if PLATFORM:
    # with a GPU the CPU stays there: callbacks to Python need it, and so do arrays that come from NumPy by DLPack
    jax.config.update("jax_platforms", {"cpu": "cpu", "cuda": "cuda,cpu"}[PLATFORM])
    os.environ["JAX_PLATFORMS"] = jax.config.jax_platforms  # for the processes that tests start
# Matrix products in TF32 round differently in every program. Where nothing is faster than float32 it changes nothing.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if PLATFORM == "cuda":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker("cuda")


@pytest.fixture(scope="session", autouse=True)
def _platform():
    if PLATFORM and jax.default_backend() != {"cpu": "cpu", "cuda": "gpu"}[PLATFORM]:
        pytest.exit(f"DUALBIN_TEST_PLATFORM={PLATFORM}, but JAX runs on {jax.default_backend()}", returncode=1)


@pytest.fixture
def on_gpu():
    """Whether the suite runs on a GPU."""
    return jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def _bad_ids_are_of_one_test(on_gpu):
    """A GPU counts bad ids until somebody asks: those of a test are not found by the next one that asks."""
    yield
    if on_gpu:
        with contextlib.suppress(IndexError):
            dbj.check_errors()


@pytest.fixture
def make_mesh():
    """Makes a mesh of four devices, or of two where there are no more, with one axis or two."""

    def make(*names, kind=AxisType.Auto):
        if jax.device_count() < 2:
            pytest.skip("needs two devices")
        count = 4 if jax.device_count() >= 4 else 2
        sizes = (count,) if len(names) == 1 else (count // 2, 2)
        return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names), devices=jax.devices()[:count])

    return make


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
def mesh(make_mesh):
    return make_mesh("batch")
