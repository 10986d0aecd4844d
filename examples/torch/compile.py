"""torch.compile with the whole model in one graph, and torch.export of the trained model.

python examples/torch/compile.py [--backend aot_eager]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import dualbin.torch as dbt

ITEMS, DIM, BATCH, STEPS = 2_000, 32, 256, 80


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = dbt.BinaryEmbedding(ITEMS, DIM)
        self.head = nn.Linear(DIM, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.items(ids).mean(1))


def batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Baskets of eight items; the label says whether most of them have an odd number."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ITEMS, (BATCH, 8), generator=generator)
    return ids.to(device), (ids % 2).sum(1).gt(4).long().to(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="inductor")
    backend = parser.parse_args().backend
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Model().to(device)
    adam = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    xor = dbt.XOR([model.items.weight], lr=1.0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # forward and backward; the optimizers stay outside

    losses = []
    for step in range(STEPS):
        ids, labels = batch(step, device)
        loss = nn.functional.cross_entropy(compiled(ids), labels)
        loss.backward()
        for optimizer in (adam, xor):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    if not losses[-1] < losses[0]:
        msg = "the loss did not fall"
        raise RuntimeError(msg)

    ids, _ = batch(STEPS, device)
    program = torch.export.export(model.eval(), (ids,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(program, Path(folder) / "model.pt2")
        loaded = torch.export.load(Path(folder) / "model.pt2").module()  # a program that loads it imports dualbin.torch first
    torch.testing.assert_close(loaded(ids[:7]), model(ids[:7]))
    print("the exported model gives the same outputs")


if __name__ == "__main__":
    main()
