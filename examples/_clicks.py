"""What logs of clicks have in common: how they come in batches, and how predictions are measured. NumPy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PARTS = ("train", "choose", "report")  # 80 %, 10 % and 10 % of a log, in this order


class Batch(NamedTuple):
    """Some examples. Every field has a table of its own, and so has the bag; ids count from 0 in each of them.

    Attributes:
        ids: int64 `[examples, fields]`.
        bag: int64 `[N]`, the ids of all bags, one bag an example.
        offsets: int64 `[examples + 1]`: where bags start, and where the last one ends.
        positive: bool `[examples]`.
    """

    ids: NDArray[np.int64]
    bag: NDArray[np.int64]
    offsets: NDArray[np.int64]
    positive: NDArray[np.bool_]


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
