"""Training on several ranks: the checks of tests/ranks in processes of their own, and what one process can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dualbin.torch as dbt
from ranks import launch


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_on_ranks(world: int, tmp_path: Path) -> None:
    launch.check(world, "cpu", tmp_path)


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
