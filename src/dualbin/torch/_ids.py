"""The checks of ids that every caller shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualbin.torch import _native_call


def check_ids(ids: Any, device: torch.device, *, name: str = "ids", owner: str = "the table") -> None:
    """Raise unless `ids` is a tensor of int32 or int64 on `device`, the device of its `owner`.

    Raises:
        TypeError: it is no tensor, or has another dtype.
        ValueError: it is sparse, or on another device.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in _native_call.ID_TYPES:
        got = ids.dtype if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        msg = f"{name} must be a tensor of int32 or int64, got {got}"
        raise TypeError(msg)
    if ids.layout not in {torch.strided, torch.jagged}:
        msg = f"{name} must be a dense tensor, got one of layout {ids.layout}; call .to_dense()"
        raise ValueError(msg)
    if ids.device != device:
        msg = f"{name} must be on the device of {owner}, {device}, got {ids.device}"
        raise ValueError(msg)


def check_range(ids: Tensor, rows: int, *, name: str = "ids") -> None:
    """Raise IndexError for ids outside [0, rows); on a GPU nothing is read back, and such ids are dropped later."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= rows:
        msg = f"{name} must be in [0, {rows}), the rows of the table, got {low if low < 0 else high}"
        raise IndexError(msg)
