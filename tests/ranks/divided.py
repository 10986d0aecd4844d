"""Replicas whose optimizer state is divided by the ranks: `XOR(shard_state=...)`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import dualbin.torch as dbt
from dualbin import rules
from ranks.support import assert_replicated, device

ROWS, DIM = 103, 20  # no multiple of the ranks, nor of 4 bytes


def tables(planes: int = 1, dim: int = DIM) -> nn.ModuleDict:
    """Two tables, the same on all ranks."""
    torch.manual_seed(7)
    one = dbt.BinaryEmbedding(ROWS, dim, padding_idx=3, planes=planes)
    module = nn.ModuleDict({"one": one, "two": dbt.BinaryEmbedding(60, 64)}).to(device())
    dbt.freeze_rows(module["one"], [5, 60])
    return module


def backward(module: nn.ModuleDict, step: int, rank: int) -> None:
    """Of both tables: nobody looks up at step 2, and rank 1 only in the second at step 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    for name, table in module.items():
        ids = torch.randint(0, table.num_embeddings, (30 + 7 * rank,), generator=generator)
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, 50, ids).to(device())
        factors = torch.randn(len(ids), table.embedding_dim, generator=generator).to(device())
        if step != 2 and (step, rank, name) != (1, 1, "one"):
            (table(ids) * factors).sum().backward()


def make(module: nn.ModuleDict, rule: Any, shard_state: Any) -> dbt.XOR:
    return dbt.XOR([table.weight for table in module.values()], rule=rule, seed=3, shard_state=shard_state)


def train(module: nn.ModuleDict, optimizer: dbt.XOR, steps: range, rank: int, *, synced: bool) -> None:
    for step in steps:
        backward(module, step, rank)
        if synced:
            dbt.sync_row_grads([table.weight for table in module.values()])
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_state(part: Any, whole: Any, rows: int, rank: int, world: int) -> None:
    share = -(-rows // world)
    here = slice(rank * share, min(rows, (rank + 1) * share))
    assert part["step"] == whole["step"]
    for name in ("counter", "record"):
        assert torch.equal(part[name], whole[name][here])
        assert part[name].shape[0] <= share


def divided_state_gives_the_bits_of_sync_row_grads(rank: int, world: int) -> None:
    for rule, planes, dim in ((rules.Counter(4), 1, DIM), (rules.Counter(8, every=3), 2, 64)):
        replicas, divided = tables(planes, dim), tables(planes, dim)
        optimizers = [make(replicas, rule, False), make(divided, rule, True if planes == 1 else dist.group.WORLD)]
        fresh = replicas["one"].weight.bits.clone()
        for number, (module, optimizer) in enumerate(zip((replicas, divided), optimizers, strict=True)):
            train(module, optimizer, range(7), rank, synced=number == 0)
        assert not torch.equal(fresh, replicas["one"].weight.bits)
        for name, table in divided.items():
            whole = replicas[name].weight
            assert torch.equal(table.weight.bits, whole.bits)
            assert torch.equal(table.weight.scale, whole.scale)
            assert_replicated(table.weight.bits, table.weight.scale)
            state = [optimizer.state[weight] for optimizer, weight in zip(optimizers, (whole, table.weight), strict=True)]
            assert state[0]["step"] == (6 if rule.every == 1 else 2)
            assert_equal_state(state[1], state[0], whole.shape[0], rank, world)
        exported = [optimizer.export_state() for optimizer in optimizers]
        for name, arrays in exported[0].items():
            assert arrays.keys() == exported[1][name].keys()
            for key, array in arrays.items():
                assert np.array_equal(array, exported[1][name][key]), key


def divided_state_goes_on_from_what_was_saved(rank: int, world: int) -> None:
    """From its own state_dict, from that of an optimizer with the whole state, and from an exported state."""
    rule = rules.Counter(8, every=2)
    replicas, divided = tables(), tables()
    whole, mine = make(replicas, rule, False), make(divided, rule, True)
    train(replicas, whole, range(4), rank, synced=True)  # step 2 has no rows: an open window
    train(divided, mine, range(4), rank, synced=False)
    saved = mine.state_dict()
    assert saved["param_groups"][0]["part"] == [rank, world]
    again = [make(tables(), rule, True) for _ in range(3)]
    again[0].load_state_dict(saved)
    again[1].load_state_dict(whole.state_dict())
    again[2].import_state(whole.export_state())
    train(replicas, whole, range(4, 7), rank, synced=True)
    for optimizer in again:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for weight, start in zip(weights, divided.values(), strict=True):
            weight.bits.copy_(start.weight.bits)
            weight.scale.copy_(start.weight.scale)
        for step in range(4, 7):
            probe = tables()
            for weight, table in zip(weights, probe.values(), strict=True):
                table.weight.bits.copy_(weight.bits)
                table.weight.scale.copy_(weight.scale)
            backward(probe, step, rank)
            for weight, table in zip(weights, probe.values(), strict=True):
                weight.grad = table.weight.grad
            optimizer.step()
        for weight, table in zip(weights, replicas.values(), strict=True):
            assert torch.equal(weight.bits, table.weight.bits)
            assert torch.equal(weight.scale, table.weight.scale)
    saved["param_groups"][0]["part"] = [(rank + 1) % world, world]
    for optimizer, said in ((mine, f"this is rank {rank} of {world}: use XORCheckpoint"), (whole, "this optimizer has no shard_state")):
        try:
            optimizer.load_state_dict(saved)
        except ValueError as error:
            assert said in str(error)  # noqa: PT017  (no pytest in the ranks)
        else:
            raise AssertionError


def divided_state_loads_with_another_number_of_ranks(rank: int, world: int) -> None:
    rule, folder = rules.Counter(4), Path(os.environ["RANKS_FOLDER"], "divided")
    module = tables(planes=2)
    optimizer = make(module, rule, True)
    train(module, optimizer, range(4), rank, synced=False)
    dcp.save({"model": module, "xor": dbt.XORCheckpoint(module, optimizer)}, checkpoint_id=folder)
    whole = optimizer.export_state()
    alone = [dist.new_group([r]) for r in range(world)][rank]
    for group in (alone, None):
        other = tables(planes=2)
        loaded = make(other, rule, alone if group is alone else False)
        dcp.load({"model": other, "xor": dbt.XORCheckpoint(other, loaded)}, checkpoint_id=folder)
        assert torch.equal(other["one"].weight.bits, module["one"].weight.bits)
        for name, arrays in loaded.export_state().items():
            assert all(np.array_equal(array, whole[name][key]) for key, array in arrays.items())


def a_bad_gradient_on_one_rank_raises_on_all(rank: int, world: int) -> None:
    module = tables()
    optimizer = make(module, rules.Counter(4), True)
    before = module["one"].weight.bits.clone()
    backward(module, 0, rank)
    if rank == world - 1:
        optimizer.param_groups[0]["lr"] = -1.0
    try:
        optimizer.step()
    except ValueError as error:
        assert ("lr must be" if rank == world - 1 else f"the step of rank {world - 1} has raised") in str(error)  # noqa: PT017
    else:
        raise AssertionError
    assert torch.equal(before, module["one"].weight.bits)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert not torch.equal(before, module["one"].weight.bits)
    assert_replicated(module["one"].weight.bits)
