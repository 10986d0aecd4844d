"""What this frontend tells `dualbin.backends()`, and what `torch.load(weights_only=True)` may build."""

from __future__ import annotations

from typing import Any

import torch

from dualbin import rules
from dualbin._backends import register_frontend
from dualbin.torch import _native_call
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table import BinaryTable


def register() -> None:
    """Register the frontend with `dualbin.backends()` and its classes with torch's safe unpickler."""
    register_frontend("torch", info)
    torch.serialization.add_safe_globals([BinaryTable, RowGrad, rules.Counter, rules.Bop, rules.Sign])


def info() -> dict[str, Any]:
    """Version of PyTorch, the device types that work here, and fallbacks."""
    usable = _native_call.HAS_CUDA and torch.cuda.is_available()
    fallbacks = []
    if torch.cuda.is_available() and not _native_call.HAS_CUDA:
        fallbacks.append(f"PyTorch has a CUDA device, on which tables are refused: {_native_call.NO_CUDA}")
    return {"version": torch.__version__, "devices": ["cpu", "cuda"] if usable else ["cpu"], "fallbacks": fallbacks}
