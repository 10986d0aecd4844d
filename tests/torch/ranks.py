"""What several processes do together: `python ranks.py WORLD FOLDER [CHECK...]` runs the checks below on WORLD gloo ranks.

A script of its own, since the ranks are forked before any thread exists; the tests read the reports that it leaves in FOLDER.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # (optimizers import it; once for all ranks)
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dualbin.torch as dbt
from dualbin import rules, unpack

V, D = 200, 64
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "torch"


class Net(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = dbt.BinaryEmbedding(V, D, padding_idx=0, dtype=dtype)
        self.fc = nn.Linear(D, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.emb(ids.flatten()).float()))


def batch(step: int, rank: int) -> torch.Tensor:
    """Ragged: ranks have different numbers of ids."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, V, (8 + 3 * rank, 5), generator=generator)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y - torch.linspace(-1, 1, 3)).pow(2).sum()


def assert_replicated(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, tensor.detach().contiguous())
        assert all(torch.equal(everyone[0], other) for other in everyone)


def assert_close_rows(got: Any, want: Any, relative: float = 1e-6) -> None:
    got, want = got.coalesce(), want.coalesce()
    assert torch.equal(got.ids, want.ids)
    error, size = (got.rows - want.rows).norm(dim=1), want.rows.norm(dim=1)
    assert (error <= relative * size.max()).all(), (error / size).max()


def joined_gradient(net: Net, step: int, world: int) -> Any:
    """The row gradient of one process on all batches."""
    net.zero_grad()
    sum(loss_of(net(batch(step, rank))) / world for rank in range(world)).backward()
    return net.emb.weight.grad


# ---- data parallel -----------------------------------------------------------------------------------------------------------------------


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
    different = unpack(net.emb.weight.bits.numpy(), D) != unpack(alone.emb.weight.bits.numpy(), D)
    assert different.sum() < V * D / 1000, different.sum()
    assert net.emb.weight.bits.ne(Net(seed=0).emb.weight.bits).any()  # it did train


