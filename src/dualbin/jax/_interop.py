"""Tables from PyTorch, optimizer state in the framework-neutral form, and what went wrong on the way."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualbin._checks import check_bool, check_int, check_mapping
from dualbin._errors import check_errors as check_lookup_errors
from dualbin._record import join_record, read_numpy_as, split_record, stack_numpy
from dualbin._schema import RECORD, STATS
from dualbin._state_checks import (
    ExportedState,
    check_pending_ids,
    check_state_numbers,
    check_state_planes,
    check_state_rule,
    lacks_sums,
    no_sums,
)
from dualbin.jax import _paths
from dualbin.jax._optim import XorState
from dualbin.jax._state import Adagrad, TableState, Window, is_state
from dualbin.jax._table import BinaryTable
from dualbin.jax._variables import without_variables
from dualbin.rules import Rule, resolve, state_layout


def from_torch(table: Any, copy: bool = False) -> BinaryTable:
    """A table of `dualbin.torch` as one of JAX, by DLPack.

    Without a copy both share their memory and the torch table is dead from then on: an update in place of either would show in the other,
    and JAX takes arrays for constant.

    Args:
        table: anything with `.bits` uint8 `[V, planes * B]` and `.scale` float32 `[V, 1]`, both with `__dlpack__`, `.dim`, and `.planes`
            unless it is 1.
        copy: leave the torch table alone.

    Raises:
        TypeError: table lacks one of these.
        TypeError, ValueError: its arrays have the wrong dtype or shape.
    """
    check_bool("copy", copy)
    missing = [name for name in ("bits", "scale", "dim") if not hasattr(table, name)]
    if missing:
        msg = f"table must have .bits, .scale and .dim, got a {type(table).__name__} without {', '.join(missing)}"
        raise TypeError(msg)
    arrays: dict[str, jax.Array] = {}
    for name in ("bits", "scale"):
        source = getattr(table, name)
        source = source.detach() if hasattr(source, "detach") else source
        if not hasattr(source, "__dlpack__"):
            msg = f"table.{name} must support DLPack, got a {type(source).__name__}"
            raise TypeError(msg)
        array = jnp.from_dlpack(source)
        arrays[name] = jnp.array(array, copy=True) if copy else array
    if copy:
        jax.block_until_ready(arrays)  # the source may change as soon as this returns
    planes = operator.index(getattr(table, "planes", 1))
    return BinaryTable(bits=arrays["bits"], scale=arrays["scale"], dim=operator.index(table.dim), planes=planes)


# ---- state -------------------------------------------------------------------------------------------------------------------------------


def _flatten(state: ExportedState) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
    names = tuple(sorted(state))
    return tuple((jax.tree_util.DictKey(name), state[name]) for name in names), (names, state.planes, state.rule)


def _unflatten(facts: tuple[Any, ...], values: Iterable[Any]) -> ExportedState:
    names, *known = facts
    return ExportedState(dict(zip(names, values, strict=True)), *known)


# as any dict is one
jax.tree_util.register_pytree_with_keys(ExportedState, _flatten, _unflatten)


def export_state(opt_state: Any, rule: Rule | Mapping[str, Rule] | None = None) -> dict[str, dict[str, Any]]:
    """The state of every table in the form that `dualbin.io.save` and the other frontend take.

    Args:
        opt_state: an optax state with :func:`xor` somewhere in it, or a pytree of :class:`TableState`.
        rule: that of the optimizer, or the one of every table by its path: what made the state, which the arrays do not tell. Files hold
            it, as it is resolved for the table.

    Returns:
        Path of the table ("emb", "block.emb") -> arrays by the names of `docs/design.md` (NumPy), `step` and `pending_steps` (int); the
        dict knows the planes of the table and the rule. The number of calls that a schedule counts is optax's own and not part of it.

    Raises:
        ValueError: opt_state has no table, or two with the same path.
        TypeError, ValueError: rule is none, misses a table, or cannot have made its state.
    """
    states = dict(_table_states(opt_state))
    rules = _rules(rule, states)
    return {path: _export_table(path, state, rules.get(path)) for path, state in states.items()}


def _rules(rule: Rule | Mapping[str, Rule] | None, states: Mapping[str, TableState]) -> dict[str, Rule]:
    """The rule of every table, where it was given."""
    if rule is None:
        return {}
    rules = dict(rule) if isinstance(rule, Mapping) else dict.fromkeys(states, rule)
    if rules.keys() != states.keys():
        msg = f"rule must be one rule, or one for each of the tables {sorted(states)}, got rules for {sorted(rules)}"
        raise ValueError(msg)
    for path, each in rules.items():
        resolved, state = resolve(each, states[path].planes, 1), states[path]  # the columns decide on rates alone
        layout = state_layout(resolved, 1, 1, train_scale="record" in state.arrays, planes=state.planes)
        own = (state.arrays.keys(), bool(state.window), isinstance(state.norm, Adagrad))
        if own != (layout.keys(), resolved.every > 1, resolved.sums_squares):
            msg = f"rule of {path!r} must be the one that its state was made for, with {_described(*own)}, got {each}, which has "
            msg += _described(layout.keys(), resolved.every > 1, resolved.sums_squares)
            raise ValueError(msg)
    return rules


def _described(arrays: Iterable[str], window: bool, squares: bool) -> str:
    """What a rule keeps of a table."""
    return ", ".join([*sorted(arrays), *["a window of every"] * window, *["sums of squares"] * squares]) or "no arrays"


def import_state(opt_state: Any, exported: Mapping[str, Mapping[str, Any]], rule: Rule | Mapping[str, Rule] | None = None) -> Any:
    """The inverse of :func:`export_state`.

    Args:
        opt_state: a state of the same optimizer, for example a fresh `tx.init(params)`; it is not changed.
        exported: what :func:`export_state`, `dualbin.io.load` or the other frontend returned.
        rule: as in :func:`export_state`. A state that knows its rule is then refused for another kind of rule or other bits, by name.
            Without it the sizes of the arrays have to tell, which `Sign` and `Counter(1)` have in common.

    Returns:
        A copy of opt_state with the states of the tables replaced; telemetry starts at 0.

    Raises:
        TypeError, ValueError: rule is none, misses a table, or is not that of opt_state; or exported is known to be of another.
        ValueError: a table or an array is missing, left over, or has another dtype or shape, or numbers that no update leaves; or the
            state is that of a table of other planes, or has updates but no sums of squares (files of version 1 have none), and the rule
            divides by them. A rule that does not drops them: they would miss its updates.
    """
    states = dict(_table_states(opt_state))
    check_mapping("exported", exported, "paths to states")
    if set(states) != set(exported):
        msg = f"exported must have the tables {sorted(states)}, got {sorted(exported)}"
        raise ValueError(msg)
    for path, each in _rules(rule, states).items():
        check_state_rule(f"exported[{path!r}]", exported[path], each)
    new = iter([_import_table(path, state, exported[path]) for path, state in states.items()])
    return jax.tree.map(lambda x: _like(x, next(new)) if is_state(x) else x, opt_state, is_leaf=is_state)


def _like(state: TableState, new: TableState) -> TableState:
    """`new` in the variables that `state` has its arrays in, if any."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(new))


