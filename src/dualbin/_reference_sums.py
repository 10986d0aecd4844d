"""The orders in which floats are added: part of :mod:`dualbin.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SUM_BLOCK = 64  #: additions that are done in one go, in a row sum as in a bag


def sum_of_lanes(values: Array) -> Array:
    """Sums [U] of float64 [U, D]: 32 strided lanes from +0.0, each in ascending order, then added in halves: the order of a GPU warp."""
    rows, dim = values.shape
    lanes = np.zeros((rows, 32))
    for start in range(0, dim, 32):
        chunk = values[:, start : start + 32]
        lanes[:, : chunk.shape[1]] += chunk
    return fold_lanes(lanes)


def fold_lanes(lanes: Any) -> Any:
    """Sums [U] of lanes [U, 32], of NumPy or JAX: the upper half is added to the lower until one is left."""
    half = 16
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]