def an_infinity_on_one_rank_skips_on_all(rank: int, world: int) -> None:
    net = Net(seed=rank)
    tables = dbt.prepare_ddp(net)
    ddp = DistributedDataParallel(net)
    xor, sgd = dbt.XOR(tables), torch.optim.SGD(net.fc.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
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
            self.a = dbt.BinaryEmbedding(V, D, dtype=torch.bfloat16)
            self.b = dbt.BinaryEmbedding(V, D, dtype=torch.bfloat16)
            self.b.weight = self.a.weight
            self.frozen = dbt.BinaryEmbedding(30, 8).requires_grad_(False)
            self.fc = nn.Linear(D, 1)

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


def fsdp_leaves_tables_to_us(rank: int, world: int) -> None:
    net, probe = Net(seed=rank), Net(seed=0)
    tables = dbt.prepare_ddp(net)
    with torch.no_grad():
        for p in net.fc.parameters():
            dist.broadcast(p, 0)
    probe.load_state_dict(net.state_dict())
    fully_shard(net, ignored_params=set(tables))
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
    net = dbt.BinaryEmbedding(10 + rank, 8)
    before = net.weight.bits.clone()
    try:
        dbt.prepare_ddp(net)
    except ValueError as error:
        assert "(10, 8, 'torch.float32')" in str(error)  # noqa: PT017  (no pytest in the ranks)
    else:
        raise AssertionError
    assert torch.equal(net.weight.bits, before)


# ---- shards ------------------------------------------------------------------------------------------------------------------------------

ROWS, DIM, PADDING = 101, 20, 37  # no multiple of the ranks


def gathered(array: torch.Tensor) -> torch.Tensor:
    """The shards of all ranks as one array."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, array.detach())
    return torch.cat(parts)


def shard_batch(step: int, rank: int) -> torch.Tensor:
    """Ragged; rank 1 has nothing at step 1, and nobody has at step 3."""
    if step == 3 or (step == 1 and rank == 1):
        return torch.empty(0, 2, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(0, ROWS, (30 + 11 * rank, 2), generator=generator, dtype=torch.int32)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.3, 5, ids)  # a hot row: the order of its sum matters


def weights(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77 * step + rank)
    return torch.randn(*shard_batch(step, rank).shape, DIM, generator=generator)


def shards_become_the_unsharded_table(rank: int, world: int) -> None:
    for rule in (rules.Counter(3), rules.Bop(every=2)):
        shard = dbt.ShardedBinaryEmbedding(ROWS, DIM, padding_idx=PADDING, generator=torch.Generator().manual_seed(rank))
        share = -(-ROWS // world)
        assert shard.weight.first_row == rank * share
        assert shard.weight.bits.shape[0] == min(share, ROWS - rank * share)  # nobody holds more
        whole = dbt.BinaryEmbedding(ROWS, DIM, padding_idx=PADDING)
        whole.load_state_dict({"weight.bits": gathered(shard.weight.bits), "weight.scale": gathered(shard.weight.scale)})
        assert whole.weight.scale.eq(0).sum() == 1
        optimizers = [dbt.XOR([module.weight], rule=rule, seed=9) for module in (shard, whole)]
        for step in range(8):
            for optimizer in optimizers:
                optimizer.zero_grad()
            ids = shard_batch(step, rank)
            y = shard(ids)
            assert torch.equal(y, whole(ids))
            (y * weights(step, rank)).sum().backward()
            joined = torch.cat([shard_batch(step, r) for r in range(world)])
            dy = torch.cat([weights(step, r) for r in range(world)]) / world
            if len(joined):
                (whole(joined) * dy).sum().backward()
            assert (shard.weight.grad is None) == (step == 3)
            for optimizer in optimizers:
                optimizer.step()
        here = slice(shard.weight.first_row, shard.weight.first_row + shard.weight.shape[0])
        assert torch.equal(shard.weight.bits, whole.weight.bits[here])
        assert torch.equal(shard.weight.scale, whole.weight.scale[here])
        mine, all_rows = (optimizer.state[module.weight] for optimizer, module in zip(optimizers, (shard, whole), strict=True))
        assert mine["step"] == all_rows["step"] == (7 if rule.every == 1 else 3)
        for name in ("counter", "ema", "count", "scale_m", "scale_v"):
            if name in mine:
                assert torch.equal(mine[name], all_rows[name][here])


def a_bad_id_on_one_rank_raises_on_all(rank: int, world: int) -> None:
    shard = dbt.ShardedBinaryEmbedding(ROWS, DIM)
    before = shard.weight.bits.clone()
    try:
        shard(torch.tensor([1, ROWS if rank == world - 1 else 2]))
    except IndexError as error:
        assert "[0, 101)" in str(error)  # noqa: PT017
        assert ("got 101 at position 1" in str(error)) == (rank == world - 1)  # noqa: PT017
    else:
        raise AssertionError
    assert torch.equal(shard.weight.bits, before)
    assert shard(torch.tensor([ROWS - 1])).shape == (1, DIM)  # and the ranks are still in step


def bits_of_a_new_table_depend_on_the_seed_only(rank: int, world: int) -> None:
    alone = [dist.new_group([r]) for r in range(world)][rank]
    whole = dbt.ShardedBinaryEmbedding(9000, DIM, process_group=alone, generator=torch.Generator().manual_seed(5))
    shard = dbt.ShardedBinaryEmbedding(9000, DIM, generator=torch.Generator().manual_seed(5))
    first = shard.weight.first_row
    assert torch.equal(shard.weight.bits, whole.weight.bits[first : first + shard.weight.shape[0]])
    assert len(whole.weight.bits.unique(dim=0)) > 8900
    assert_replicated(whole.weight.bits)


def mixed_precision_agrees_on_infinities(rank: int, world: int) -> None:
    shard = dbt.ShardedBinaryEmbedding(ROWS, DIM)
    optimizer = dbt.XOR([shard.weight])
    scaler = ShardedGradScaler("cpu", init_scale=64.0)
    for step in range(3):
        before = shard.weight.bits.clone()
        optimizer.zero_grad()
        y = shard(torch.arange(ROWS))
        factor = torch.ones(ROWS, 1)
        factor[0] = float("inf") if step == 1 and rank == world - 1 else 1.0  # row 0 belongs to rank 0
        scaler.scale((y * factor).pow(2).mean() if step != 1 else (y * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, shard.weight.bits) or step != 1
        assert optimizer.state[shard.weight]["step"] == (1, 1, 2)[step]
    assert scaler.get_scale() == 32.0


class Mixed(nn.Module):
    """A shard, a whole table and a dense layer."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        self.big = dbt.ShardedBinaryEmbedding(ROWS, DIM, process_group=group)
        self.small = dbt.BinaryEmbedding(40, DIM)
        self.fc = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.big(ids) + self.small(ids % 40)).pow(2).sum()


