"""Data-parallel training: every rank holds the whole table, and all flip the same bits.

torchrun --nproc-per-node 2 examples/torch/ddp.py
"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dualbin.torch as dbt
from _launch import process_group

ITEMS, DIM, BATCH, STEPS = 2_000, 32, 256, 60


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = dbt.BinaryEmbedding(ITEMS, DIM)
        self.head = nn.Linear(DIM, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.items(ids).mean(1))


def batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Baskets of eight items; the label says whether most of them have an odd number."""
    generator = torch.Generator().manual_seed(1_000 * step + rank)
    ids = torch.randint(0, ITEMS, (BATCH, 8), generator=generator)
    return ids.to(device), (ids % 2).sum(1).gt(4).long().to(device)


def train(rank: int, device: torch.device) -> None:
    model = Model().to(device)
    tables = dbt.prepare_ddp(model)  # before DDP: sends rank 0's tables to the others and hides them from DDP
    ddp = DistributedDataParallel(model)
    adam = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    xor = dbt.XOR(tables, lr=1.0)

    first = last = 0.0
    for step in range(STEPS):
        ids, labels = batch(step, rank, device)
        loss = nn.functional.cross_entropy(ddp(ids), labels)
        loss.backward()
        dbt.sync_row_grads(tables)  # after the last backward of a step, before clipping
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (adam, xor):
            optimizer.step()
            optimizer.zero_grad()
        first, last = (loss.item() if step == 0 else first), loss.item()
    if not last < first:
        msg = f"the loss did not fall: {first:.3f} at the start, {last:.3f} at the end"
        raise RuntimeError(msg)
    if rank == 0:
        print(f"loss {first:.3f} at the start, {last:.3f} at the end")


if __name__ == "__main__":
    with process_group() as (rank, device):
        train(rank, device)
