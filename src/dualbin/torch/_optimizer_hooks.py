"""What runs around the steps of all optimizers: PyTorch's own refuse tables before a step changes anything, not in the midst of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as _post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _pre_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dualbin.torch._table import BinaryTable

_MODULES = "torch.optim."


def _refuse_tables(optimizer: Any, *_: Any) -> None:
    """Raise where an optimizer of PyTorch is about to step and one of its parameters is a table with a gradient.

    Optimizers of others are not asked: one may hold an XOR within. They meet the table when they come to it.
    """
    if torch.compiler.is_compiling() or not type(optimizer).step.__module__.startswith(_MODULES):
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if isinstance(parameter, BinaryTable) and parameter.grad is not None:
                name = type(optimizer).__name__
                msg = (
                    f"{name} cannot train a BinaryTable, got one of shape {tuple(parameter.shape)} as parameter {index} of group {number}. "
                    f"Nothing has changed. Give tables to dualbin.torch.XOR and the rest to {name}: "
                    "[p for p in model.parameters() if not isinstance(p, dualbin.torch.BinaryTable)]"
                )
                raise TypeError(msg)


_own: int = register_optimizer_step_pre_hook(_refuse_tables).id
_is_profiled = torch.autograd._profiler_enabled


def is_watched(optimizer: Any) -> bool:
    """Whether hooks other than the one above, or a profiler, want to know of the steps of an optimizer."""
    if len(_pre_hooks) > (_own in _pre_hooks) or _post_hooks or _is_profiled():
        return True
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
