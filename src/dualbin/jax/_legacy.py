"""The pure form of the reference system's own update call."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from dualbin.jax._ids import to_array, to_ids


def sparse_update_embedding_qweight(qweight: Array, grad_weight: Array, active_indices: Any = None) -> Array:
    """XOR packed weights with a packed gradient.

    Args:
        qweight: uint8 `[V, B]`.
        grad_weight: uint8 `[V, B]`; where it is zero the weights stay.
        active_indices: int array of any shape: only these rows change, each once however often it occurs. None: every row. Traced ids
            outside [0, V) are skipped.

    Returns:
        uint8 `[V, B]`, the new weights; the arguments stay as they are.

    Raises:
        TypeError, ValueError: an array has the wrong dtype or shape.
        IndexError: an id outside [0, V), where ids are concrete and in host memory.
    """
    for name, value in (("qweight", qweight), ("grad_weight", grad_weight)):
        if not hasattr(value, "dtype") or value.dtype != jnp.uint8:
            msg = f"{name} must be a uint8 array, got {getattr(value, 'dtype', type(value).__name__)}"
            raise TypeError(msg)
    if qweight.ndim != 2 or qweight.shape != grad_weight.shape:
        msg = f"qweight and grad_weight must have the same shape [V, B], got {list(qweight.shape)} and {list(grad_weight.shape)}"
        raise ValueError(msg)
    qweight, grad_weight = to_array("qweight", qweight), to_array("grad_weight", grad_weight)
    if active_indices is None:
        return qweight ^ grad_weight
    rows = qweight.shape[0]
    ids = to_ids(active_indices, rows, "active_indices").reshape(-1)
    places = jnp.where(ids < 0, rows, ids)  # a negative index would count from the end
    flipped = qweight.at[places].get(mode="fill", fill_value=0) ^ grad_weight.at[places].get(mode="fill", fill_value=0)
    return qweight.at[places].set(flipped, mode="drop")
