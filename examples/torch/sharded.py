"""A table too large for one rank: its rows are partitioned over all of them. Saves a checkpoint that any number of ranks can load.

torchrun --nproc-per-node 2 examples/torch/sharded.py [FOLDER]
"""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dualbin.torch as dbt
from _launch import process_group

ITEMS, DIM, BATCH, STEPS = 20_000, 32, 256, 60


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = dbt.ShardedBinaryEmbedding(ITEMS, DIM)  # this rank holds ITEMS / ranks rows
        self.head = nn.Linear(DIM, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.items(ids).mean(1))


def batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Baskets of eight items, mostly popular ones; the label says whether most of them have an odd number."""
    generator = torch.Generator().manual_seed(1_000 * step + rank)
    ids = (torch.rand(BATCH, 8, generator=generator).pow(4) * ITEMS).long()
    return ids.to(device), (ids % 2).sum(1).gt(4).long().to(device)


def train(rank: int, device: torch.device) -> None:
    model = Model()
    model.to(device)
    table = model.items.weight
    dbt.prepare_ddp(model)  # hides the shard from DDP
    ddp = DistributedDataParallel(model)
    adam = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    xor = dbt.XOR([table], lr=1.0)

    first = last = 0.0
    for step in range(STEPS):
        ids, labels = batch(step, rank, device)
        loss = nn.functional.cross_entropy(ddp(ids), labels)
        loss.backward()  # the row gradients are already where their rows are, and averaged
        nn.utils.clip_grad_norm_(model.head.parameters(), 1.0)  # dense parameters only
        for optimizer in (adam, xor):
            optimizer.step()
            optimizer.zero_grad()
        first, last = (loss.item() if step == 0 else first), loss.item()
    if not last < first:
        msg = f"the loss did not fall: {first:.3f} at the start, {last:.3f} at the end"
        raise RuntimeError(msg)

    folder = [sys.argv[1] if len(sys.argv) == 2 else tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    state = {"model": model, "xor": dbt.XORCheckpoint(model, xor)}
    dcp.save(state, checkpoint_id=folder[0])
    before = table.bits.clone()
    table.bits.zero_()
    dcp.load(state, checkpoint_id=folder[0])
    if not torch.equal(table.bits, before):
        msg = "the checkpoint does not hold this shard's bits"
        raise RuntimeError(msg)
    if rank == 0:
        print(f"loss {first:.3f} at the start, {last:.3f} at the end; checkpoint in {folder[0]}")


if __name__ == "__main__":
    with process_group() as (rank, device):
        train(rank, device)
