"""Large fresh results come in huge pages in both frontends: what the system counts of the faults of their pages."""

import sys
from pathlib import Path

import numpy as np
import pytest

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ROWS, _DIM = 4096, 4096
_SMALL_PAGES = _ROWS * _DIM * 4 // 4096  # of a result of 64 MiB

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not _ENABLED.exists() or "[never]" in _ENABLED.read_text(), reason="the system has no huge pages to give"
)


def faults(call) -> int:
    """The fewest pages that one of some calls met for the first time."""
    import resource

    def one() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        result = call()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        del result
        return after - before

    return min(one() for _ in range(4))


def test_torch():
    import torch

    import dualbin.torch as dbt

    table = dbt.BinaryEmbedding(64, _DIM).weight
    ids = torch.zeros(_ROWS, dtype=torch.int64)
    with torch.no_grad():
        assert faults(lambda: dbt.lookup(table, ids)) < _SMALL_PAGES // 4
        if "[madvise]" in _ENABLED.read_text():  # what nobody asks for then shows that the count says something
            assert faults(lambda: torch.ones(_ROWS, _DIM)) >= _SMALL_PAGES


def test_jax():
    import jax
    import jax.numpy as jnp

    import dualbin.jax as dbj

    table = dbj.BinaryTable(jnp.zeros((64, _DIM // 8), jnp.uint8), jnp.full((64, 1), 0.5, jnp.float32), _DIM)
    ids = jnp.asarray(np.zeros(_ROWS, np.int32))
    lookup = jax.jit(dbj.lookup)
    assert faults(lambda: jax.block_until_ready(lookup(table, ids))) < _SMALL_PAGES // 4
    segments = jnp.arange(_ROWS)
    bags = jax.jit(lambda table, ids: dbj.lookup_bag(table, ids, segments, _ROWS))
    assert faults(lambda: jax.block_until_ready(bags(table, ids))) < _SMALL_PAGES // 4
