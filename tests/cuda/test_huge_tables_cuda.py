"""Tables of more than 2**31 rows, 2**32 weights or 2**32 bytes: what is done at their ends is what the reference does there.

The same with a few thousand rows runs on the CPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualbin import reference, rules
from ends import BEYOND, ROWS, Ends

torch = pytest.importorskip("torch")

FEW = 3 * ROWS
MANY_ROWS = 2**31 + BEYOND
WIDE = 2**25 + BEYOND  # rows of 128: 2**32 weights
WIDER = 2**26 + BEYOND  # rows of 128 with 4 planes: 2**32 bytes


@pytest.fixture
def alone() -> Iterator[None]:
    """No other process of these tests has a large table meanwhile."""
    with (Path(tempfile.gettempdir()) / "dualbin-huge-tables.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def need(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, and {free:.0f} are free")


def gigabytes(rows: int, dim: int, rule: rules.Rule, planes: int, scale_lr: float) -> float:
    """A table, its state, a copy of its bits, and two bytes a row to compare with."""
    state = rules.state_spec(rule, rows, dim, planes=planes, train_scale=scale_lr > 0)
    held = sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in state.values())
    return (held + rows * (2 * planes * -(-dim // 8) + 4 + 2)) / 1e9 + 1


def read(table: Any, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(array.detach()[start:stop].cpu().numpy().copy() for array in (table.bits, table.scale))


def on(device: str, *values: Any) -> Any:
    return pytest.param(*values, device, marks=[pytest.mark.cuda] if device == "cuda" else [])


SHAPES = [
    on("cpu", FEW, 8, rules.Counter(1), 1, 0.0),
    on("cpu", FEW, 128, rules.Counter(8), 4, 3e-3),
    on("cpu", FEW, 128, rules.Bop(), 1, 3e-3),
    on("cuda", MANY_ROWS, 8, rules.Counter(1), 1, 0.0),
    on("cuda", MANY_ROWS, 8, rules.Counter(1), 1, 3e-3),
    on("cuda", WIDE, 128, rules.Counter(2), 1, 3e-3),
    on("cuda", WIDER, 128, rules.Counter(8), 1, 3e-3),
    on("cuda", WIDER, 128, rules.Counter(8), 4, 3e-3),
    on("cuda", WIDE, 128, rules.Bop(), 1, 3e-3),
]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rows", "dim", "rule", "planes", "scale_lr", "device"), SHAPES)
def test_torch(rows: int, dim: int, rule: Any, planes: int, scale_lr: float, device: str) -> None:
    import dualbin.torch as dbt

    if device == "cuda":
        need(gigabytes(rows, dim, rule, planes, scale_lr))
    bits = torch.empty(rows, planes * dim // 8, dtype=torch.uint8, device=device).random_(0, 256)
    table = torch.nn.Parameter(dbt.BinaryTable(bits, torch.full((rows, 1), 0.3, device=device), dim, planes=planes))
    before = bits.clone()
    xor = dbt.XOR([table], rule=rule, scale_lr=scale_lr)
    ends = Ends(partial(read, table), rows, dim, rule, planes, scale_lr)
    for ids, dy in ends.batches(3):
        here = torch.from_numpy(ids).to(device)
        y = dbt.lookup(table, here)
        np.testing.assert_array_equal(y.detach().cpu().numpy(), ends.lookup(ids))
        y.backward(torch.from_numpy(dy).to(device))
        xor.step()
        xor.zero_grad()
        flips = ends.step(ids, dy)
        assert xor.stats()["flips"] == flips > 0
        ends.check(partial(read, table))
    middle = slice(ROWS, rows - ROWS)
    assert torch.equal(table.bits[middle], before[middle])
    assert bool((table.scale[middle] == 0.3).all())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rows", "device"), [on("cpu", FEW), on("cuda", WIDER)])
def test_what_is_made_of_a_table(rows: int, device: str) -> None:
    """Bags of it, fewer planes of it, and its average with another."""
    import dualbin.torch as dbt

    dim, planes = 128, 4
    if device == "cuda":
        need(4 * rows * (planes * dim // 8 + 4) / 1e9 + 1)
    tables = []
    for scale in (0.3, 0.7):
        bits = torch.empty(rows, planes * dim // 8, dtype=torch.uint8, device=device).random_(0, 256)
        tables.append(dbt.BinaryTable(bits, torch.full((rows, 1), scale, device=device), dim, planes=planes))
    start = rows - ROWS
    last = [dbt.BinaryTable(*map(torch.from_numpy, read(table, start, rows)), dim, planes=planes, first_row=start) for table in tables]

    ids = torch.randint(0, ROWS, (400,), generator=torch.Generator().manual_seed(1))
    bounds = torch.arange(0, 401, 20)
    rows_of = [
        torch.ops.dualbin.lookup_bag_packed(table.bits, table.scale, at, bounds.to(at.device), None, dim, "sum", torch.float32)
        for table, at in ((tables[0], (ids + start).to(device)), (last[0], ids))
    ]
    assert torch.equal(rows_of[0].cpu(), rows_of[1])

    fewer = tables[0].with_planes(2)
    want = reference.with_planes(*read(last[0], 0, ROWS), dim, planes, 2)
    for mine, other in zip(read(fewer, start, rows), want, strict=True):
        np.testing.assert_array_equal(mine, other)
    del fewer

    here, there = (dbt.average(*pair, 0.4, step=3) for pair in (tables, last))
    for mine, other in zip(read(here, start, rows), read(there, 0, ROWS), strict=True):
        np.testing.assert_array_equal(mine, other)


JAX_SHAPES = [
    on("cpu", FEW, 8, 1, 1, 0.0, True, "fused"),
    on("cpu", FEW, 128, 8, 4, 3e-3, False, "optax"),
    on("cuda", MANY_ROWS, 8, 1, 1, 0.0, True, "fused"),
    on("cuda", MANY_ROWS, 8, 1, 1, 0.0, True, "optax"),
    on("cuda", WIDE, 128, 2, 1, 3e-3, False, "fused"),
    on("cuda", WIDER, 128, 8, 4, 3e-3, True, "fused"),
    on("cuda", WIDE, 128, 2, 1, 3e-3, False, "optax"),
]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rows", "dim", "bits", "planes", "scale_lr", "wide_ids", "path", "device"), JAX_SHAPES)
def test_jax(rows: int, dim: int, bits: int, planes: int, scale_lr: float, wide_ids: bool, path: str, device: str, root: Path) -> None:
    for module in ("jax", "optax"):
        pytest.importorskip(module)
    case = {"rows": rows, "dim": dim, "bits": bits, "planes": planes, "scale_lr": scale_lr, "wide_ids": wide_ids, "path": path}
    if device == "cpu":
        from huge_jax import check

        check(**case)
        return
    need(gigabytes(rows, dim, rules.Counter(bits), planes, scale_lr))
    paths = [str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "JAX_PLATFORMS": "cuda"}
    result = subprocess.run(
        [sys.executable, root / "tests" / "huge_jax.py", json.dumps(case)],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
