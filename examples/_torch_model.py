"""The demo's language model in PyTorch, with any embedding module in front."""

from __future__ import annotations

import math
import time
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import dualbin.torch as dbt
from _setup import Run, Settings, batches, evaluation_steps, held_out_batches, initial_values
from _text import Corpus
from dualbin.rules import Counter


class LanguageModel(nn.Module):
    """Embedding, one causal transformer block, and an output layer that is not tied to the embedding."""

    def __init__(self, embedding: nn.Module, settings: Settings) -> None:
        super().__init__()
        d = settings.width
        self.heads = settings.heads
        self.position = nn.Parameter(torch.empty(settings.context, d))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.mix = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.narrow, self.out = nn.Linear(d, d // 2), nn.Linear(d // 2, settings.vocabulary)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in initial_values(settings).items()})
        self.embedding = embedding

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(self.narrow(self.norm3(x)))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, corpus: Corpus, settings: Settings, device: str, limit: int) -> float:
    losses = [loss_of(model, torch.from_numpy(tokens).long().to(device)).item() for tokens in held_out_batches(corpus, settings, limit)]
    return math.exp(float(np.mean(losses)))


class Optimizers:
    """AdamW for everything but a 1-bit table, XOR for that."""

    def __init__(self, model: LanguageModel, settings: Settings, *, train_bits: bool) -> None:
        table = model.embedding.weight
        binary = isinstance(table, dbt.BinaryTable)
        rest = [p for p in model.parameters() if p is not table]
        groups = [{"params": rest, "lr": settings.lr}]
        if not binary:
            groups.append({"params": [table], "lr": settings.dense_table_lr})
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
        self.xor: dbt.XOR | None = None
        if binary:
            rule = Counter(8, norm=settings.norm) if train_bits else Counter(8, eta=0.0)  # eta 0: no bit ever flips
            self.xor = dbt.XOR([table], lr=settings.table_lr, rule=rule, scale_lr=settings.scale_lr)
        self.all = [optimizer for optimizer in (adamw, self.xor) if optimizer]
        self.dense = [p for group in groups for p in group["params"]]
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate) for optimizer in self.all]

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.dense, 1.0)
        for optimizer in self.all:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad()

    def state_bytes(self, table: Tensor) -> int:
        """Bytes of the tensors that the optimizers keep for the table."""
        states = [optimizer.state[table] for optimizer in self.all if table in optimizer.state]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def train(
    name: str, embedding: nn.Module, corpus: Corpus, settings: Settings, device: str, *, train_bits: bool = True
) -> tuple[Run, dbt.XOR | None]:
    """Train a model with this table in front, in place; also returns the optimizer of a 1-bit table."""
    run = Run(name)
    start = time.perf_counter()
    model = LanguageModel(embedding, settings).to(device)
    optimizers = Optimizers(model, settings, train_bits=train_bits)
    marks = evaluation_steps(settings)
    with tqdm(batches(corpus, settings), total=settings.steps, desc=name, unit="step") as progress:
        for step, tokens in enumerate(progress, 1):
            loss = loss_of(model, torch.from_numpy(tokens).long().to(device))
            loss.backward()
            optimizers.step()
            if step == 1:
                run.gradient_bytes = gradient_bytes(embedding.weight)
            optimizers.zero_grad()
            if step in marks:
                run.curve.append((step, perplexity(model, corpus, settings, device, limit=8)))
                progress.set_postfix(perplexity=f"{run.curve[-1][1]:.1f}")
    run.perplexity = perplexity(model, corpus, settings, device, limit=1000)
    run.seconds = time.perf_counter() - start
    run.table_bytes = table_bytes(embedding.weight)
    run.kept_bytes = run.table_bytes + optimizers.state_bytes(embedding.weight)
    return run, optimizers.xor


def seconds_of_a_step(embedding: nn.Module, corpus: Corpus, settings: Settings, device: str, steps: int = 4) -> float:
    """How long a step takes here and now: the mean of some, after one that warms up. The table is changed."""
    model = LanguageModel(embedding, settings).to(device)
    optimizers = Optimizers(model, settings, train_bits=True)
    start = time.perf_counter()
    for step, tokens in enumerate(islice(batches(corpus, settings), steps + 1)):
        start = time.perf_counter() if step == 1 else start
        loss = loss_of(model, torch.from_numpy(tokens).long().to(device))
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        loss.item()
    return (time.perf_counter() - start) / steps


def table_bytes(table: Tensor) -> int:
    return table.bits.nbytes + table.scale.nbytes if isinstance(table, dbt.BinaryTable) else table.nbytes


def gradient_bytes(table: Tensor) -> int:
    gradient = table.grad
    if gradient is None:
        return 0
    return gradient.ids.nbytes + gradient.rows.nbytes if isinstance(gradient, dbt.RowGrad) else gradient.nbytes
