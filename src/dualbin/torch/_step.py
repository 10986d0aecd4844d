"""One step of one table: what is checked and allocated before the first table changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualbin._checks import MAX_FLOAT, check_int, check_rate
from dualbin._schema import STATE_ARRAYS
from dualbin.rules import check_rule, resolve
from dualbin.torch import _native_call, _state
from dualbin.torch._freeze import without_frozen
from dualbin.torch._ids import check_range
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table import BinaryTable

_MAX_SEED = 2**64 - 1
OPTIONS = ("lr", "rule", "scale_lr", "seed", "capturable")

#: the name of a table in messages, which takes as long to make as all checks
Where = Callable[[], str]


class Prepared:
    """What the steps of a table have in common. It holds as long as it would be made from the same objects.

    Those may change in place, arrays also in size, and of the state only the names are among them: the native call checks all arrays at
    every step.

    Attributes:
        rule: resolved for the table.
        sums: whether the optimizer's state is known to have sums of squares, or to have none; None while a step is under way.
        counts: what updates wrote what they did into, and the next one may, too.
    """

    __slots__ = ("_made_from", "_names", "_template", "counts", "native_rule", "rule", "scale_lr", "seed", "sums", "table")

    def __init__(self, group: Mapping[str, Any], table: BinaryTable, sums: bool | None) -> None:
        check_options(group)
        self.table, self.sums = table, sums
        self.rule = resolve(group["rule"], *form(table))
        self.native_rule = _native_call.native_rule(self.rule)
        self.scale_lr, self.seed = float(group["scale_lr"]), int(group["seed"])
        self.counts: Tensor | None = None
        self._made_from: tuple[Any, ...] | None = None
        if self.rule.every == 1 and not isinstance(group["scale_lr"], Tensor):
            arrays = weakref.ref(table.bits), weakref.ref(table.scale)  # weak: a table that moved has to be free to go
            self._made_from = (*arrays, group["rule"], group["scale_lr"], group["seed"], group["capturable"])
        self._names: frozenset[str] = frozenset()
        self._template: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None

    def completed(self, where: str, group: Mapping[str, Any], state: Mapping[str, Any]) -> _state.State:
        """The whole state that a step goes on from, of what the optimizer has."""
        whole = _state.completed(where, state, self.rule, self.table, self.scale_lr > 0, group["capturable"])
        self._names = frozenset(whole)
        return whole

    def holds(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
        """Whether it says of the table's step what a new one would say, and the state is whole."""
        if self._made_from is None or not self._names or state.keys() != self._names:  # no names: the first step has raised
            return False
        bits, scale, rule, scale_lr, seed, capturable = self._made_from
        table = self.table
        return (
            bits() is table.bits
            and scale() is table.scale
            and group["rule"] is rule
            and group["scale_lr"] is scale_lr
            and group["seed"] is seed
            and group["capturable"] is capturable
            and isinstance(state["step"], Tensor) is capturable
        )

    def device_context(self, step: Tensor, first_row: int, lr: Tensor | float, captured: list[Tensor]) -> Tensor:
        """The step context from a step, and perhaps an lr, that only the device knows; what a captured graph reads is put into a list."""
        facts = first_row, 0.0 if isinstance(lr, Tensor) else lr
        capturing = step.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._template is not None and self._template[0] == facts:
            template = self._template[1]
        else:
            template = _native_call.context_template(step.device, self.seed, *facts, self.scale_lr)
            if not capturing:  # else replays alone write it
                self._template = facts, template
        if capturing:
            captured += template
        return _native_call.device_context(template, step, lr)


@dataclass(slots=True)
class Step:
    """A step of one table, ready to run: its update, if a window is full, and the state before and after.

    A step count on the device is advanced by the update; one on the host already has been, in `state`.
    """

    table: BinaryTable
    prepared: Prepared
    before: _state.State
    state: _state.State
    #: of the state afterwards, as in `Prepared`
    sums: bool | None
    update: _native_call.Update | None = None