def _table_states(opt_state: Any) -> list[tuple[str, TableState]]:
    """The states by path; inside a :class:`XorState` the path starts at the parameters."""
    found = [(_paths.join(path), state) for path, state in _walk(opt_state)]
    names = [name for name, _ in found]
    if not found or len(set(names)) != len(names):
        msg = f"opt_state must have tables of dualbin.jax.xor with different paths, got {sorted(names)}"
        raise ValueError(msg)
    return found


def _walk(tree: Any) -> Iterator[tuple[_paths.Path, TableState]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, XorState | TableState))
    for keys, leaf in flat:
        if isinstance(leaf, XorState):
            yield from _walk(leaf.tables)
        elif isinstance(leaf, TableState):
            yield _paths.key_path(keys), without_variables(leaf)


def _export_table(path: str, state: TableState, rule: Rule | None = None) -> ExportedState:
    if np.ndim(state.step):
        msg = (
            f"the state of {path!r} is that of a stack of {np.size(state.step)} tables, and a file has tables one by one: "
            "export that of each member, jax.tree.map(lambda x: x[0], state)"
        )
        raise ValueError(msg)
    result: dict[str, Any] = split_record({name: np.asarray(array) for name, array in state.arrays.items()}, read_numpy_as)
    result["step"] = int(state.step)
    if window := state.window:
        used = int(window.used)
        result["pending_ids"] = np.asarray(window.ids)[:used].astype(np.int64)
        result["pending_rows"] = np.asarray(window.rows)[:used]
        result["pending_steps"] = int(window.steps)
    return ExportedState(result, state.planes, rule)


