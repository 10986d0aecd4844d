"""One device: BinaryEmbedding and BinaryEmbeddingBag in place of nn.Embedding and nn.EmbeddingBag, XOR beside AdamW.

python examples/torch/single.py
"""

import torch
from torch import nn

import dualbin.torch as dbt
from dualbin.rules import Counter

ITEMS, USERS, DIM, BATCH, STEPS = 2_000, 500, 32, 256, 80


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users = dbt.BinaryEmbedding(USERS, DIM)
        self.items = dbt.BinaryEmbeddingBag(ITEMS, DIM, mode="mean")
        self.head = nn.Linear(2 * DIM, 2)

    def forward(self, user: torch.Tensor, basket: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.users(user), self.items(basket)], 1))


def batch(step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users with baskets of eight items; the label says whether most items have an odd number."""
    generator = torch.Generator().manual_seed(step)
    user = torch.randint(0, USERS, (BATCH,), generator=generator)
    basket = torch.randint(0, ITEMS, (BATCH, 8), generator=generator)
    label = (basket % 2).sum(1).gt(4).long()
    return user.to(device), basket.to(device), label.to(device)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Model().to(device)
    tables = [model.users.weight, model.items.weight]
    adam = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    xor = dbt.XOR(
        [{"params": tables[:1], "rule": Counter(4)}, {"params": tables[1:], "lr": 0.5}], lr=1.0
    )  # each group with its own options
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS) for optimizer in (adam, xor)]

    losses = []
    for step in range(STEPS):
        user, basket, label = batch(step, device)
        loss = nn.functional.cross_entropy(model(user, basket), label)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (adam, xor):
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end; the last step: {xor.stats()}")
    if not losses[-1] < losses[0]:
        msg = "the loss did not fall"
        raise RuntimeError(msg)


if __name__ == "__main__":
    main()
