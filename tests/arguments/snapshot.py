"""What arguments hold, as bytes: an error must leave it as it was."""

from __future__ import annotations

from typing import Any

import numpy as np


def snapshot(x: Any) -> Any:
    """Bits, scales, states, gradients and arrays of a value, to be compared with `==`."""
    if isinstance(x, np.ndarray):
        return x.dtype.str, x.shape, x.tobytes()
    if isinstance(x, dict):
        return {key: snapshot(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [snapshot(value) for value in x]
    return _of_object(type(x).__name__, x)


def _of_object(kind: str, x: Any) -> Any:
    result: Any = None
    if kind == "XOR":
        result = [[snapshot(table), snapshot(dict(x.state.get(table, {})))] for group in x.param_groups for table in group["params"]]
    elif kind in {"BinaryTable", "ActiveTable"}:
        grad = getattr(x, "grad", None) if hasattr(x, "is_leaf") else None
        result = snapshot(x.bits), snapshot(x.scale), None if grad is None else snapshot(grad)
    elif kind == "RowGrad":
        result = snapshot(x.ids), snapshot(x.rows)
    elif kind == "ArrayImpl":
        result = snapshot(np.asarray(x))
    elif type(x).__module__.startswith("torch") and hasattr(x, "detach"):
        result = str(x.dtype), tuple(x.shape), None if x.is_meta else x.detach().cpu().contiguous().flatten().numpy().tobytes()
    elif kind.startswith(("BinaryEmbedding", "Sequential")):
        result = {name: snapshot(value) for name, value in x.named_parameters()}
    return result
