"""Data-parallel training: every rank has the whole tables, and DDP or FSDP2 the rest of the model."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dualbin.torch as dbt
from dualbin import unpack
from ranks.support import assert_close_rows, assert_replicated, device

V, D = 200, 64


class Net(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = dbt.BinaryEmbedding(V, D, padding_idx=0, dtype=dtype)
        self.fc = nn.Linear(D, 3)
        self.to(device())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.emb(ids.flatten()).float()))


def batch(step: int, rank: int) -> torch.Tensor:
    """Ragged: ranks have different numbers of ids."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, V, (8 + 3 * rank, 5), generator=generator).to(device())


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y - torch.linspace(-1, 1, 3, device=y.device)).pow(2).sum()


def joined_gradient(net: Net, step: int, world: int) -> Any:
    """The row gradient of one process on all batches."""
    net.zero_grad()
    sum(loss_of(net(batch(step, rank))) / world for rank in range(world)).backward()
    return net.emb.weight.grad


def ddp_fifty_steps(rank: int, world: int) -> None:
    net = Net(seed=rank)
    tables = dbt.prepare_ddp(net)
    assert len(tables) == 1
    assert tables[0] is net.emb.weight
    assert_replicated(net.emb.weight.bits, net.emb.weight.scale)
    ddp = DistributedDataParallel(net)
    alone, probe = Net(seed=0), Net(seed=0)
    alone.load_state_dict(net.state_dict())
    optimizers = [(dbt.XOR([n.emb.weight], seed=3), torch.optim.SGD(n.fc.parameters(), lr=1e-3)) for n in (net, alone)]
    for step in range(50):
        probe.load_state_dict(net.state_dict())
        ddp.zero_grad()
        loss_of(ddp(batch(step, rank))).backward()
        dbt.sync_row_grads(tables)
        assert_close_rows(tables[0].grad, joined_gradient(probe, step, world))
        joined_gradient(alone, step, world)
        for pair in optimizers:
            for optimizer in pair:
                optimizer.step()
    assert_replicated(net.emb.weight.bits, net.emb.weight.scale, net.fc.weight)
    different = unpack(net.emb.weight.bits.cpu().numpy(), D) != unpack(alone.emb.weight.bits.cpu().numpy(), D)
    assert different.sum() < V * D / 1000, different.sum()
    assert net.emb.weight.bits.ne(Net(seed=0).emb.weight.bits).any()  # it did train


def an_infinity_on_one_rank_skips_on_all(rank: int, world: int) -> None:
    net = Net(seed=rank)
    tables = dbt.prepare_ddp(net)
    ddp = DistributedDataParallel(net)
    xor, sgd = dbt.XOR(tables), torch.optim.SGD(net.fc.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device().type, init_scale=64.0)
    for step in range(4):
        before = net.emb.weight.bits.clone()
        ddp.zero_grad()
        scaler.scale(loss_of(ddp(batch(step, rank)))).backward()
        if step == 2 and rank == world - 1:
            tables[0].grad.rows[0, 0] = float("inf")  # in a row gradient only, on one rank only
        dbt.sync_row_grads(tables)
        for optimizer in (xor, sgd):
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert_replicated(norm.nan_to_num())
        for optimizer in (xor, sgd):
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, net.emb.weight.bits) == (step == 2)
        assert_replicated(net.emb.weight.bits, net.emb.weight.scale, net.fc.weight, torch.tensor(scaler.get_scale()))
    assert scaler.get_scale() == 32.0


def a_rank_without_lookups_takes_part(rank: int, world: int) -> None:
    net = Net(seed=0)
    tables = dbt.prepare_ddp(net)
    if rank == 0:
        loss_of(net(batch(0, 0))).backward()
        local = tables[0].grad.coalesce()
    dbt.sync_row_grads(tables)
    if rank == 0:
        torch.testing.assert_close(tables[0].grad.rows, local.rows / world, rtol=0, atol=0)
    assert_replicated(tables[0].grad.ids, tables[0].grad.rows)
    dbt.XOR(tables).step()
    assert_replicated(tables[0].bits, tables[0].scale)
    tables[0].grad = None
    dbt.sync_row_grads(tables)
    assert tables[0].grad is None  # no rank has a gradient
    dbt.sync_row_grads([])


