"""What only GPUs can show of sharded tables: steps in a CUDA graph, and lookups that wait for nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist

import dualbin.torch as dbt
from ranks.shards import DIM, ROWS
from ranks.support import device

COUNT = 96


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, ROWS, (COUNT,), generator=generator).to(device()), torch.randn(COUNT, DIM, generator=generator).to(device())


def captured_steps_are_those_of_eager_mode(rank: int, world: int) -> None:
    """Forward, backward and step with a capacity, in one graph, against the same without a capacity and without a graph."""
    share = -(-ROWS // world)
    modules = [dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device(), padding_idx=3, capacity=slots) for slots in (share, None)]
    modules[1].load_state_dict(modules[0].state_dict())
    captured, eager = modules
    optimizers = [dbt.XOR([captured.weight], seed=5, capturable=True), dbt.XOR([eager.weight], seed=5)]
    ids, dy = batch(0, rank)

    def step() -> torch.Tensor:
        y = captured(ids)
        y.backward(dy)
        optimizers[0].step()
        optimizers[0].zero_grad()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the watchdog of NCCL asks for events meanwhile
        y = step()
    captured.weight.bits.copy_(eager.weight.bits)
    captured.weight.scale.copy_(eager.weight.scale)
    for value in optimizers[0].state[captured.weight].values():
        value.zero_()
    for number in range(6):
        new_ids, new_dy = batch(number, rank)
        ids.copy_(new_ids)
        dy.copy_(new_dy)
        graph.replay()
        want = eager(new_ids)
        assert torch.equal(y, want), number
        want.backward(new_dy)
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert torch.equal(captured.weight.bits, eager.weight.bits)
    assert torch.equal(captured.weight.scale, eager.weight.scale)
    ids[5] = ROWS  # a replay counts what it does not find
    graph.replay()
    assert y[5].isnan().all()
    try:
        dbt.check_errors()
    except IndexError as error:
        assert "1 rows are NaN" in str(error)  # noqa: PT017  (no pytest in the ranks)
    else:
        raise AssertionError
    torch.cuda.synchronize()
    dist.barrier()
    del graph


def nothing_waits_for_the_device_but_one_reading_of_numbers(rank: int, world: int) -> None:
    """Which is that of `prefetch`, an event: the debug mode of torch sees all others."""
    share = -(-ROWS // world)
    for slots in (share, None):
        module = dbt.ShardedBinaryEmbedding(ROWS, DIM, device=device(), capacity=slots)
        xor = dbt.XOR([module.weight])
        ids, dy = batch(0, rank)
        for watched in (False, True):
            early = module.prefetch(ids)
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                module(early if slots is None else ids).backward(dy)
                xor.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            xor.zero_grad()
