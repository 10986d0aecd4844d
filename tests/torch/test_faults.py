"""What goes wrong from outside: a kill, no memory, bad input. Tables and states are as before, or come back from the last checkpoint."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dualbin.torch as dbt
from dualbin import rules
from dualbin.torch import _native_call

KILLS = int(os.environ.get("DUALBIN_KILLS", "4"))  # at random moments, beside those at chosen ones
PARTS = int(os.environ.get("DUALBIN_PARTS", "1"))  # into how many tests they are divided


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * KILLS)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path: Path, part: int) -> None:
    script = str(Path(__file__).with_name("kills.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(tmp_path), str(-(-KILLS // PARTS)), str(part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    want = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert want["step"] == 60
    assert want["model"]["items.weight.bits"].any()
    folders = {folder.name for folder in tmp_path.iterdir()}
    assert folders > {"while_training", "while_saving", "while_updating"}, folders
    for folder in folders:
        assert_equal(torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True), want)


# ---- failed calls ------------------------------------------------------------------------------------------------------------------------


class Scene:
    """Two tables with a state and gradients, and everything that a failed call must leave alone."""

    def __init__(self, rule: rules.Rule) -> None:
        self.tables = [torch.nn.Parameter(dbt.BinaryTable.from_float(torch.randn(rows, 9))) for rows in (30, 50)]
        self.optimizer = dbt.XOR(self.tables, rule=rule)
        for _ in range(3):
            self.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.backward()

    def backward(self) -> None:
        for table in self.tables:
            dbt.lookup(table, torch.randint(0, 30, (20,))).cos().sum().backward()

    def everything(self) -> Any:
        tables = {i: {"bits": t.bits, "scale": t.scale, "ids": t.grad.ids, "rows": t.grad.rows} for i, t in enumerate(self.tables)}
        return copy.deepcopy({"tables": tables, "state": self.optimizer.state_dict()["state"]})


@pytest.fixture(params=[rules.Counter(8), rules.Counter(3, every=2), rules.Bop()], ids=str)
def scene(request: Any) -> Scene:
    return Scene(request.param)


def no_memory(monkeypatch: pytest.MonkeyPatch, op: str, call: int) -> None:
    """The allocation of the workspace fails at that call of an operation."""
    real, calls = _native_call._workspace, []

    def workspace(name: str, *rest: Any) -> Any:
        calls.append(name)
        if name == op and calls.count(op) == call:
            msg = "no memory for the workspace"
            raise torch.OutOfMemoryError(msg)
        return real(name, *rest)

    monkeypatch.setattr(_native_call, "_workspace", workspace)


@pytest.mark.parametrize("call", [1, 2])
def test_no_memory_for_an_update(scene: Scene, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Also where the second table's allocation fails, the first table has not changed; and with memory the same step succeeds."""
    every = scene.optimizer.param_groups[0]["rule"].every
    before = scene.everything()
    no_memory(monkeypatch, "update" if every == 1 else "reduce_rows", call)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the workspace"):
        scene.optimizer.step()
    assert_equal(scene.everything(), before)
    scene.optimizer.step()
    assert [scene.optimizer.state[t]["step"] for t in scene.tables] == [before["state"][i]["step"] + 1 for i in (0, 1)]


@pytest.mark.usefixtures("alone")
def test_no_memory_for_a_norm_or_an_exchange(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scene.everything()
    calls = (
        lambda: torch.nn.utils.clip_grad_norm_(scene.tables, 1e-3),
        lambda: torch.nn.utils.clip_grad_value_(scene.tables, 1e-3),
        lambda: dbt.sync_row_grads(scene.tables),
    )
    for call in calls:
        no_memory(monkeypatch, "reduce_rows", 1)
        with pytest.raises(torch.OutOfMemoryError):
            call()
        monkeypatch.undo()
        assert_equal(scene.everything(), before)


def test_bad_ids_and_devices(scene: Scene) -> None:
    before = scene.everything()
    table = scene.tables[0]
    for ids, error in ((torch.tensor([1, 30]), IndexError), (torch.tensor([-1]), IndexError), (torch.ones(1), TypeError)):
        with pytest.raises(error, match="id"):
            dbt.lookup(table, ids).sum().backward()
    with pytest.raises(ValueError, match="ids must be on the device of the table, cpu, got meta"):
        dbt.lookup(table, torch.ones(1, dtype=torch.int64, device="meta"))
    assert_equal(scene.everything(), before)

    grad = scene.tables[1].grad
    scene.tables[1].grad = None
    scene.tables[1].grad = dbt.RowGrad(torch.tensor([50]), torch.ones(1, 9), (50, 9))
    with pytest.raises(IndexError, match=r"parameter 1 of group 0: ids of the gradient must be in \[0, 50\)"):
        scene.optimizer.step()
    scene.tables[1].grad = grad
    assert_equal(scene.everything(), before)


def test_a_state_on_another_device_is_refused(scene: Scene) -> None:
    before = scene.everything()
    state = scene.optimizer.state[scene.tables[1]]
    name = next(name for name in state if isinstance(state[name], torch.Tensor))
    kept, state[name] = state[name], state[name].to("meta")
    with pytest.raises(ValueError, match=f"state {name!r} is on meta, but the table is on cpu"):
        scene.optimizer.step()
    state[name] = kept
    assert_equal(scene.everything(), before)
