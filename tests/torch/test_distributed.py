"""Training on several ranks: the checks of tests/ranks in processes of their own, and what one process can tell."""

from __future__ import annotations

import copy
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


@pytest.mark.usefixtures("alone")
def test_arguments_of_a_divided_state(table: Any) -> None:
    for given in (None, 1, "all"):
        with pytest.raises(TypeError, match="shard_state must be a process group, True for that of all ranks, or False, got"):
            dbt.XOR([table], shard_state=given)
    with pytest.raises(ValueError, match="capturable must be False with shard_state"):
        dbt.XOR([table], shard_state=True, capturable=True)
    with pytest.raises(ValueError, match="shard_state is for tables that every rank has whole, got a shard"):
        dbt.XOR([dbt.ShardedBinaryEmbedding(9, 8).weight], shard_state=True)
    optimizer = dbt.XOR([table], shard_state=True)
    with pytest.raises(TypeError, match="an XOR with shard_state belongs to its process group"):
        copy.deepcopy(optimizer)
    embedding = dbt.BinaryEmbedding(9, 8)
    with pytest.raises(NotImplementedError, match="optimizer of grow must have its whole state here, got one with shard_state"):
        dbt.grow(embedding, 10, optimizer=dbt.XOR(embedding.parameters(), shard_state=True))


@pytest.mark.usefixtures("alone")
def test_one_rank_with_a_divided_state_steps_as_without(table: Any) -> None:
    twin = torch.nn.Parameter(table.detach().clone())
    optimizers = [dbt.XOR([table], shard_state=True), dbt.XOR([twin])]
    for step in range(3):
        for each, optimizer in zip((table, twin), optimizers, strict=True):
            dbt.lookup(each, torch.arange(step, 9)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizers[0].stats() == optimizers[1].stats()
    assert torch.equal(table.bits, twin.bits)
    table.data = table.detach().clone()  # other memory, as after `module.to`
    scale = table.scale.clone()
    dbt.lookup(table, torch.arange(9)).sum().backward()
    optimizers[0].step()
    assert not torch.equal(table.scale, scale)
