"""Tables whose rows are spread over the ranks, and checkpoints that another number of ranks loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import dualbin.torch as dbt
from dualbin import rules
from ranks.support import assert_replicated, device, gathered, peak_memory, used_memory

ROWS, DIM, PADDING = 101, 20, 37  # no multiple of the ranks


def shard_batch(step: int, rank: int) -> torch.Tensor:
    """Ragged; rank 1 has nothing at step 1, and nobody has at step 3."""
    if step == 3 or (step == 1 and rank == 1):
        return torch.empty(0, 2, dtype=torch.int32, device=device())
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(0, ROWS, (30 + 11 * rank, 2), generator=generator, dtype=torch.int32)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.3, 5, ids).to(device())  # a hot row: the order of its sum matters


def weights(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77 * step + rank)
    return torch.randn(*shard_batch(step, rank).shape, DIM, generator=generator).to(device())


def averaged(step: int, world: int, rows: int, dtype: torch.dtype) -> Any:
    """The gradient of the whole table, in the order that the docs promise: each rank's sums by row, one rank after the other."""
    parts = []
    for rank in range(world):
        ids, dy = shard_batch(step, rank).reshape(-1).long(), weights(step, rank).reshape(-1, DIM)
        sums = dbt.RowGrad(ids, dy, (rows, DIM)).coalesce()
        parts.append((sums.ids, (sums.rows / world).to(dtype)))
    ids, dy = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
    return dbt.RowGrad(ids, dy, (rows, DIM))


def assert_equal_sums(shard: Any, whole: Any) -> None:
    """The gradient of a shard is that of the whole table, but for rows without an influence."""
    mine, all_rows = shard.weight.grad.coalesce(), whole.coalesce()
    local, rows = all_rows.ids - shard.weight.first_row, shard.weight.shape[0]
    here, used = (
        (local >= 0) & (local < rows) & (all_rows.ids != PADDING),
        (mine.ids < rows) & (mine.ids != PADDING - shard.weight.first_row),
    )
    assert torch.equal(mine.ids[used], local[here])
    assert torch.equal(mine.rows[used], all_rows.rows[here])


