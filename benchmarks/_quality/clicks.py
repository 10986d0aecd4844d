"""The task "clicks": its size, its batches, and how its predictions are measured. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClickTask:
    """A model of the DLRM kind and how it is trained.

    Attributes:
        width: of the looked-up rows that the model takes.
        hidden: widths of the layers of its perceptron.
        batch: examples of a step; a pass leaves out those at its end that fill no batch.
        lr: constant rate of Adam for everything but the table.
    """

    width: int = 16
    hidden: tuple[int, ...] = (256, 128)
    batch: int = 2048
    lr: float = 1e-3


def click_tasks(small: bool = False) -> dict[str, ClickTask]:
    """The task by name; `small` is for a smoke run on a CPU."""
    return {"clicks": ClickTask(width=8, hidden=(16, 8), batch=32) if small else ClickTask()}


def batches(task: ClickTask, examples: int, passes: int, seed: int) -> NDArray[np.int64]:
    """The examples of every step, `[steps, batch]`: each pass takes them in an order of its own.

    Raises:
        ValueError: there are too few for one batch.
    """
    steps = examples // task.batch
    if steps == 0:
        msg = f"the data must have at least {task.batch} examples to train on, got {examples}"
        raise ValueError(msg)
    orders = [np.random.default_rng([77, seed, number]).permutation(examples)[: steps * task.batch] for number in range(passes)]
    return np.concatenate(orders).reshape(-1, task.batch)


def auc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the share of pairs of a positive and a negative example that the scores put in order, ties counted half.

    Args:
        scores, positive: one-dimensional, of the same length.

    Raises:
        ValueError: all examples are positive, or none is.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        msg = f"positive must have examples of both kinds, got {positives} of {len(positive)}"
        raise ValueError(msg)
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts  # scores that are lower
    rank = below + 0.5 * (counts - 1)  # how many scores each one is above, ties counted half
    return float((rank[place[positive]].sum() - 0.5 * positives * (positives - 1)) / (positives * negatives))
