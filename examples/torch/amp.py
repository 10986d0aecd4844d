"""Mixed precision: autocast, GradScaler and micro-batches.

python examples/torch/amp.py
"""

import torch
from torch import nn

import dualbin.torch as dbt

ITEMS, DIM, BATCH, MICRO_BATCHES, STEPS = 2_000, 32, 256, 2, 80


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = dbt.BinaryEmbedding(ITEMS, DIM)
        self.body = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.items(ids).mean(1))


def batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Baskets of eight items; the label says whether most of them have an odd number."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ITEMS, (BATCH, 8), generator=generator)
    return ids.to(device), (ids % 2).sum(1).gt(4).long().to(device)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    torch.manual_seed(0)
    model = Model().to(device)
    optimizers = [torch.optim.AdamW(model.body.parameters(), lr=1e-2), dbt.XOR([model.items.weight], lr=1.0)]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == torch.float16)

    losses = []
    for step in range(STEPS):
        total = 0.0
        for ids, labels in zip(*(tensor.chunk(MICRO_BATCHES) for tensor in batch(step, device)), strict=True):
            with torch.autocast(device.type, dtype):
                loss = nn.functional.cross_entropy(model(ids), labels) / MICRO_BATCHES
            scaler.scale(loss).backward()  # row gradients of the micro-batches are added
            total += loss.item()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            scaler.step(optimizer)  # skips the step, of a table too, where a gradient is not finite
            optimizer.zero_grad()
        scaler.update()
        losses.append(total)
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")
    if not losses[-1] < losses[0]:
        msg = "the loss did not fall"
        raise RuntimeError(msg)


if __name__ == "__main__":
    main()
