"""The optimizer state of one table: a dict of the arrays that `docs/design.md` names, and how it is checked, loaded and handed over.

In memory a trained scale has a record of four numbers a row; where a state leaves the optimizer, each has a name (`dualbin._record`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualbin._record import join_record, split_record
from dualbin._schema import RECORD, STATE_ARRAYS, state_shape
from dualbin._state_checks import check_pending_ids, check_state_numbers, lacks_sums, no_sums
from dualbin.rules import Rule, resolve, state_layout, state_spec
from dualbin.torch._native_call import fresh
from dualbin.torch._table import BinaryTable

_PENDING = ("pending_ids", "pending_rows", "pending_steps")
_COUNTS = ("step", "pending_steps")

State = dict[str, Any]


def completed(
    where: str, state: Mapping[str, Any], rule: Rule, table: BinaryTable, train_scale: bool, step_on_device: bool = False
) -> State:
    """The state that an update of `table` needs: what `state` holds, zeros for what it does not hold yet.

    The step is an int, or with `step_on_device` an int64 tensor without dimensions. Where the scale is trained from now on, the numbers of
    a row go into a record; where it is not trained any more, its moments go.

    Raises:
        ValueError: an array that is there does not fit the table and the rule.
    """
    rows, dim = table.shape
    step = state.get("step", 0)
    if step_on_device and not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=table.device)
    complete: State = {"step": step if step_on_device else int(step)}
    rule = resolve(rule, table.planes, dim)
    if _lacks_squares(state, rule) and int(step):
        raise no_sums(where)
    state = _with_record(where, state, table) if train_scale else _without_record(where, state, rule, table)
    for name, (shape, dtype) in state_layout(rule, rows, dim, train_scale=train_scale, planes=table.planes).items():
        array = state.get(name)
        if array is None:
            array = fresh(shape, getattr(torch, dtype), table.device).zero_()
        _check_array(f"{where}: state {name!r}", array, shape, dtype)
        if array.device != table.device:
            msg = f"{where}: state {name!r} is on {array.device}, but the table is on {table.device}: make the optimizer after moving it"
            raise ValueError(msg)
        complete[name] = array
    if rule.every > 1 or "pending_ids" in state:
        complete |= no_pending(table) | {name: state[name] for name in _PENDING if name in state}
    return complete


def checked(where: str, state: Mapping[str, Any], rule: Rule, table: BinaryTable, train_scale: bool) -> State:
    """`state` if it is a whole state of `table` under `rule`, without the moments of a scale that is not trained any more.

    Raises:
        TypeError, ValueError: an entry is missing, unknown, or of the wrong dtype or shape; the message names it.
    """
    rows, dim = table.shape
    rule = resolve(rule, table.planes, dim)
    for name in _COUNTS:
        _check_count(f"{where}: state {name!r}", state.get(name, 0))
    if not train_scale:
        if _lacks_squares(state, rule):
            if int(state.get("step", 0)):
                raise no_sums(where)
            state = {**state, "squares": torch.zeros(rows, device=table.device)}
        state = _without_record(where, state, rule, table)
    required = state_layout(rule, rows, dim, train_scale=train_scale, planes=table.planes)
    window = _PENDING if rule.every > 1 or any(name in state for name in _PENDING) else ()
    if state.keys() != {"step", *required, *window}:
        names = state_spec(rule, rows, dim, train_scale=train_scale, planes=table.planes)
        got = [name for key in state for name in (RECORD if key == "record" else (key,))]
        msg = f"{where}: state must hold {['step', *names, *window]} for {rule}, got {got}"
        raise ValueError(msg)
    for name, (shape, dtype) in required.items():
        _check_array(f"{where}: state {name!r}", state[name], shape, dtype)
    check_state_numbers(where, named(state), dim)
    if rule.sums_squares:
        check_squares(where, state)
    if "pending_ids" in state:
        _check_pending(where, state, rows, dim)
    return {name: state[name] for name in ("step", *required, *window)}


def copied(state: Mapping[str, Any], device: torch.device) -> State:
    """The same state in memory of its own on `device`."""
    return {name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in state.items()}


def named(state: Mapping[str, Any]) -> State:
    """A state by the names that its arrays have outside: those of a record are views of its columns."""
    return split_record(state, _read_as)


def joined(where: str, state: Mapping[str, Any], table: BinaryTable) -> State:
    """The inverse of :func:`named` for a state of `table`. A state of version 1 has no squares: they are zeros.

    Raises:
        ValueError: the numbers of a record have other dtypes or shapes.
    """
    whole = {"count", "scale_m", "scale_v"} <= state.keys()
    return dict(_with_record(where, state, table) if whole else state)


def to_numpy(state: Mapping[str, Any]) -> dict[str, np.ndarray | int]:
    """The framework-neutral form: NumPy arrays that share no memory with the state, by the names they have outside, and ints."""
    outside = named(state)
    return {name: int(value) if name in _COUNTS else np.array(value.detach().cpu().numpy(), order="C") for name, value in outside.items()}


def from_numpy(where: str, state: Mapping[str, Any], table: BinaryTable) -> State:
    """The inverse of :func:`to_numpy` for a state of `table`; takes whatever NumPy can read. Nothing is shared with the source."""
    result: State = {}
    for name, value in state.items():
        array = np.asarray(value)
        if name in _COUNTS:
            if array.ndim != 0 or array.dtype.kind not in "iu":
                msg = f"{where}: state {name!r} must be an int, got {value!r}"
                raise TypeError(msg)
            result[name] = int(array)
        else:
            result[name] = torch.from_numpy(np.array(array, order="C")).to(table.device)
    return joined(where, result, table)


def no_pending(table: BinaryTable) -> State:
    """An empty window of `every=K`."""
    ids = torch.empty(0, dtype=torch.int64, device=table.device)
    rows = torch.empty(0, table.shape[1], dtype=torch.float32, device=table.device)
    return {"pending_ids": ids, "pending_rows": rows, "pending_steps": 0}


def check_squares(where: str, state: Mapping[str, Any]) -> None:
    """Raise if a state that norm="adagrad" is to go on with was made by another. On a GPU this waits for the device."""
    if lacks_sums(named(state)):
        raise no_sums(where)


def without_squares(state: Mapping[str, Any]) -> State:
    """The state after an update by a rule that sums no squares: sums that miss an update are none, so they are zeros."""
    if "record" not in state:
        return dict(state)
    record = state["record"].clone()
    record[:, list(RECORD).index("squares")] = 0
    return {**state, "record": record}


def _lacks_squares(state: Mapping[str, Any], rule: Rule) -> bool:
    return rule.sums_squares and "record" not in state and "squares" not in state


def _with_record(where: str, state: Mapping[str, Any], table: BinaryTable) -> Mapping[str, Any]:
    """The state of a scale that is trained from now on: what there is of the numbers of a row goes into a record."""
    numbers = RECORD.keys() & state.keys()
    if "record" in state or not numbers:
        return state
    for name in numbers:
        _check_array(f"{where}: state {name!r}", state[name], (table.shape[0],), RECORD[name])
    return join_record(state, _read_as, _stack)


def _without_record(where: str, state: Mapping[str, Any], rule: Rule, table: BinaryTable) -> Mapping[str, Any]:
    """The state of a scale that is not trained any more: numbers that the rule reads become arrays of their own."""
    if "record" not in state:
        return state
    _check_array(
        f"{where}: state 'record'", state["record"], state_shape("record", table.shape[0], table.shape[1], 0), STATE_ARRAYS["record"].dtype
    )
    numbers = named({"record": state["record"]})
    kept = [*["count"] * rule.counts_rows, *["squares"] * rule.sums_squares]
    return {name: array for name, array in state.items() if name != "record"} | {name: numbers[name].contiguous() for name in kept}


def _read_as(array: Tensor, dtype: str) -> Tensor:
    return array.view(getattr(torch, dtype))


def _stack(columns: list[Tensor]) -> Tensor:
    return torch.stack(columns, dim=1)


def _check_count(what: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.shape == () and value.dtype == torch.int64:
        value = int(value)  # of a capturable optimizer
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        msg = f"{what} must be an int of at least 0, got {value!r}"
        raise ValueError(msg)


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
    check_pending_ids(f"{where}: state 'pending_ids'", ids, rows)