def _import_table(path: str, state: TableState, exported: Mapping[str, Any]) -> TableState:
    name, own = f"exported[{path!r}]", _export_table(path, state)
    check_mapping(name, exported, "names to arrays")
    check_state_planes(name, exported, state.planes)
    missing = "squares" in own and "squares" not in exported  # as in version 1
    if missing:
        exported = {**exported, "squares": np.zeros_like(own["squares"])}
    if set(exported) != set(own):
        msg = f"{name} must have {sorted(own)}, got {sorted(exported)}"
        raise ValueError(msg)
    step: Any = _count(f"{name}['step']", exported["step"])
    outside = {key: _fitting(f"{name}[{key!r}]", exported[key], own[key]) for key in own if key in state.arrays or key in RECORD}
    check_state_numbers(name, outside)
    if not isinstance(state.norm, Adagrad):
        outside |= {"squares": np.zeros_like(outside["squares"])} if "squares" in outside else {}  # they would miss updates from here on
    elif step > 0 and (missing or lacks_sums(outside)):
        raise no_sums(name)
    arrays = join_record(outside, read_numpy_as, stack_numpy) if "record" in state.arrays else outside
    arrays = {key: arrays[key] for key in state.arrays}
    rows = next((len(own[key]) for key in own if key in state.arrays or key in RECORD), None)
    window = _import_window(path, state.window, exported, rows) if state.window else ()
    new = TableState(step, arrays, window, jnp.zeros_like(state.stats), state.norm, state.more_planes)
    return jax.tree.map(_place, new, state)


def _count(name: str, value: Any) -> np.int32:
    return np.int32(check_int(name, operator.index(value), low=0, high=2**31 - 1))


def _fitting(name: str, value: Any, like: Any) -> Any:
    array = np.asarray(value)
    if array.shape != like.shape or array.dtype != like.dtype:
        msg = f"{name} must be {like.dtype.name} {list(like.shape)}, got {array.dtype.name} {list(array.shape)}"
        raise ValueError(msg)
    return array


def _import_window(path: str, window: Window, exported: Mapping[str, Any], table_rows: int | None) -> Window:
    ids, rows = np.asarray(exported["pending_ids"]), np.asarray(exported["pending_rows"])
    slots, dim = np.shape(window.rows)
    if ids.dtype != np.int64 or ids.ndim != 1 or rows.dtype != np.float32 or rows.shape != (len(ids), dim):
        msg = (
            f"exported[{path!r}] must have pending_ids int64 [P] and pending_rows float32 [P, {dim}], "
            f"got {ids.dtype.name} {list(ids.shape)} and {rows.dtype.name} {list(rows.shape)}"
        )
        raise ValueError(msg)
    if len(ids) > slots:
        msg = f"exported[{path!r}] has {len(ids)} pending rows, the optimizer has room for {slots}: raise pending_rows"
        raise ValueError(msg)
    check_pending_ids(f"exported[{path!r}]['pending_ids']", ids, table_rows)
    own = np.asarray(window.ids)
    outside = own[-1] if int(window.used) < slots else np.iinfo(own.dtype).max  # V, or another id that no table has
    fields: dict[str, Any] = {
        "ids": np.concatenate([ids.astype(own.dtype), np.full(slots - len(ids), outside, own.dtype)]),
        "rows": np.concatenate([rows, np.zeros((slots - len(ids), dim), np.float32)]),
        "steps": _count(f"exported[{path!r}]['pending_steps']", exported["pending_steps"]),
        "used": np.int32(len(ids)),
        "lost": np.int32(0),
    }
    return Window(**fields)


def _place(value: Any, like: Any) -> Any:
    """A copy of `value` where `like` is."""
    array = jnp.array(value)
    return jax.device_put(array, like.sharding) if isinstance(like, jax.Array) else array


# ---- telemetry ---------------------------------------------------------------------------------------------------------------------------


def read_stats(opt_state: Any) -> dict[str, dict[str, int]]:
    """What the last step did to each table.

    Args:
        opt_state: as for :func:`export_state`.

    Returns:
        Path of the table -> "flips", "rows" (updated), "skipped" (rows whose gradient or scale is not finite) and "clipped" (counters at
        their maximum after the update). All are 0 after a step that updated nothing. A stack of tables has the sums over its members.
    """
    return {
        path: dict(zip(STATS, np.asarray(state.stats).astype("<u4").view("<u8").reshape(-1, len(STATS)).sum(0).tolist(), strict=True))
        for path, state in _table_states(opt_state)
    }


def check_errors(opt_state: Any = None) -> None:
    """Raise what compiled code could only count. Waits for the device; call it now and then.

    On a GPU a lookup of an id outside `[0, V)` gives a row of NaN and is counted; the check resets the count. On the CPU it fails at once.

    Args:
        opt_state: as for :func:`export_state`; checks too that no row was lost because `pending_rows` is too small.

    Raises:
        IndexError: bad ids since the last check: the device, their number and the first of them.
        RuntimeError: rows were lost; the message names the table and the remedy.
    """
    check_lookup_errors()
    if opt_state is None:
        return
    for path, state in _table_states(opt_state):
        lost = int(np.sum(state.window.lost)) if state.window else 0
        if lost:
            msg = f"table {path!r}: {lost} row gradients did not fit into the window of every=K and were lost: raise pending_rows"
            raise RuntimeError(msg)
