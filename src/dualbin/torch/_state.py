"""The optimizer state of one table: a dict of the arrays that `docs/design.md` names, and how it is checked, loaded and handed over.

In memory a trained scale has a record of four numbers a row; where a state leaves the optimizer, each has a name (`dualbin._record`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualbin._record import join_record, read_numpy_as, split_record, stack_numpy
from dualbin._schema import RECORD
from dualbin.rules import Rule, resolve, state_layout, state_spec
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
    resolved = resolve(rule, table.planes, dim)
    if resolved.sums_squares and "record" not in state and "squares" not in state and "step" in state and int(state["step"]):
        raise _no_squares(where)
    state = _with_record(state, train_scale, table)
    has_record = train_scale or "record" in state  # the scale may have been trained before
    for name, (shape, dtype) in state_layout(resolved, rows, dim, train_scale=has_record, planes=table.planes).items():
        array = state.get(name)
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

    The record may be there although the scale is frozen now.

    Raises:
        TypeError, ValueError: an entry is missing, unknown, or of the wrong dtype or shape; the message names it.
    """
    rows, dim = table.shape
    rule = resolve(rule, table.planes, dim)
    has_record = train_scale or "record" in state
    required = state_layout(rule, rows, dim, train_scale=has_record, planes=table.planes)
    window = _PENDING if rule.every > 1 or any(name in state for name in _PENDING) else ()
    if state.keys() != {"step", *required, *window}:
        names = state_spec(rule, rows, dim, train_scale=has_record, planes=table.planes)
        got = [name for key in state for name in (RECORD if key == "record" else (key,))]
        msg = f"{where}: state must hold {['step', *names, *window]} for {rule}, got {got}"
        raise ValueError(msg)
    for name in _COUNTS:
        value = state.get(name, 0)
        if isinstance(value, Tensor) and value.shape == () and value.dtype == torch.int64:
            value = int(value)  # of a capturable optimizer
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            msg = f"{where}: state {name!r} must be an int of at least 0, got {state[name]!r}"
            raise ValueError(msg)
    for name, (shape, dtype) in required.items():
        _check_array(f"{where}: state {name!r}", state[name], shape, dtype)
    if rule.sums_squares and int(state["step"]):
        check_squares(where, state)
    if "pending_ids" in state:
        _check_pending(where, state, rows, dim)


def copied(state: Mapping[str, Any], device: torch.device) -> State:
    """The same state in memory of its own on `device`."""
    return {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in state.items()}


def to_numpy(state: Mapping[str, Any]) -> dict[str, np.ndarray | int]:
    """The framework-neutral form: NumPy arrays that share no memory with the state, by the names they have outside, and ints."""
    neutral = {name: int(value) if name in _COUNTS else value.detach().cpu().numpy().copy() for name, value in state.items()}
    return split_record(neutral, read_numpy_as)


def from_numpy(where: str, state: Mapping[str, Any], device: torch.device) -> State:
    """The inverse of :func:`to_numpy`; takes whatever NumPy can read. Nothing is shared with the source."""
    result: State = {}
    state = _joined(where, state)
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


def check_squares(where: str, state: Mapping[str, Any]) -> None:
    """Raise if no row of a state that has updates has a sum of squares: it was not made by `norm="adagrad"`.

    On a GPU this waits for the device.
    """
    squares = state["record"][:, list(RECORD).index("squares")] if "record" in state else state["squares"]
    if not bool(squares.any()):
        raise _no_squares(where)


def _no_squares(where: str) -> ValueError:
    msg = f'{where}: the state has updates but no sums of squares, which norm="adagrad" divides by: use Counter(norm="rms") with it'
    return ValueError(msg)


def _with_record(state: Mapping[str, Any], train_scale: bool, table: BinaryTable) -> Mapping[str, Any]:
    """The state of a scale that is trained from now on: its numbers of a row go into a record."""
    if not train_scale or "record" in state or not state.keys() & RECORD.keys():
        return state
    zeros = torch.zeros(table.shape[0], device=table.device)
    outside = {name: zeros.to(getattr(torch, dtype)) for name, dtype in RECORD.items()} | dict(state)
    return join_record(outside, lambda array, dtype: array.view(getattr(torch, dtype)), lambda columns: torch.stack(columns, dim=1))


def _joined(where: str, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arrays of a neutral state, those of a trained scale as a record."""
    moments = {name: np.asarray(state[name]) for name in RECORD if name in state}
    if not {"count", "scale_m", "scale_v"} <= moments.keys():
        return state
    rows = moments["count"].shape
    for name, array in moments.items():
        if array.shape != rows or array.ndim != 1 or array.dtype != RECORD[name]:
            msg = f"{where}: state {name!r} must be {RECORD[name]} of shape {list(rows)}, got {array.dtype} of shape {list(array.shape)}"
            raise ValueError(msg)
    return join_record(dict(state) | moments, read_numpy_as, stack_numpy)


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