def shards_become_the_unsharded_table(rank: int, world: int) -> None:
    share = -(-ROWS // world)
    for rule, planes, dtype, capacity in (
        (rules.Counter(3), 1, torch.float32, None),
        (rules.Bop(every=2), 1, torch.bfloat16, None),
        (rules.Counter(8, norm="adagrad"), 4, torch.float32, share),
    ):
        options: dict[str, Any] = {"padding_idx": PADDING, "device": device(), "planes": planes}
        generator = torch.Generator().manual_seed(rank)
        shard = dbt.ShardedBinaryEmbedding(ROWS, DIM, generator=generator, grad_dtype=dtype, capacity=capacity, **options)
        assert shard.weight.first_row == rank * share
        assert shard.weight.bits.shape[0] == min(share, ROWS - rank * share)  # nobody holds more
        whole = dbt.BinaryEmbedding(ROWS, DIM, **options)
        whole.load_state_dict({"weight.bits": gathered(shard.weight.bits), "weight.scale": gathered(shard.weight.scale)})
        assert whole.weight.scale.eq(0).sum() == 1
        if capacity is not None:
            whole.weight.first_row = 0  # then every gradient is a step
        optimizers = [dbt.XOR([module.weight], rule=rule, seed=9) for module in (shard, whole)]
        early = shard.prefetch(shard_batch(0, rank))
        for step in range(8):
            for optimizer in optimizers:
                optimizer.zero_grad()
            ids = shard_batch(step, rank)
            y = shard(early if step % 2 == 0 else ids)
            early = shard.prefetch(shard_batch(step + 1, rank)) if step % 2 else early
            assert torch.equal(y, whole(ids))
            (y * weights(step, rank)).sum().backward()
            assert (shard.weight.grad is None) == (step == 3 and capacity is None)
            if shard.weight.grad is not None:
                assert shard.weight.grad.dtype == dtype
                whole.weight.grad = averaged(step, world, ROWS, dtype)
                assert_equal_sums(shard, whole.weight.grad)  # the bits of a table hardly tell one order from another
            for optimizer in optimizers:
                optimizer.step()
        here = slice(shard.weight.first_row, shard.weight.first_row + shard.weight.shape[0])
        assert torch.equal(shard.weight.bits, whole.weight.bits[here])
        assert torch.equal(shard.weight.scale, whole.weight.scale[here])
        mine, all_rows = (optimizer.state[module.weight] for optimizer, module in zip(optimizers, (shard, whole), strict=True))
        assert mine["step"] == all_rows["step"] == (8 if capacity else 7 if rule.every == 1 else 3)
        for name in ("counter", "ema", "record"):
            if name in mine:
                assert torch.equal(mine[name], all_rows[name][here])
    dbt.check_errors()


def what_has_no_slot_is_nan_and_counted(rank: int, world: int) -> None:
    """Rank 0 wants four rows of every rank where there are two slots; every rank has a bad id later."""
    shard = dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device(), capacity=2)
    share = -(-ROWS // world)
    ids = torch.tensor([r * share + place for place in (7, 0, 3, 5, 0) for r in range(world)], device=device())
    ids = ids if rank == 0 else ids[:world]
    whole = gathered(shard.weight.dequantize())
    y = shard(ids)
    found = (ids % share <= 3) | (rank != 0)
    assert torch.equal(y[found], whole[ids[found]])
    assert y[~found].isnan().all()
    torch.where(found.unsqueeze(1), y, 0.0).sum().backward()
    sums = shard.weight.grad.coalesce()
    used = sums.ids < shard.weight.shape[0]
    want = {0: 2.0 / world, 3: 1.0 / world} | ({7: (world - 1) / world} if world > 1 else {})
    assert dict(zip(sums.ids[used].tolist(), sums.rows[used][:, 0].tolist(), strict=True)) == want
    try:
        dbt.check_errors()
    except RuntimeError as error:
        assert f"{2 * world} rows are NaN" in str(error)  # noqa: PT017  (no pytest in the ranks)
        assert "wanted 4 distinct rows of rank 0, more than the capacity of 2 slots" in str(error)  # noqa: PT017
        assert rank == 0
    else:
        assert rank != 0
    bad = torch.tensor([1, -3, ROWS, 2**63 - 1, ROWS + 1, share - 1], device=device())
    y = shard(bad)
    assert torch.equal(y[[0, 5]], whole[[1, share - 1]])
    assert y[1:5].isnan().all()
    try:
        dbt.check_errors()
    except IndexError as error:
        assert "4 rows are NaN" in str(error)  # noqa: PT017
        assert "ids must be in [0, 101), the rows of the table, got -3" in str(error)  # noqa: PT017
    else:
        raise AssertionError
    assert shard(torch.tensor([ROWS - 1], device=device())).isfinite().all()
    dbt.check_errors()


def a_rank_needs_memory_for_its_share(rank: int, world: int) -> None:
    """Construction, training and a state_dict of a table: no rank ever holds more than its share and its batch."""

    def life_of_a_table(rows: int) -> int:
        generator = torch.Generator().manual_seed(rank)
        shard = dbt.ShardedBinaryEmbedding(rows, 128, device=device())
        made = peak_memory()
        optimizer = dbt.XOR(shard.parameters(), rule=rules.Counter(2))
        for _ in range(3):
            shard(torch.randint(0, rows, (1024,), generator=generator).to(device())).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        shard.load_state_dict(shard.state_dict())
        dbt.XORCheckpoint(shard, optimizer).state_dict()
        return made

    life_of_a_table(4096 * world)  # whatever torch loads at first use
    before, rows = used_memory(), 4_000_000 * world
    made, trained = ((peak - before) / 2**20 for peak in (life_of_a_table(rows), peak_memory()))
    table = rows / world * (128 / 8 + 4) / 2**20  # bits and scale
    state = rows / world * (128 / 8 + 16) / 2**20  # a counter plane, and the record
    assert 0.9 * table < made < table + 16, (made, table)
    assert 0.9 * (table + state) < trained < table + state + 32, (trained, table + state)


def a_bad_id_on_one_rank_raises_on_all(rank: int, world: int) -> None:
    shard = dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device())
    before = shard.weight.bits.clone()
    try:
        shard(torch.tensor([1, ROWS if rank == world - 1 else 2], device=device()))
    except IndexError as error:
        assert "[0, 101)" in str(error)  # noqa: PT017
        assert ("got 101 at position 1" in str(error)) == (rank == world - 1)  # noqa: PT017
    else:
        raise AssertionError
    assert torch.equal(shard.weight.bits, before)
    assert shard(torch.tensor([ROWS - 1], device=device())).shape == (1, DIM)  # and the ranks are still in step


