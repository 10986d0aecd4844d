"""The optimizer of packed tables."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_float, check_int
from dualbin._schema import STATS
from dualbin._state_checks import ExportedState, check_state_planes, check_state_rule
from dualbin.rules import Counter, Rule, check_rule, from_plain, resolve, to_plain
from dualbin.torch import _native_call, _state
from dualbin.torch._freeze import without_frozen
from dualbin.torch._ids import check_range
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table import BinaryTable

_MAX_SEED = 2**64 - 1
_OPTIONS = ("lr", "rule", "scale_lr", "seed", "capturable")


class XOR(torch.optim.Optimizer):
    """Trains :class:`BinaryTable` parameters in their packed form: a step is one native call a table that flips bits and moves scales.

    Only rows of the gradient are touched. Results are the same bits on every device and in `dualbin.jax.xor`. Everything is checked
    before the first table changes, so a step that raises has changed nothing. A table without a gradient, or with one that has no rows
    (as `zero_grad(set_to_none=False)` leaves it), takes no step; a shard of a table does, since the other shards may have rows.

    Args:
        params: BinaryTable parameters, or dicts of param groups; a group may set each of the options below.
        lr: rate of the update rule; schedulers may change it. Rounded to float32. With `capturable` it may be a float32 tensor without
            dimensions on the tables' device, which a captured graph reads anew at every replay.
        rule: a rule of `dualbin.rules`.
        scale_lr: the scale of a row is trained by row-wise Adam at the rate `lr * scale_lr`; 0 freezes it and keeps no moments.
        seed: of the random rounding; 0 to 2**64 - 1.
        capturable: keep the step count on the device, so that `step()` can be captured in a CUDA graph after a warm-up step. Needs a
            rule with `every=1`.

    Raises:
        TypeError: a parameter is not a BinaryTable, or an option has the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        rule: Rule = Counter(8),  # noqa: B008  (frozen)
        scale_lr: float = 3e-3,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        self._stats: dict[Tensor, dict[str, Tensor]] = {}
        self._sums: dict[Tensor, bool] = {}  #: whether the state of a table is known to have sums of squares, or to have none
        defaults = dict(zip(_OPTIONS, (lr, rule, scale_lr, seed, capturable), strict=True))
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; parameters must be BinaryTables."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for index, table in enumerate(group["params"]):
                if not isinstance(table, BinaryTable):
                    kind = f"a {type(table).__name__} of shape {tuple(table.shape)}"
                    msg = f"params must be BinaryTables, got {kind} as parameter {index}; give it to another optimizer"
                    raise TypeError(msg)
                resolve(group["rule"], *_form(table))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every table that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            The closure's result, or None.

        Raises:
            TypeError, ValueError, IndexError: a gradient, state or option does not fit its table. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_tables()
        return loss

    def stats(self, table: BinaryTable | None = None) -> dict[str, int]:
        """What the last update did, as ints: "flips", "rows" updated, rows "skipped" because their gradient or scale was not finite,
        and counters that are "clipped" at their maximum.

        On a GPU this waits for the device. Before the first update, all are 0.

        Args:
            table: one of the optimizer's tables; None sums over all.
        """
        if table is not None and not any(table is mine for _, _, mine in self._tables()):
            msg = "table must be one of this optimizer's parameters, got another one"
            raise ValueError(msg)
        kept = self._stats.values() if table is None else [self._stats.get(table, {})]
        counts = [tensor.tolist() for stats in kept for tensor in stats.values()]
        return {name: sum(count[index] for count in counts) for index, name in enumerate(STATS)}

    # ---- saving, loading, handing over -------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in every optimizer; the rules are plain data, and all else ints, floats and tensors.

        What a rule leaves open is saved as it is for the tables of the group, so that later defaults do not change a run. `rule` is that of
        all of them where it is the same for all, else `resolved` has it by planes and columns.
        """
        state_dict = super().state_dict()
        for group, mine in zip(state_dict["param_groups"], self.param_groups, strict=True):
            forms = sorted({_form(table) for table in mine["params"]})
            resolved = [to_plain(resolve(mine["rule"], *form)) for form in forms]
            same = bool(resolved) and all(plain == resolved[0] for plain in resolved)
            group["rule"] = resolved[0] if same else to_plain(mine["rule"])
            if resolved and not same:
                group["resolved"] = list(zip(forms, resolved, strict=True))
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; training goes on with the same bits. The tensors are copied.

        As in every optimizer, the hooks before it may change the dict or return another one, and those after it see the loaded state. It
        is not the base class's, which would cast tensors to the dtype of the parameter.

        Raises:
            TypeError, ValueError: the state does not fit the tables. Nothing has changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = self._checked_groups(state_dict["param_groups"])
        owners: dict[Any, tuple[dict[str, Any], BinaryTable]] = {}
        for saved, group in zip(state_dict["param_groups"], groups, strict=True):
            owners |= {index: (group, table) for index, table in zip(saved["params"], group["params"], strict=True)}
        loaded: defaultdict[Any, Any] = defaultdict(dict)
        for index, state in state_dict["state"].items():
            if index not in owners:
                loaded[index] = state
                continue
            group, table = owners[index]
            fitting = _state.checked(f"state_dict of parameter {index}", state, group["rule"], table, group["scale_lr"] > 0)
            loaded[table] = _state.copied(fitting, table.device)
        self.__setstate__({"state": loaded, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _checked_groups(self, saved_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Param groups with the options of `saved_groups` and this optimizer's tables."""
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            msg = f"state_dict must have param groups of {sizes} parameters, as this optimizer has, got groups of {saved_sizes}"
            raise ValueError(msg)
        groups = []
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            if missing := [name for name in _OPTIONS if name not in saved]:
                msg = f"state_dict must come from an XOR optimizer, its param_groups lack {missing}"
                raise ValueError(msg)
            kept = {name: group[name] for name in ("params", "param_names") if name in group}
            loaded = kept | copy.deepcopy({name: value for name, value in saved.items() if name != "params"})
            loaded["rule"] = from_plain(loaded["rule"])
            if isinstance(saved["rule"], Mapping) and "norm" not in saved["rule"].get("Counter", {"norm": None}):
                msg = "state_dict is of a version of dualbin that kept the planes of a Counter in the opposite order and knew no norm: "
                msg += 'write tables and state with dualbin.io.save there, and go on with import_state and Counter(norm="rms")'
                raise ValueError(msg)
            for (planes, dim), plain in loaded.pop("resolved", ()):
                if (now := resolve(loaded["rule"], planes, dim)) != from_plain(plain):
                    msg = f"state_dict was saved with {plain} for tables of {planes} planes and {dim} columns, but this version's defaults "
                    msg += f"make {to_plain(now)} of its rule: give the tables param groups of their own"
                    raise ValueError(msg)
            _check_options(loaded)
            for table in loaded["params"]:
                resolve(loaded["rule"], *_form(table))
            groups.append(loaded)
        return groups

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stats, self._sums = {}, {}

    def export_state(self, names: Mapping[str, BinaryTable] | None = None) -> dict[str, dict[str, Any]]:
        """The state in the form that `dualbin.io.save` writes and the other frontend reads.

        Args:
            names: name -> table of this optimizer; None names the tables "0", "1", ... in the order of the param groups.

        Returns:
            name -> {array name: NumPy array, "step": int, ...}, copies all of them. The dicts know the planes of the table and, as `.rule`,
            the rule as it is resolved for the table.
        """
        exported: dict[str, dict[str, Any]] = {}
        for name, (where, group, table) in self._named(names).items():
            state = _state.completed(where, self.state.get(table, {}), group["rule"], table, group["scale_lr"] > 0)
            exported[name] = ExportedState(_state.to_numpy(state), table.planes, resolve(group["rule"], *_form(table)))
        return exported

    def import_state(self, states: Mapping[str, Mapping[str, Any]], names: Mapping[str, BinaryTable] | None = None) -> None:
        """Continue from a state that either frontend exported. The arrays are copied.

        Args:
            states: as :meth:`export_state` returns it.
            names: as there; every name must be in `states`.

        Raises:
            TypeError, ValueError: a state is missing or does not fit its table and rule, or is known to be that of another kind of rule, of
                other bits or planes. Nothing has changed then.
        """
        imported: dict[Tensor, _state.State] = {}
        for name, (_, group, table) in self._named(names).items():
            if name not in states:
                msg = f"states must hold {name!r}, got {sorted(states)}"
                raise ValueError(msg)
            where = f"states[{name!r}]"
            check_state_planes(where, states[name], table.planes)
            check_state_rule(where, states[name], resolve(group["rule"], *_form(table)))
            state = _state.from_numpy(where, states[name], table)
            imported[table] = _state.checked(where, state, group["rule"], table, group["scale_lr"] > 0)
        self._take(imported)

    def _take(self, states: Mapping[Tensor, _state.State]) -> None:
        """Go on from states that have been checked."""
        for table in states:
            self._sums.pop(table, None)
        self.state.update(states)

    # ---- the parts of a step -----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # native calls are no graph; a compiled step runs this part as it is
    def _step_tables(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # reading attributes of a subclass is slow otherwise
            plans = [self._plan(where, group, table) for where, group, table in self._tables() if table.grad is not None]
            _native_call.apply_steps([(step.update, self._commits(step)) for step in plans])
            self._sums |= {step.table: step.sums for step in plans if step.sums is not None}

    def _commits(self, step: _Step) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What becomes of the optimizer's own dicts with the step: they exist already, so that taking the contents runs no Python code."""
        if step.table not in self.state:
            self.state[step.table] = step.before
        commits = [(self.state[step.table], step.state)]
        if step.update is not None:
            torch.autograd.graph.increment_version((step.table, step.table.bits, step.table.scale))
            commits.append((self._stats.setdefault(step.table, {}), {"counts": step.update.stats}))
        return commits

    def _tables(self) -> list[tuple[str, dict[str, Any], BinaryTable]]:
        """(name for messages, param group, table) of every parameter."""
        found = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {index} of group {number}" for index in range(len(group["params"]))]
            found += [(name, group, table) for name, table in zip(names, group["params"], strict=True)]
        return found

    def _named(self, names: Mapping[str, BinaryTable] | None) -> dict[str, tuple[str, dict[str, Any], BinaryTable]]:
        mine = self._tables()
        if names is None:
            return {str(index): entry for index, entry in enumerate(mine)}
        found = {}
        for name, table in names.items():
            entries = [entry for entry in mine if entry[2] is table]
            if not entries:
                msg = f"names[{name!r}] must be a table of this optimizer, got another {type(table).__name__}"
                raise ValueError(msg)
            found[name] = entries[0]
        return found

    def _plan(self, where: str, group: dict[str, Any], table: BinaryTable) -> _Step:
        """Check and allocate everything that the step of one table needs; changes nothing."""
        grad = checked_grad(where, table)
        _check_options(group)
        rule, scale_lr = resolve(group["rule"], *_form(table)), float(group["scale_lr"])
        before = _state.completed(where, self.state.get(table, {}), rule, table, scale_lr > 0, group["capturable"])
        sums = self._sums.pop(table, None)  # known again when the step is done
        if rule.sums_squares:
            if not sums and int(before["step"]):  # the rule may have changed
                _state.check_squares(where, before)
            sums = True
        state = dict(before)
        ids, rows = grad.ids, grad.rows
        if ids.numel() == 0 and table.first_row is None:  # a shard steps with the others
            return _Step(table, before, state, sums)  # torch.distributed.checkpoint makes the state that it loads into by such a step
        if "pending_ids" in state:
            ids, rows = _native_call.reduce_rows(ids, rows, table.shape[0])
            if state["pending_steps"]:  # a row in both becomes old + new: that is the order of the row sum
                ids, rows = torch.cat([state["pending_ids"], ids]), torch.cat([state["pending_rows"], rows])
                ids, rows = _native_call.reduce_rows(ids, rows, table.shape[0])
            state["pending_steps"] += 1
            if state["pending_steps"] < rule.every:
                state["pending_ids"], state["pending_rows"] = ids, rows
                return _Step(table, before, state, sums)
            state |= _state.no_pending(table)
            if rule.every == 1:  # the window was open when the rule changed
                state = {name: value for name, value in state.items() if not name.startswith("pending_")}
        if not rule.sums_squares:
            if sums is not False and int(state["step"]):
                state = _state.without_squares(state)
            sums = False
        ids, rows = without_frozen(table, ids, rows)
        arrays = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        arrays.pop("step", None)
        seed, step, lr, first_row = int(group["seed"]), state["step"], group["lr"], table.first_row or 0
        if isinstance(step, Tensor):
            context = _native_call.device_context(seed, step, first_row, lr, scale_lr)
        else:
            context = _native_call.host_context(table.device, seed, step, first_row, float(lr), scale_lr)
            state["step"] = step + 1
        count = step if isinstance(step, Tensor) else None
        update = _native_call.prepare_update(table.bits, table.scale, table.shape[1], arrays, rule, context, ids, rows, step=count)
        return _Step(table, before, state, sums, update)


@dataclass(frozen=True)
class _Step:
    """A step of one table, ready to run: its update, if a window is full, and the state before and after.

    A step count on the device is advanced by the update; one on the host already has been, in `state`.
    """

    table: BinaryTable
    before: _state.State
    state: _state.State
    #: of the state afterwards, as `XOR._sums`
    sums: bool | None
    update: _native_call.Update | None = None


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


def _form(table: BinaryTable) -> tuple[int, int]:
    """What a rule is resolved for."""
    return table.planes, table.shape[1]


def _check_options(options: Mapping[str, Any]) -> None:
    rule = check_rule(options["rule"])
    lr, capturable = options["lr"], options["capturable"]
    if not isinstance(capturable, bool):
        msg = f"capturable must be True or False, got {capturable!r}"
        raise TypeError(msg)
    if capturable and rule.every > 1:
        msg = f"capturable needs a rule with every=1, since the window of every={rule.every} has no fixed size; got {rule}"
        raise ValueError(msg)
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        msg = f"lr must be a number or a float tensor of one element, got {lr.dtype} of shape {list(lr.shape)}"
        raise TypeError(msg)
    if not (isinstance(lr, Tensor) and capturable):  # reading it would wait for the device
        check_float("lr", lr.item() if isinstance(lr, Tensor) else lr, low=0.0)
    scale_lr = options["scale_lr"]
    check_float("scale_lr", scale_lr.item() if isinstance(scale_lr, Tensor) and scale_lr.numel() == 1 else scale_lr, low=0.0)
    check_int("seed", options["seed"], low=0, high=_MAX_SEED)
