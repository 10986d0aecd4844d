"""The optimizer state of one table: a dict of the arrays that `docs/design.md` names, and how it is checked, loaded and handed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualbin.rules import Rule, state_spec
from dualbin.torch._table import BinaryTable

_PENDING = ("pending_ids", "pending_rows", "pending_steps")
_COUNTS = ("step", "pending_steps")

State = dict[str, Any]


def completed(
    where: str, state: Mapping[str, Any], rule: Rule, table: BinaryTable, train_scale: bool, step_on_device: bool = False
) -> State:
    """The state that an update of `table` needs: what `state` holds, zeros for what it does not hold yet.

    The step is an int, or with `step_on_device` an int64 tensor without dimensions.

    Raises:
        ValueError: an array that is there does not fit the table and the rule.
    """
    rows, dim = table.shape
    step = state.get("step", 0)
    if step_on_device and not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=table.device)
    complete: State = {"step": step if step_on_device else int(step)}
    required = state_spec(rule, rows, dim, train_scale=train_scale)
    for name, (shape, dtype) in state_spec(rule, rows, dim, train_scale=True).items():
        array = state.get(name)
        if array is None and name not in required:
            continue
        if array is None:
            array = torch.zeros(shape, dtype=getattr(torch, dtype), device=table.device)
        _check_array(f"{where}: state {name!r}", array, shape, dtype)
        if array.device != table.device:
            msg = f"{where}: state {name!r} is on {array.device}, but the table is on {table.device}: make the optimizer after moving it"
            raise ValueError(msg)
        complete[name] = array
    if rule.every > 1 or "pending_ids" in state:
        complete |= no_pending(table) | {name: state[name] for name in _PENDING if name in state}
    return complete


def check(where: str, state: Mapping[str, Any], rule: Rule, table: BinaryTable, train_scale: bool) -> None:
    """Raise unless `state` is a whole state of `table` under `rule`.

    The moments of the scale may be there although the scale is frozen now.

    Raises:
        TypeError, ValueError: an entry is missing, unknown, or of the wrong dtype or shape; the message names it.
    """
    rows, dim = table.shape
    required = state_spec(rule, rows, dim, train_scale=train_scale)
    allowed = state_spec(rule, rows, dim, train_scale=True)
    needed = ["step", *required, *(_PENDING if rule.every > 1 or any(name in state for name in _PENDING) else ())]
    missing = [name for name in needed if name not in state]
    unknown = [name for name in state if name not in allowed and name not in needed]
    if missing or unknown:
        msg = f"{where}: state must hold {needed} for {rule}, got {list(state)}"
        raise ValueError(msg)
    for name in _COUNTS:
        value = state.get(name, 0)
        if isinstance(value, Tensor) and value.shape == () and value.dtype == torch.int64:
            value = int(value)  # of a capturable optimizer
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            msg = f"{where}: state {name!r} must be an int of at least 0, got {state[name]!r}"
            raise ValueError(msg)
    for name, (shape, dtype) in allowed.items():
        if name in state:
            _check_array(f"{where}: state {name!r}", state[name], shape, dtype)
    if "pending_ids" in state:
        _check_pending(where, state, rows, dim)


def copied(state: Mapping[str, Any], device: torch.device) -> State:
    """The same state in memory of its own on `device`."""
    return {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in state.items()}


def to_numpy(state: Mapping[str, Any]) -> dict[str, np.ndarray | int]:
    """The framework-neutral form: NumPy arrays that share no memory with the state, and ints."""
    return {name: int(value) if name in _COUNTS else value.detach().cpu().numpy().copy() for name, value in state.items()}


def from_numpy(where: str, state: Mapping[str, Any], device: torch.device) -> State:
    """The inverse of :func:`to_numpy`; takes whatever NumPy can read. Nothing is shared with the source."""
    result: State = {}
    for name, value in state.items():
        array = np.asarray(value)
        if name in _COUNTS:
            if array.ndim != 0 or array.dtype.kind not in "iu":
                msg = f"{where}: state {name!r} must be an int, got {value!r}"
                raise TypeError(msg)
            result[name] = int(array)
        else:
            result[name] = torch.from_numpy(np.array(array, order="C")).to(device)
    return result


def no_pending(table: BinaryTable) -> State:
    """An empty window of `every=K`."""
    ids = torch.empty(0, dtype=torch.int64, device=table.device)
    rows = torch.empty(0, table.shape[1], dtype=torch.float32, device=table.device)
    return {"pending_ids": ids, "pending_rows": rows, "pending_steps": 0}


def _check_array(what: str, array: Any, shape: tuple[int, ...], dtype: str) -> None:
    if not isinstance(array, Tensor) or tuple(array.shape) != shape or str(array.dtype) != f"torch.{dtype}" or not array.is_contiguous():
        got = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, Tensor) else f"a {type(array).__name__}"
        msg = f"{what} must be a contiguous tensor, {dtype} of shape {list(shape)}, got {got}"
        if isinstance(array, Tensor) and array.shape[1:] == shape[1:]:
            msg += "; to give a table more rows, call dualbin.torch.grow(module, rows, optimizer=...)"
        raise ValueError(msg)


def _check_pending(where: str, state: Mapping[str, Any], rows: int, dim: int) -> None:
    ids = state["pending_ids"]
    count = ids.shape[0] if isinstance(ids, Tensor) and ids.ndim == 1 else 0
    _check_array(f"{where}: state 'pending_ids'", ids, (count,), "int64")
    _check_array(f"{where}: state 'pending_rows'", state["pending_rows"], (count, dim), "float32")
    if count and (bool((ids[1:] <= ids[:-1]).any()) or int(ids[0]) < 0 or int(ids[-1]) >= rows):
        msg = f"{where}: state 'pending_ids' must be ascending rows in [0, {rows})"
        raise ValueError(msg)
