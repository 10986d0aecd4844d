"""The task "clicks": its size and its batches. NumPy only."""

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
