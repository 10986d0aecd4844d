"""Bags of rows that are partitioned over the ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

import dualbin.torch as dbt
from dualbin import rules
from ranks.support import device, gathered

ROWS, DIM, PADDING = 101, 20, 37


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and offsets of bags of 0 to 6 rows; rank 1 has none at step 1, and nobody has ids at step 3."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, 7, (0 if (step, rank) == (1, 1) else 9 + 2 * rank,), generator=generator)
    lengths = lengths * 0 if step == 3 else lengths
    ids = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, PADDING, ids)
    return ids.to(device()), (lengths.cumsum(0) - lengths).to(device())


def factors(step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77 * step + rank)
    return torch.randn(len(batch(step, rank)[1]), DIM, generator=generator).to(device(), dtype)


def weights_of(step: int, rank: int, weighted: bool) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(55 * step + rank)
    drawn = torch.rand(len(batch(step, rank)[0]), generator=generator).to(device())
    return drawn.requires_grad_() if weighted else None


def parts_in_order(whole: Any, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, world: int) -> torch.Tensor:
    """The bags as the docs promise them: float32 sums of what each rank holds, added in the order of the ranks."""
    share = -(-ROWS // world)
    bag = dbt.BinaryEmbeddingBag(ROWS, DIM, mode="sum", padding_idx=PADDING, planes=whole.weight.planes, device=device())
    bag.load_state_dict(whole.state_dict())
    total = torch.zeros(len(offsets), DIM, device=device())
    for rank in range(world):
        total += bag(torch.where(ids // share == rank, ids, PADDING), offsets, weights)
    if whole.mode == "mean":
        used = (ids != PADDING).float()
        bounds = [*offsets.tolist(), len(ids)]
        counts = torch.stack([used[begin:end].sum() for begin, end in pairwise(bounds)] or [used.sum()])
        total /= counts[: len(offsets)].clamp(min=1).unsqueeze(1)
    return total.to(whole.weight.dtype)


def sharded_bags_are_those_of_the_unsharded_table(rank: int, world: int) -> None:
    for mode, dtype, planes, weighted in (
        ("sum", torch.float32, 1, True),
        ("mean", torch.bfloat16, 2, False),
        ("sum", torch.float32, 1, False),
    ):
        options: dict[str, Any] = {"mode": mode, "padding_idx": PADDING, "device": device(), "dtype": dtype, "planes": planes}
        shard, whole = dbt.ShardedBinaryEmbeddingBag(ROWS, DIM, **options), dbt.BinaryEmbeddingBag(ROWS, DIM, **options)
        whole.load_state_dict({"weight.bits": gathered(shard.weight.bits), "weight.scale": gathered(shard.weight.scale)})
        optimizers = [dbt.XOR([module.weight], rule=rules.Counter(8), seed=9) for module in (shard, whole)]
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            ids, offsets = batch(step, rank)
            weights = weights_of(step, rank, weighted)
            y = shard(ids, offsets, weights)
            assert torch.equal(y, parts_in_order(whole, ids, offsets, weights, world))
            torch.testing.assert_close(y, whole(ids, offsets, weights), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
            (y * factors(step, rank, dtype)).sum().backward()
            if weights is not None and step != 3:
                twin = weights.detach().clone().requires_grad_()
                (whole(ids, offsets, twin) * factors(step, rank, dtype)).sum().backward()
                assert torch.equal(weights.grad, twin.grad)
                optimizers[1].zero_grad()
            batches = [batch(step, r) for r in range(world)]
            joined = torch.cat([each for each, _ in batches])
            starts = torch.cat([each + sum(len(batches[r][0]) for r in range(number)) for number, (_, each) in enumerate(batches)])
            dy = torch.cat([factors(step, r, dtype) for r in range(world)]) / world
            if len(joined):
                all_weights = torch.cat([weights_of(step, r, weighted) for r in range(world)]) if weighted else None
                (whole(joined, starts, all_weights) * dy).sum().backward()
            assert (shard.weight.grad is None) == (step == 3)
            for optimizer in optimizers:
                optimizer.step()
        here = slice(shard.weight.first_row, shard.weight.first_row + shard.weight.shape[0])
        assert torch.equal(shard.weight.bits, whole.weight.bits[here])
        assert torch.equal(shard.weight.scale, whole.weight.scale[here])
        assert optimizers[0].state[shard.weight]["step"] == 5


def bad_bags_on_one_rank_raise_on_all(rank: int, world: int) -> None:
    shard = dbt.ShardedBinaryEmbeddingBag(ROWS, DIM, device=device())
    last = rank == world - 1
    for ids, offsets, kind, here in (
        ([1, ROWS if last else 2], [0], IndexError, "got 101 at position 1"),
        ([1, 2], [0, 3 if last else 1], ValueError, "offsets must start at 0, ascend and end at the number of ids (2 on this rank)"),
    ):
        try:
            shard(torch.tensor(ids, device=device()), torch.tensor(offsets, device=device()))
        except kind as error:
            assert (str(error).endswith("others")) != last  # noqa: PT017  (no pytest in the ranks)
            assert not last or here in str(error)  # noqa: PT017
        else:
            raise AssertionError
    assert shard(torch.tensor([[1, 2]], device=device())).shape == (1, DIM)  # and the ranks are still in step