def plan(where: Where, group: Mapping[str, Any], prepared: Prepared, before: _state.State, grad: RowGrad, captured: list[Tensor]) -> Step:
    """Check and allocate everything that the step of one table needs; changes nothing.

    Args:
        before: a whole state of the table.
        grad: its gradient, which has been checked.
        captured: as in :meth:`Prepared.device_context`.
    """
    table, rule, sums = prepared.table, prepared.rule, prepared.sums
    prepared.sums = None  # known again when the step is done
    if rule.sums_squares:
        if not sums and int(before["step"]):  # the rule may have changed
            _state.check_squares(where(), before)
        sums = True
    state = dict(before)
    ids, rows = grad.ids, grad.rows
    if ids.numel() == 0 and table.first_row is None:  # a shard steps with the others
        return Step(table, prepared, before, state, sums)  # torch.distributed.checkpoint makes the state that it loads into by such a step
    if "pending_ids" in state:
        ids, rows = _native_call.reduce_rows(ids, rows, table.shape[0])
        if state["pending_steps"]:  # a row in both becomes old + new: that is the order of the row sum
            ids, rows = torch.cat([state["pending_ids"], ids]), torch.cat([state["pending_rows"], rows])
            ids, rows = _native_call.reduce_rows(ids, rows, table.shape[0])
        state["pending_steps"] += 1
        if state["pending_steps"] < rule.every:
            state["pending_ids"], state["pending_rows"] = ids, rows
            return Step(table, prepared, before, state, sums)
        state |= _state.no_pending(table)
        if rule.every == 1:  # the window was open when the rule changed
            state = {name: value for name, value in state.items() if not name.startswith("pending_")}
    if not rule.sums_squares:
        if sums is not False and int(state["step"]):
            state = _state.without_squares(state)
        sums = False
    if table.frozen is not None:
        ids, rows = without_frozen(table, ids, rows)
    step, lr, first_row = state["step"], group["lr"], table.first_row or 0
    if isinstance(step, Tensor):
        context: Any = prepared.device_context(step, first_row, lr, captured)
        count = step
    else:
        context = (prepared.seed, step, first_row, float(lr), prepared.scale_lr)
        count, state["step"] = None, step + 1
    arrays = {name: state[name] for name in STATE_ARRAYS if name in state}
    dim = table.shape[1]
    # a captured graph keeps what it writes, and a step of ranks that fails has to leave the counts of the one before
    again = count is None and table.first_row is None
    update = _native_call.prepare_update(
        table.bits, table.scale, dim, arrays, prepared.native_rule, context, ids, rows, step=count, stats=prepared.counts if again else None
    )
    prepared.counts = update.stats
    return Step(table, prepared, before, state, sums, update)


def fits(table: BinaryTable, grad: Any) -> bool:
    """Whether :func:`checked_grad` has nothing to say. The values of ids are for it to see, where they can be seen."""
    return type(grad) is RowGrad and not grad.is_cpu and grad.device == table.device and grad.shape == table.shape


def checked_grad(where: str, table: BinaryTable) -> RowGrad:
    """The gradient of `table`, if it is one; torch itself lets no gradient of another size be assigned."""
    grad = table.grad
    if not isinstance(grad, RowGrad):
        msg = f"{where}: the gradient of a BinaryTable must be a RowGrad, got a {type(grad).__name__}"
        raise TypeError(msg)
    if grad.shape != table.shape:
        msg = f"{where}: the gradient is a RowGrad of a table of shape {tuple(grad.shape)}, but this table has {tuple(table.shape)}"
        raise ValueError(msg)
    if grad.device != table.device:
        msg = f"{where}: the gradient must be on the device of the table, {table.device}, got {grad.device}"
        raise ValueError(msg)
    check_range(grad.ids, table.shape[0], name=f"{where}: ids of the gradient")
    return grad


def form(table: BinaryTable) -> tuple[int, int]:
    """What a rule is resolved for."""
    return table.planes, table.shape[1]


def check_lr(options: Mapping[str, Any]) -> None:
    """Raise unless the lr is one; the only option that is expected to change at every step."""
    lr = options["lr"]
    if type(lr) is float and 0.0 <= lr <= MAX_FLOAT:
        return
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        msg = f"lr must be a number or a float tensor of one element, got {lr.dtype} of shape {list(lr.shape)}"
        raise TypeError(msg)
    if not (isinstance(lr, Tensor) and options["capturable"]):  # reading it would wait for the device
        check_rate("lr", lr.item() if isinstance(lr, Tensor) else lr)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise unless these are the options of a group."""
    rule, capturable = check_rule(options["rule"]), options["capturable"]
    if not isinstance(capturable, bool):
        msg = f"capturable must be True or False, got {capturable!r}"
        raise TypeError(msg)
    if capturable and rule.every > 1:
        msg = f"capturable needs a rule with every=1, since the window of every={rule.every} has no fixed size; got {rule}"
        raise ValueError(msg)
    check_lr(options)
    scale_lr = options["scale_lr"]
    check_rate("scale_lr", scale_lr.item() if isinstance(scale_lr, Tensor) and scale_lr.numel() == 1 else scale_lr)
    check_int("seed", options["seed"], low=0, high=_MAX_SEED)


def name_of(number: int, group: dict[str, Any], index: int) -> str:
    """What messages call a parameter."""
    names = group.get("param_names")
    return names[index] if names else f"parameter {index} of group {number}"