def a_collection_is_one_exchange(rank: int, world: int) -> None:
    """Lookups are those of the tables by themselves, gradients those of one table of all rows; as many collectives as for one table."""
    sizes = {"user": 60, "item": 41, "day": 7}
    for capacity in (None, 27):
        generator = torch.Generator().manual_seed(rank)
        tables = dbt.ShardedBinaryEmbeddingCollection(sizes, DIM, device=device(), capacity=capacity)
        whole = gathered(tables.weight.dequantize())
        names = list(sizes)[: 2 + rank % 2]  # not every rank has all
        ids = {name: torch.randint(0, sizes[name], (5 + rank, 2), generator=generator).to(device(), torch.int32) for name in names}
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as seen:
            y = tables(tables.prefetch(ids))
            sum((rows * (number + 1)).sum() for number, rows in enumerate(y.values())).backward()
        assert seen.call_count == 3  # ids, rows, gradients
        assert list(y) == names
        for name, rows in y.items():
            assert torch.equal(rows, whole[tables.first_rows[name] + ids[name].long()])
        grad = tables.weight.grad.coalesce()
        sums = torch.zeros(len(whole), device=device())
        for name, each in ids.items():
            rows = tables.first_rows[name] + each.reshape(-1).long()
            sums.index_add_(0, rows, torch.full(rows.shape, float(names.index(name) + 1), device=device()))
        dist.all_reduce(sums)
        here = sums[tables.weight.first_row :][: tables.weight.shape[0]] / world
        used = grad.ids < tables.weight.shape[0]
        torch.testing.assert_close(grad.rows[used][:, 0], here[grad.ids[used]])
        assert here.count_nonzero() == used.sum()
        dbt.check_errors()
        bad = {**ids, "user": torch.tensor([3, 60 if rank == 0 else 5], device=device())}  # the next table's first row
        if capacity is not None:
            assert tables(bad)["user"][1].isnan().all() == (rank == 0)
        try:
            dbt.check_errors() if capacity is not None else tables(bad)
        except IndexError as error:
            said = "got 108" if capacity else "input['user'] must be in [0, 60), the rows of the table, got 60 at position 1"
            assert (said in str(error)) == (rank == 0)  # noqa: PT017  (no pytest in the ranks)
        else:
            assert capacity is not None
            assert rank != 0


def ranks_that_disagree_raise_on_all(rank: int, world: int) -> None:
    try:
        dbt.ShardedBinaryEmbeddingCollection({"a": 60 + rank, "b": 60 - rank}, DIM, device=device())
    except ValueError as error:
        assert "tables must be the same on every rank, got" in str(error)  # noqa: PT017
    else:
        raise AssertionError
    for options in ({"capacity": 2 + rank}, {"grad_dtype": (torch.float32, torch.bfloat16)[rank == world - 1]}):
        try:
            dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device(), **options)
        except ValueError as error:
            (name,) = options
            assert f"{name} must be the same on every rank, got" in str(error)  # noqa: PT017
        else:
            raise AssertionError


def bits_of_a_new_table_depend_on_the_seed_only(rank: int, world: int) -> None:
    alone = [dist.new_group([r]) for r in range(world)][rank]
    for spread, planes in ((0.5, 1), (0.1, 1), (0.1, 3)):
        seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
        options: dict[str, Any] = {"device": device(), "spread": spread, "planes": planes}
        whole = dbt.ShardedBinaryEmbedding(9000, DIM, alone, generator=seeds[0], **options)
        shard = dbt.ShardedBinaryEmbedding(9000, DIM, generator=seeds[1], **options)
        first = shard.weight.first_row
        assert torch.equal(shard.weight.bits, whole.weight.bits[first : first + shard.weight.shape[0]])
        assert_replicated(whole.weight.bits)
        distinct = len(whole.weight.bits[:, :3].unique(dim=0))  # the plane of signs
        assert distinct > 8900 if spread == 0.5 else 1000 < distinct < 5000


