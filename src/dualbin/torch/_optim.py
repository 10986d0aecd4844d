"""The optimizer of packed tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_mapping, warn_small_rate
from dualbin._schema import STATS
from dualbin._state_checks import ExportedState, check_state_planes, check_state_rule
from dualbin.rules import Counter, Rule, resolve, to_plain
from dualbin.torch import _native_call, _state
from dualbin.torch._optimizer_hooks import is_watched
from dualbin.torch._replicas import Replicas
from dualbin.torch._saved_groups import checked_groups
from dualbin.torch._step import OPTIONS, Prepared, Step, Where, check_lr, check_options, checked_grad, fits, form, name_of, plan
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_checks import check_params

_GRAD: Any = torch.Tensor.grad  # the descriptor


class XOR(torch.optim.Optimizer):
    """Trains :class:`BinaryTable` parameters in their packed form: a step is one native call a table that flips bits and moves scales.

    Only rows of the gradient are touched. Results are the same bits on every device and in `dualbin.jax.xor`. Everything is checked
    before the first table changes, so a step that raises has changed nothing. A table without a gradient, or with one that has no rows
    (as `zero_grad(set_to_none=False)` leaves it), takes no step; a shard of a table does, since the other shards may have rows.

    Args:
        params: BinaryTable parameters, or dicts of param groups; a group may set each of the options below.
        lr: rate of the update rule; 1 is the tuned step, and rates of dense optimizers, such as 1e-3, get a warning. Schedulers may change
            it. Rounded to float32. With `capturable` it may be a float32 tensor without dimensions on the tables' device, which a captured
            graph reads anew at every replay.
        rule: a rule of `dualbin.rules`.
        scale_lr: the scale of a row is trained by row-wise Adam at the rate `lr * scale_lr`; 0 freezes it and keeps no moments.
        seed: of the random rounding; 0 to 2**64 - 1.
        capturable: keep the step count on the device, so that `step()` can be captured in a CUDA graph after a warm-up step. Needs a
            rule with `every=1`.
        shard_state: the process group of the ranks that have the same tables (True: of all ranks), to divide the optimizer state by them.
            Then `step()` takes the place of :func:`sync_row_grads`: every rank sends the sums of its gradients to the ranks that update
            the rows, rank r those from `r * ceil(V/world)` on, and the changed rows come back packed. The tables stay the same bits on all
            ranks, those that `sync_row_grads` gives. So all ranks call `step()` equally often, also those without a gradient; `stats` and
            `state` are of this rank's rows, and `export_state` is a collective call, too. In place of GradScaler use
            `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler`. Not with `capturable`.

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
        shard_state: Any = False,
    ) -> None:
        params = check_params("params", params)
        self._replicas = None if shard_state is False else Replicas(shard_state)
        self._stats: dict[Tensor, dict[str, Tensor]] = {}
        self._prepared: dict[Tensor, Prepared] = {}
        self._captured: list[Tensor] = []  #: what captured graphs read, as long as this optimizer, whose state they change, lives
        defaults = dict(zip(OPTIONS, (lr, rule, scale_lr, seed, capturable), strict=True))
        check_options(defaults)
        super().__init__(params, defaults)
        for rate in {group["lr"] for group in self.param_groups if not isinstance(group["lr"], Tensor)}:
            warn_small_rate("XOR(lr=%g)", rate)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; parameters must be BinaryTables."""
        check_mapping("param_group", param_group, "options to values")
        if "params" not in param_group:
            msg = f"param_group must have params, the tables, got {sorted(map(str, param_group))}"
            raise ValueError(msg)
        check_params("params of param_group", param_group["params"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            for index, table in enumerate(group["params"]):
                if not isinstance(table, BinaryTable):
                    kind = f"a {type(table).__name__} of shape {tuple(table.shape)}"
                    msg = f"params must be BinaryTables, got {kind} as parameter {index}; give it to another optimizer"
                    raise TypeError(msg)
                resolve(group["rule"], *form(table))
                if self._replicas is not None:
                    self._replicas.check(table, capturable=group["capturable"])
        except Exception:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every table that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            The closure's result, or None.

        Raises:
            TypeError, ValueError, IndexError: a gradient, state or option does not fit its table. Nothing has changed then.
        """
        if closure is not None and not callable(closure):
            msg = f"closure must be a function that returns the loss, or None, got a {type(closure).__name__}"
            raise TypeError(msg)
        if not is_watched(self) and not torch.compiler.is_compiling():
            return self._step(closure)
        return self._watched_step() if closure is None else self._watched_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # else torch wraps it into what `_watched_step` has, which a small step notices

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_tables_as_they_are()
        else:
            self._step_tables()
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)

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
            forms = sorted({form(table) for table in mine["params"]})
            resolved = [to_plain(resolve(mine["rule"], *form)) for form in forms]
            same = bool(resolved) and all(plain == resolved[0] for plain in resolved)
            group["rule"] = resolved[0] if same else to_plain(mine["rule"])
            if self._replicas is not None:
                group["part"] = list(self._replicas.place)
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
        check_mapping("state_dict", state_dict, "str to values, as state_dict() returns it")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        for key in ("param_groups", "state"):
            if key not in state_dict:
                msg = f"state_dict must have 'param_groups' and 'state', got {sorted(map(str, state_dict))}"
                raise ValueError(msg)
        if not isinstance(state_dict["param_groups"], (list, tuple)):
            msg = f"state_dict['param_groups'] must be a list, got a {type(state_dict['param_groups']).__name__}"
            raise TypeError(msg)
        groups = checked_groups(state_dict["param_groups"], self.param_groups, self._replicas)
        owners: dict[Any, tuple[dict[str, Any], BinaryTable]] = {}
        parts = {index for saved in state_dict["param_groups"] if "part" in saved for index in saved["params"]}
        for saved, group in zip(state_dict["param_groups"], groups, strict=True):
            owners |= {index: (group, table) for index, table in zip(saved["params"], group["params"], strict=True)}
        loaded: defaultdict[Any, Any] = defaultdict(dict)
        for index, state in state_dict["state"].items():
            if index not in owners:
                loaded[index] = state
                continue
            group, table = owners[index]
            whole = index not in parts  # or only that of this rank's part of the table
            fitting = self._checked_state(f"state_dict of parameter {index}", state, group, table, whole=whole)
            loaded[table] = _state.copied(fitting, table.device)
        self.__setstate__({"state": loaded, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _checked_state(
        self, where: str, state: Mapping[str, Any], group: dict[str, Any], table: BinaryTable, *, whole: bool
    ) -> _state.State:
        """What this optimizer keeps of a state, if it is one of the `whole` table, or of this rank's part of it."""
        saved = table if whole else self._part(table)
        fitting = _state.checked(where, state, group["rule"], saved, group["scale_lr"] > 0)
        return self._replicas.of_part(fitting, table) if whole and self._replicas is not None else fitting

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stats, self._prepared = {}, {}
        self.__dict__.setdefault("_captured", [])
        self.__dict__.setdefault("_replicas", None)

    def __getstate__(self) -> dict[str, Any]:
        if self._replicas is not None:
            msg = "an XOR with shard_state belongs to its process group and cannot be copied or pickled: save its state_dict()"
            raise TypeError(msg)
        return super().__getstate__()

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
            state = _state.completed(where, self.state.get(table, {}), group["rule"], self._part(table), group["scale_lr"] > 0)
            state = state if self._replicas is None else self._replicas.whole(state, table)
            exported[name] = ExportedState(_state.to_numpy(state), table.planes, resolve(group["rule"], *form(table)))
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
        check_mapping("states", states, "names to states")
        imported: dict[Tensor, _state.State] = {}
        for name, (_, group, table) in self._named(names).items():
            if name not in states:
                msg = f"states must hold {name!r}, got {sorted(states)}"
                raise ValueError(msg)
            where = f"states[{name!r}]"
            check_mapping(where, states[name], "names to arrays")
            check_state_planes(where, states[name], table.planes)
            check_state_rule(where, states[name], resolve(group["rule"], *form(table)))
            state = _state.from_numpy(where, states[name], table)
            imported[table] = self._checked_state(where, state, group, table, whole=True)
        self._take(imported)

    def _take(self, states: Mapping[Tensor, _state.State]) -> None:
        """Go on from states that have been checked."""
        for table in states:
            self._prepared.pop(table, None)
        self.state.update(states)

    # ---- the parts of a step -----------------------------------------------------------------------------------------------------------

    def _step_tables(self) -> None:
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # the context managers of torch take longer
        try:
            with torch._C.DisableTorchFunctionSubclass():  # reading attributes of a subclass is slow otherwise
                plans = self._plans() if self._replicas is None else self._plans_of_parts(self._replicas)
                if self._replicas is None:
                    _native_call.apply_steps([(step.update, self._commits(table, step)) for table, step in plans])
                else:
                    self._apply_and_spread(self._replicas, plans)
                for _, step in plans:
                    step.prepared.sums = step.sums
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    _step_tables_as_they_are = torch._disable_dynamo(_step_tables)  # native calls are no graph

    def _plans(self) -> list[tuple[BinaryTable, Step]]:
        """The steps of all tables that have a gradient."""
        plans = []
        for number, group in enumerate(self.param_groups):
            for index, table in enumerate(group["params"]):
                if (grad := _GRAD.__get__(table)) is not None:
                    where = partial(name_of, number, group, index)
                    if not fits(table, grad):
                        checked_grad(where(), table)
                    plans.append((table, self._plan(where, group, table, table, grad)))
        return plans

    def _plans_of_parts(self, replicas: Replicas) -> list[tuple[BinaryTable, Step]]:
        """The steps of this rank's parts of all tables that have a gradient on any rank."""
        entries = [
            (partial(name_of, number, group, index), group, table)
            for number, group in enumerate(self.param_groups)
            for index, table in enumerate(group["params"])
        ]
        given = replicas.gather(entries, check_options)
        return [(table, self._plan(where, group, table, replicas.part(table), grad)) for (where, group, table), grad in given]

    def _apply_and_spread(self, replicas: Replicas, plans: list[tuple[BinaryTable, Step]]) -> None:
        """The updates of this rank's parts, then the rows of all parts. Where ranks cannot exchange them, nothing has changed on CPUs."""
        rows, new = replicas.before(plans), [table for table, _ in plans if table not in self.state]
        steps = [(step.update, self._commits(table, step)) for table, step in plans]
        contents = [(mine, dict(mine)) for _, commits in steps for mine, _ in commits]
        try:
            _native_call.apply_steps(steps)
            replicas.spread(plans)
        except BaseException:
            if all(table.is_cpu for table, _ in plans):
                for array, changed, values in rows:
                    array[changed] = values
                for mine, content in contents:
                    mine.clear()
                    mine.update(content)
                for table in new:
                    del self.state[table]
            raise

    def _part(self, table: BinaryTable) -> BinaryTable:
        """The rows of a table whose state is here."""
        return table if self._replicas is None else self._replicas.part(table)

    def _plan(self, where: Where, group: dict[str, Any], table: BinaryTable, part: BinaryTable, grad: Any) -> Step:
        """Check and allocate everything that the step of one table, or of the part of it that is updated here, needs; changes nothing."""
        state = self.state.get(table) or {}
        prepared = self._prepared.get(table)
        if prepared is not None and prepared.table is part and prepared.holds(group, state):
            check_lr(group)
            try:
                return plan(where, group, prepared, state, grad, self._captured)
            except (TypeError, ValueError):
                prepared.completed(where(), group, state)  # if the state is at fault, this says so in the words of every first step
                raise
        self._prepared[table] = prepared = Prepared(group, part, None if prepared is None else prepared.sums)
        return plan(where, group, prepared, prepared.completed(where(), group, state), grad, self._captured)

    def _commits(self, table: BinaryTable, step: Step) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What becomes of the optimizer's own dicts with the step: they exist already, so that taking the contents runs no Python code."""
        if table not in self.state:
            self.state[table] = step.before
        commits = [(self.state[table], step.state)]
        if step.update is not None:
            torch.autograd.graph.increment_version((table, table.bits, table.scale))
            commits.append((self._stats.setdefault(table, {}), {"counts": step.update.stats}))
        return commits

    def _tables(self) -> list[tuple[str, dict[str, Any], BinaryTable]]:
        """(name for messages, param group, table) of every parameter."""
        found = []
        for number, group in enumerate(self.param_groups):
            found += [(name_of(number, group, index), group, table) for index, table in enumerate(group["params"])]
        return found

    def _named(self, names: Mapping[str, BinaryTable] | None) -> dict[str, tuple[str, dict[str, Any], BinaryTable]]:
        mine = self._tables()
        if names is None:
            return {str(index): entry for index, entry in enumerate(mine)}
        check_mapping("names", names, "names to tables")
        found = {}
        for name, table in names.items():
            entries = [entry for entry in mine if entry[2] is table]
            if not entries:
                msg = f"names[{name!r}] must be a table of this optimizer, got another {type(table).__name__}"
                raise ValueError(msg)
            found[name] = entries[0]
        return found
