"""What the runs of the demo share, so that only the input table differs: sizes, initial values, batches and learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from _text import Corpus

TABLE_SEED = 7


@dataclass(frozen=True)
class Settings:
    """Sizes and rates of the language model: one causal transformer block between the input table and an output layer of its own."""

    vocabulary: int
    steps: int
    width: int = 128
    heads: int = 4
    context: int = 32
    batch: int = 32
    lr: float = 4e-3  # AdamW, for everything but the table
    dense_table_lr: float = 1.6  # AdamW, for the fp32 table: of eight from 0.02 to 3.2, only 3.2 is better, by 1%
    table_lr: float = 1.0  # XOR
    scale_lr: float = 3e-3
    norm: str = "rms"  # of the 1-bit tables' rule: in 200 steps 4 % better than the default, which is for longer runs
    table_std: float = 3.0  # of the initial fp32 table; its mean magnitude is the initial scale of the 1-bit tables
    evaluations: int = 10

    def rate(self, step: int) -> float:
        """Factor on every learning rate: a short warm-up, then linear to zero."""
        warm_up = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warm_up) * (1.0 - step / self.steps)


@dataclass
class Run:
    """What one run leaves behind. Bytes are those of the buffers that exist, counted by the frontend."""

    name: str
    curve: list[tuple[int, float]] = field(default_factory=list)
    perplexity: float = float("nan")
    table_bytes: int = 0
    kept_bytes: int = 0  # the table and its optimizer state
    gradient_bytes: int = 0  # of the table, in one step
    seconds: float = 0.0


def initial_table(settings: Settings) -> np.ndarray:
    """float32 [vocabulary, width]: the fp32 table starts here, the 1-bit tables at its signs."""
    random = np.random.default_rng(TABLE_SEED)
    return random.normal(0.0, settings.table_std, (settings.vocabulary, settings.width)).astype(np.float32)


def initial_values(settings: Settings) -> dict[str, np.ndarray]:
    """Everything but the table, by the names of the PyTorch module's parameters."""
    random = np.random.default_rng(0)
    d, hidden = settings.width, 2 * settings.width

    def normal(*shape: int) -> np.ndarray:
        return random.normal(0.0, 0.02, shape).astype(np.float32)

    values = {"position": normal(settings.context, d)}
    shapes = {"qkv": (3 * d, d), "mix": (d, d), "up": (hidden, d), "down": (d, hidden), "narrow": (d // 2, d)}
    for name, shape in {**shapes, "out": (settings.vocabulary, d // 2)}.items():
        values[f"{name}.weight"], values[f"{name}.bias"] = normal(*shape), np.zeros(shape[0], np.float32)
    for name in ("norm1", "norm2", "norm3"):
        values[f"{name}.weight"], values[f"{name}.bias"] = np.ones(d, np.float32), np.zeros(d, np.float32)
    return values


def batches(corpus: Corpus, settings: Settings) -> Iterator[np.ndarray]:
    """int32 [batch, context + 1] for every step: the same in every run."""
    random = np.random.default_rng(1)
    window = np.arange(settings.context + 1)
    for _ in range(settings.steps):
        start = random.integers(0, corpus.train.size - settings.context, (settings.batch, 1))
        yield corpus.train[np.minimum(start + window, corpus.train.size - 1)]


def held_out_batches(corpus: Corpus, settings: Settings, limit: int) -> Iterator[np.ndarray]:
    """Batches of windows that cover the held-out text, at most `limit` of them, evenly spaced."""
    span = settings.batch * settings.context
    window = np.arange(settings.context + 1)
    count = (corpus.held_out.size - 1) // span
    for n in np.unique(np.linspace(0, count - 1, min(limit, count), dtype=int)):
        start = n * span + settings.context * np.arange(settings.batch)[:, None]
        yield corpus.held_out[start + window]


def evaluation_steps(settings: Settings) -> set[int]:
    """Steps after which the curve gets a point."""
    return {settings.steps * n // settings.evaluations for n in range(1, settings.evaluations + 1)}