def no_sync_accumulates(rank: int, world: int) -> None:
    net, probe = Net(seed=rank), Net(seed=0)
    tables = dbt.prepare_ddp(net)
    ddp = DistributedDataParallel(net)
    probe.load_state_dict(net.state_dict())
    for step in range(3):
        with ddp.no_sync() if step < 2 else contextlib.nullcontext():
            loss_of(ddp(batch(step, rank))).backward()
    dbt.sync_row_grads(tables)
    sum(loss_of(probe(batch(step, r))) / world for step in range(3) for r in range(world)).backward()
    assert_close_rows(tables[0].grad, probe.emb.weight.grad)
    torch.testing.assert_close(net.fc.weight.grad, probe.fc.weight.grad)


def half_precision_tied_and_frozen_tables(rank: int, world: int) -> None:
    del world

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(rank)
            self.a = dbt.BinaryEmbedding(V, D, dtype=torch.bfloat16, planes=2)
            self.b = dbt.BinaryEmbedding(V, D, dtype=torch.bfloat16, planes=2)
            self.b.weight = self.a.weight
            self.frozen = dbt.BinaryEmbedding(30, 8).requires_grad_(False)
            self.fc = nn.Linear(D, 1)
            self.to(device())

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc((self.a(ids) + self.b(ids)).float()) + self.frozen(ids % 30).sum(-1, keepdim=True)

    net = Tied()
    tables = dbt.prepare_ddp(net)
    assert [t is p for t, p in zip(tables, (net.a.weight, net.frozen.weight), strict=True)] == [True, True]
    assert_replicated(*(array for t in tables for array in (t.bits, t.scale)))
    ddp = DistributedDataParallel(net)
    ddp(batch(0, rank)).sum().backward()
    dbt.sync_row_grads(tables)
    assert tables[0].grad.dtype == torch.float32  # sums of bfloat16 rows
    assert tables[1].grad is None
    assert_replicated(tables[0].grad.rows)
    before = tables[0].bits.clone()
    dbt.XOR(tables).step()
    assert not torch.equal(tables[0].bits, before)
    assert_replicated(tables[0].bits, tables[0].scale)


def fsdp_leaves_tables_to_us(rank: int, world: int) -> None:
    net, probe = Net(seed=rank), Net(seed=0)
    tables = dbt.prepare_ddp(net)
    with torch.no_grad():
        for p in net.fc.parameters():
            dist.broadcast(p, 0)
    probe.load_state_dict(net.state_dict())
    fully_shard(net, mesh=init_device_mesh(device().type, (world,)), ignored_params=set(tables))
    xor = dbt.XOR(tables)
    for step in range(3):
        net.zero_grad()
        loss_of(net(batch(step, rank))).backward()
        dbt.sync_row_grads(tables)
        if step == 0:
            assert_close_rows(tables[0].grad, joined_gradient(probe, step, world))
        xor.step()
    assert_replicated(net.emb.weight.bits, net.emb.weight.scale)
    assert isinstance(net.fc.weight, DTensor)
    assert not isinstance(net.emb.weight, DTensor)


def prepare_ddp_refuses_different_tables(rank: int, world: int) -> None:
    del world
    for net in (dbt.BinaryEmbedding(10 + rank, 8, device=device()), dbt.BinaryEmbedding(10, 8, device=device(), planes=1 + rank)):
        before = net.weight.bits.clone()
        try:
            dbt.prepare_ddp(net)
        except ValueError as error:
            assert "(10, 8, 1, 'torch.float32')" in str(error)  # noqa: PT017  (no pytest in the ranks)
        else:
            raise AssertionError
        assert torch.equal(net.weight.bits, before)
