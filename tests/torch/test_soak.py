"""Random updates and lookups of random tables against the reference, bit for bit, with flat memory, files and threads.

`make test` makes 300 steps, `make soak` 100,000 (DUALBIN_SOAK).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

import dualbin.torch as dbt
from dualbin import reference, rules

STEPS = int(os.environ.get("DUALBIN_SOAK", "300"))
LIFE = 20  #: steps of a table


def random_rule(rng: np.random.Generator, planes: int) -> rules.Rule:
    every = int(rng.integers(1, 4))
    if planes == 1 and rng.random() < 0.3:
        return rules.Bop(every=every) if rng.random() < 0.5 else rules.Sign(every=every)
    return rules.Counter(int(rng.integers(planes, 9)), every=every, norm=str(rng.choice(rules.NORMS)))


def life(rng: np.random.Generator) -> None:
    """Make a table, train it for some steps in PyTorch and in the reference, and compare everything."""
    planes, rows, dim = int(rng.integers(1, 9)), int(rng.integers(1, 50)), int(rng.integers(1, 200))
    rule, scale_lr, seed = random_rule(rng, planes), float(rng.choice([0.0, 3e-3])), int(rng.integers(2**63))
    w = rng.standard_normal((rows, dim)).astype(np.float32)
    table = torch.nn.Parameter(dbt.BinaryTable.from_float(torch.from_numpy(w), planes=planes))
    bits, scale = reference.pack(w, planes), reference.row_scale(w, planes)
    state: dict[str, Any] = reference.init_state(rule, rows, dim, planes=planes, scale_lr=scale_lr)
    optimizer = dbt.XOR([table], rule=rule, scale_lr=scale_lr, seed=seed)
    for _ in range(LIFE):
        ids = rng.integers(0, rows, int(rng.integers(1, 300)))
        dy = (rng.standard_normal((len(ids), dim)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
        dbt.lookup(table, torch.from_numpy(ids)).backward(torch.from_numpy(dy.copy()))
        optimizer.step()
        optimizer.zero_grad()
        reference.update(bits, scale, state, ids, dy, rule=rule, dim=dim, planes=planes, lr=1.0, scale_lr=scale_lr, seed=seed)
    assert table.bits.numpy().tobytes() == bits.tobytes()
    assert table.scale.numpy().tobytes() == scale.tobytes()
    exported = optimizer.export_state({"t": table})["t"]
    for name, value in state.items():
        assert np.asarray(exported[name]).tobytes() == np.asarray(value).astype(np.asarray(exported[name]).dtype).tobytes(), name


def resources() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208


@pytest.mark.timeout(7200)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")  # noqa: PTH110
def test_soak() -> None:
    lives = max(6, STEPS // LIFE)
    for number in range(3):
        life(np.random.default_rng(number))
    before = resources()
    for number in range(3, lives):
        try:
            life(np.random.default_rng(number))
        except AssertionError as error:
            msg = f"life {number}: {error}"
            raise AssertionError(msg) from error
    after = resources()
    assert after[0] < before[0] + 64 * 2**20, f"resident memory grew from {before[0]} to {after[0]} bytes"
    assert after[1:] == before[1:], "files and threads"
