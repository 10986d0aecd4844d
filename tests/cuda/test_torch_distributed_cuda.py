"""Training on several GPUs with NCCL: the checks of tests/ranks, and on one GPU what a group of one rank can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    return module


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_on_gpus(world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, this machine has {torch.cuda.device_count()}")
    from ranks import launch

    launch.check(world, "cuda", tmp_path)


def test_one_rank_of_nccl_gives_the_bits_of_the_cpu(dbt: Any) -> None:
    """Shards and `sync_row_grads` on the device; the CPU's tables are the oracle."""
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard, replica, oracle = dbt.ShardedBinaryEmbedding(50, 11, device="cuda"), dbt.BinaryEmbedding(50, 11), dbt.BinaryEmbedding(50, 11)
        oracle.weight.data.copy_(replica.weight)
        shard.load_state_dict(replica.to("cuda").state_dict())
        assert dbt.prepare_ddp(replica) == [replica.weight]
        optimizers = [dbt.XOR([module.weight]) for module in (shard, replica, oracle)]
        for step in range(6):
            ids = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(step))
            for module in (shard, replica, oracle):
                module(ids.to(module.weight.device)).sum().backward()
            dbt.sync_row_grads([shard.weight, replica.weight])
            oracle.weight.grad = oracle.weight.grad.coalesce()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for module in (shard, replica):
            assert torch.equal(module.weight.bits.cpu(), oracle.weight.bits)
            assert torch.equal(module.weight.scale.cpu(), oracle.weight.scale)
        with pytest.raises(IndexError, match="got 50 at position 1"):
            shard(torch.tensor([3, 50], device="cuda"))
        assert shard(torch.tensor([3], device="cuda")).isfinite().all()
    finally:
        torch.distributed.destroy_process_group()