def mixed_precision_agrees_on_infinities(rank: int, world: int) -> None:
    shard = dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device())
    optimizer = dbt.XOR([shard.weight])
    scaler = ShardedGradScaler(device().type, init_scale=64.0)
    for step in range(3):
        before = shard.weight.bits.clone()
        optimizer.zero_grad()
        y = shard(torch.arange(ROWS, device=device()))
        factor = torch.ones(ROWS, 1, device=device())
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
        self.big = dbt.ShardedBinaryEmbedding(ROWS, DIM, process_group=group, planes=2)
        self.small = dbt.BinaryEmbedding(40, DIM)
        self.fc = nn.Linear(DIM, 1)
        self.to(device())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.big(ids) + self.small(ids % 40)).pow(2).sum()


def trained(group: Any, rank: int) -> tuple[Mixed, dbt.XOR]:
    """A model on the ranks of a group after three steps."""
    torch.manual_seed(0)
    model = Mixed(group)
    tables = dbt.prepare_ddp(model, group)
    assert len(tables) == 2
    optimizer = dbt.XOR(tables, rule=rules.Counter(4))
    for step in range(3):
        train_step(model, optimizer, step, group, rank)
    return model, optimizer


def train_step(model: Mixed, optimizer: dbt.XOR, step: int, group: Any, rank: int) -> None:
    optimizer.zero_grad()
    model(shard_batch(step, rank).long()).backward()
    dbt.sync_row_grads([model.big.weight, model.small.weight], group)
    optimizer.step()


def checkpointed(model: Mixed, optimizer: dbt.XOR) -> dict[str, Any]:
    return {"model": model, "xor": dbt.XORCheckpoint(model, optimizer)}


def arrays_of(model: Mixed, optimizer: dbt.XOR) -> list[torch.Tensor]:
    """The arrays of the shard that have a row for each of its rows."""
    state = optimizer.state[model.big.weight]
    return [model.big.weight.bits, model.big.weight.scale, *(state[name] for name in ("counter", "record"))]


def checkpoints_load_with_another_number_of_ranks(rank: int, world: int) -> None:
    """Saved by all ranks and loaded by groups of half as many, and the other way round."""
    half = max(1, world // 2)
    groups = [dist.new_group(range(start, start + half)) for start in range(0, world, half)]
    mine = groups[rank // half]
    for name, saving, loading in (("fewer", None, mine), ("more", mine, None)):
        folder = Path(os.environ["RANKS_FOLDER"], name)
        model, optimizer = trained(saving, rank % half if saving is mine else rank)  # each half trains the same
        if saving is None or rank < half:
            dcp.save(checkpointed(model, optimizer), checkpoint_id=folder, process_group=saving)
        dist.barrier()
        torch.manual_seed(99)
        other = Mixed(loading)
        assert not torch.equal(other.small.weight.bits, model.small.weight.bits)
        loaded = dbt.XOR([other.big.weight, other.small.weight], rule=rules.Counter(4))
        dcp.load(checkpointed(other, loaded), checkpoint_id=folder, process_group=loading)
        assert (other.big.weight.shape[0] > model.big.weight.shape[0]) == (name == "fewer")
        compare_shards((model, optimizer), (other, loaded), saving, loading)
        assert loaded.state[other.big.weight]["step"] == loaded.state[other.small.weight]["step"] == 3
        assert torch.equal(other.small.weight, model.small.weight)
        assert torch.equal(loaded.state[other.small.weight]["counter"], optimizer.state[model.small.weight]["counter"])
        assert torch.equal(other.fc.weight, model.fc.weight)


def compare_shards(one: tuple[Mixed, dbt.XOR], other: tuple[Mixed, dbt.XOR], saving: Any, loading: Any) -> None:
    """The rows of the whole table are the same, whatever ranks they are on."""
    for a, b in zip(arrays_of(*one), arrays_of(*other), strict=True):
        assert torch.equal(gathered(a, saving), gathered(b, loading))


def a_shard_loads_an_unsharded_table(rank: int, world: int) -> None:
    del rank, world
    whole = dbt.BinaryEmbedding(ROWS, DIM, device=device(), planes=2)
    dbt.prepare_ddp(whole)
    shard = dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device(), planes=2)
    shard.load_state_dict(whole.state_dict())
    assert torch.equal(gathered(shard.weight.bits), whole.weight.bits)
    assert torch.equal(gathered(shard.weight.scale), whole.weight.scale)