def checkpoints_load_with_another_number_of_ranks(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = Mixed()
    tables = dbt.prepare_ddp(model)
    assert len(tables) == 2
    optimizer = dbt.XOR(tables, rule=rules.Counter(4))
    for step in range(3):
        optimizer.zero_grad()
        model(shard_batch(step, rank).long()).backward()
        dbt.sync_row_grads(tables)
        optimizer.step()
    folder = Path(os.environ["RANKS_FOLDER"]) / "checkpoint"
    dcp.save({"model": model, "xor": dbt.XORCheckpoint(model, optimizer)}, checkpoint_id=folder)
    state = optimizer.state[model.big.weight]
    want = [gathered(array) for array in (model.big.weight.bits, model.big.weight.scale, state["counter"], state["scale_m"])]

    fewer = max(1, world // 2)
    groups = [dist.new_group(range(start, start + fewer)) for start in range(0, world, fewer)]
    group = groups[rank // fewer]
    torch.manual_seed(99)
    other = Mixed(group)
    assert torch.equal(other.small.weight.bits, model.small.weight.bits) is False
    loaded = dbt.XOR([other.big.weight, other.small.weight], rule=rules.Counter(4))
    dcp.load({"model": other, "xor": dbt.XORCheckpoint(other, loaded)}, checkpoint_id=folder, process_group=group)
    table, state = other.big.weight, loaded.state[other.big.weight]
    here = slice(table.first_row, table.first_row + table.shape[0])
    assert table.shape[0] > model.big.weight.shape[0]
    for got, all_rows in zip((table.bits, table.scale, state["counter"], state["scale_m"]), want, strict=True):
        assert torch.equal(got, all_rows[here])
    assert state["step"] == 3
    assert torch.equal(other.small.weight.bits, model.small.weight.bits)
    assert torch.equal(loaded.state[other.small.weight]["counter"], optimizer.state[model.small.weight]["counter"])
    assert torch.equal(other.fc.weight, model.fc.weight)

    full = {"weight.bits": want[0], "weight.scale": want[1]}  # of an unsharded table
    other.big.weight.bits.zero_()
    other.big.load_state_dict(full)
    assert torch.equal(table.bits, want[0][here])


# ---- running -----------------------------------------------------------------------------------------------------------------------------

CHECKS: tuple[Callable[[int, int], None], ...] = (
    ddp_fifty_steps,
    an_infinity_on_one_rank_skips_on_all,
    a_rank_without_lookups_takes_part,
    no_sync_accumulates,
    half_precision_tied_and_frozen_tables,
    fsdp_leaves_tables_to_us,
    prepare_ddp_refuses_different_tables,
    shards_become_the_unsharded_table,
    a_bad_id_on_one_rank_raises_on_all,
    bits_of_a_new_table_depend_on_the_seed_only,
    mixed_precision_agrees_on_infinities,
    checkpoints_load_with_another_number_of_ranks,
)
SCRIPTS = ("ddp.py", "sharded.py")  # of examples/torch
NAMES = {check.__name__ for check in CHECKS} | set(SCRIPTS)


def all_checks(rank: int, world: int, note: Callable[[str, str], None], only: list[str]) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for check in CHECKS:
        if not only or check.__name__ in only:
            note(check.__name__, "not finished")
            check(rank, world)  # if it fails, the ranks are no longer in step: no further check then
            note(check.__name__, "ok")


def script(name: str, note: Callable[[str, str], None]) -> None:
    note(name, "not finished")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    note(name, "ok")


def fork_ranks(world: int, body: Callable[[int, Callable[[str, str], None]], None]) -> None:
    """Run `body(rank, note)` on new ranks, which find each other through the environment. The parent must have no threads here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    done, go = os.pipe(), os.pipe()
    children = [child for rank in range(world) if (child := _fork(rank, body, done[1], go))]
    os.close(done[1])
    for _ in children:
        os.read(done[0], 1)
    os.close(go[1])
    for child in children:
        os.waitpid(child, 0)


def _fork(rank: int, body: Callable[[int, Callable[[str, str], None]], None], done: int, go: tuple[int, int]) -> int:
    """The child ends when `go` is closed: a rank that went away while others still connect or close would leave them hanging."""
    child = os.fork()
    if child:
        return child
    os.close(go[1])
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    file = Path(os.environ["RANKS_FOLDER"], f"{rank}.json")
    report = json.loads(file.read_text()) if file.exists() else {}

    def note(name: str, outcome: str) -> None:
        report[name] = outcome
        file.write_text(json.dumps(report))

    try:
        body(rank, note)
    except BaseException:
        note("failure", traceback.format_exc())
    os.write(done, b".")
    os.read(go[0], 1)
    os._exit(0)


def main() -> None:
    world, only = int(sys.argv[1]), sys.argv[3:]
    os.environ["RANKS_FOLDER"] = sys.argv[2]
    torch.set_num_threads(1)
    fork_ranks(world, lambda rank, note: all_checks(rank, world, note, only))
    for name in SCRIPTS:
        if not only or name in only:
            fork_ranks(world, lambda _rank, note, name=name: script(name, note))  # type: ignore[misc]


if __name__ == "__main__":
    main()
