"""The dense part of both tasks in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _quality.data import Task


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width = task.width
        self.heads, self.dropout = task.heads, task.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, context, width)
        x = x + F.dropout(self.mix(mixed), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class LanguageModel(nn.Module):
    """A causal transformer between looked-up rows `[batch, context, D]` and logits."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.dropout = task.dropout
        self.position = nn.Parameter(torch.empty(task.context, task.width))
        self.blocks = nn.Sequential(*(Block(task) for _ in range(task.layers)))
        self.norm = nn.LayerNorm(task.width)
        self.out = nn.Linear(task.width, task.vocabulary)

    def forward(self, rows: Tensor) -> Tensor:
        x = F.dropout(rows + self.position, self.dropout, self.training)
        return self.out(self.norm(self.blocks(x)))


class Projection(nn.Module):
    """Looked-up rows times a trained D x D matrix, which starts as the identity."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(task.width))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


class SkipGram(nn.Module):
    """Logits of the context word from the row of its centre."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.out = nn.Linear(task.width, task.vocabulary)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(rows)


def make_model(task: Task) -> nn.Module:
    """The model of a task; its weights come from `data.initial_weights`."""
    return LanguageModel(task) if task.name == "lm" else SkipGram(task)
