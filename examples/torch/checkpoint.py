"""Checkpoints that survive being killed: run it, kill it at any time, run it again, and it ends with the bits of an uninterrupted run.

python examples/torch/checkpoint.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import nn

import dualbin.torch as dbt
from dualbin.rules import Counter

ITEMS, DIM, BATCH, STEPS, EVERY = 2_000, 32, 128, 60, 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = dbt.BinaryEmbedding(ITEMS, DIM)
        self.head = nn.Linear(DIM, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.items(ids).mean(1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Baskets of eight items; the label says whether most of them have an odd number. The step alone decides what they are."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ITEMS, (BATCH, 8), generator=generator)
    return ids, (ids % 2).sum(1).gt(4).long()


def save(path: Path, state: dict[str, object]) -> None:
    """The file is complete or not there: it gets its name when everything is written."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    adam = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    xor = dbt.XOR([model.items.weight], lr=1.0, rule=Counter(4), seed=1)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in (adam, xor)]
    parts = {"model": model, "adam": adam, "xor": xor, "adam_lr": schedulers[0], "xor_lr": schedulers[1]}

    path, start = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        print(f"resumed at step {start}")

    for step in range(start, STEPS):
        ids, labels = batch(step)
        loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()
        for optimizer in (adam, xor):
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        print(f"step {step}: loss {loss.item():.4f}")
        if (step + 1) % EVERY == 0:
            save(path, {"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
