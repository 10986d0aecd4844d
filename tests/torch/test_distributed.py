"""Training on several ranks: the checks of `ranks.py` in processes of their own, and what one process can tell."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dualbin.torch as dbt

SCRIPT = Path(__file__).with_name("ranks.py")


def names_of_checks() -> set[str]:
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_on_ranks(world: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(world), str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True, check=False)
    reports = {rank: json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)}
    failures = [f"rank {rank}, {name}: {said}" for rank, report in reports.items() for name, said in report.items() if said != "ok"]
    assert not failures, "\n".join([*failures, done.stderr[-2000:]])
    assert all(set(report) == names_of_checks() for report in reports.values())


def test_needs_an_initialised_group(table: Any) -> None:
    assert not dist.is_initialized()
    for call in (lambda: dbt.prepare_ddp(nn.Linear(1, 1)), lambda: dbt.sync_row_grads([table]), lambda: dbt.ShardedBinaryEmbedding(9, 8)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call()


@pytest.mark.usefixtures("alone")
def test_prepare_ddp_keeps_what_is_ignored_already() -> None:
    net = nn.Sequential(dbt.BinaryEmbedding(5, 8), nn.Linear(8, 1))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["1.bias"])
    assert dbt.prepare_ddp(net) == [net[0].weight]
    assert net._ddp_params_and_buffers_to_ignore == ["1.bias", "0.weight"]


@pytest.mark.usefixtures("alone")
def test_arguments(table: Any) -> None:
    with pytest.raises(TypeError, match=r"module must be an nn\.Module that DDP does not wrap yet, got a BinaryTable"):
        dbt.prepare_ddp(table)
    with pytest.raises(TypeError, match="got a DistributedDataParallel"):
        dbt.prepare_ddp(nn.parallel.DistributedDataParallel(nn.Linear(1, 1)))
    with pytest.raises(TypeError, match="tables must be BinaryTables, got a Tensor as entry 1"):
        dbt.sync_row_grads([table, torch.zeros(3)])
    table.grad = dbt.RowGrad(torch.tensor([99]), torch.zeros(1, 20), (40, 20))
    with pytest.raises(IndexError, match=r"tables\[0\]: ids of the gradient must be in \[0, 40\)"):
        dbt.sync_row_grads([table])
    assert table.grad.ids.tolist() == [99]


@pytest.mark.usefixtures("alone")
def test_one_rank_only_sums(table: Any, summed: Any) -> None:
    dbt.lookup(table, torch.tensor([3, 1, 3])).sum().backward()
    want = summed(table.grad)
    dbt.sync_row_grads([table])
    assert table.grad.ids.tolist() == [1, 3]
    assert torch.equal(summed(table.grad), want)
