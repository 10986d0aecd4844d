"""What an optimizer state may be, whichever frontend takes it over: arrays of NumPy or of a framework, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dualbin._checks import check_padding_bits
from dualbin.rules import Counter, Rule


class ExportedState(dict[str, Any]):
    """The state of one table outside an optimizer, arrays and ints by name, that knows the planes of its table and the rule that made it.

    The width of a counter tells how many bits are below the planes of the table, not how many planes those are: the state of 2 planes of
    `Counter(8)` would fit 1 plane of `Counter(7)`. A plain dict is taken, too; of it nothing can be said.

    Attributes:
        planes: of the table.
        rule: what made the state, or None where it is not known. Files have it as it is resolved for the table.
    """

    def __init__(self, arrays: Mapping[str, Any], planes: int, rule: Rule | None = None) -> None:
        super().__init__(arrays)
        self.planes = planes
        self.rule = rule


def check_state_planes(where: str, state: object, planes: int) -> None:
    """Raise ValueError if a state is known, by its attribute `planes`, to be that of a table with another number of planes."""
    own = getattr(state, "planes", planes)
    if own != planes:
        msg = f"{where} is the state of a table of {own} planes, but this table has {planes}: its counters are the bits below those planes"
        msg += "; train the table that it belongs to, or begin with a fresh state"
        raise ValueError(msg)


def check_state_rule(where: str, state: object, rule: Rule) -> None:
    """Raise ValueError if a state is known, by its attribute `rule`, to be that of another kind of rule or of other bits.

    Rates are the user's to change, and so are the window of `every`, which closes by the new one, and the norm, which asks for its sums.

    Args:
        where: names the state in messages.
        state: of one table.
        rule: that is to go on with it.
    """
    made_by = getattr(state, "rule", None)
    if made_by is not None and _form(made_by) != _form(rule):
        msg = f"{where} is the state of {made_by}, which {rule} cannot go on with: give the optimizer the rule of the state, or begin "
        msg += "with a fresh state"
        raise ValueError(msg)


def _form(rule: Rule) -> tuple[type[Rule], int]:
    return type(rule), rule.bits if isinstance(rule, Counter) else 1


#: counts and sums of squares
_NOT_NEGATIVE = ("count", "squares", "scale_v")


def check_state_numbers(where: str, state: Mapping[str, Any], dim: int | None = None) -> None:
    """Raise ValueError unless an update could have left these numbers: it names the array.

    Args:
        where: names the state in messages.
        state: arrays of right dtypes and shapes; those that are not there are not checked. On a GPU this waits for the device.
        dim: columns of the table; None where they are not known, and the padding bits of counters not checked.
    """
    for name in _NOT_NEGATIVE:
        if name in state and not bool((state[name] >= 0).all()):
            msg = f"{where}: state {name!r} must be 0 or more in every row, got rows that are negative or NaN: the state is damaged"
            raise ValueError(msg)
    if "counter" in state and dim is not None:
        check_padding_bits(f"{where}: state 'counter'", state["counter"], dim)


def check_exported(where: str, state: Mapping[str, Any], rows: int, dim: int) -> None:
    """Raise ValueError unless this can be the state of a table of `rows` x `dim` weights outside an optimizer: it names the array.

    Args:
        where: names the state in messages.
        state: NumPy arrays of right dtypes, counts of steps as integers or int64 arrays without dimensions.
        rows, dim: of the table.
    """
    for name in ("step", "pending_steps"):
        if name in state and int(state[name]) < 0:
            msg = f"{where}: state {name!r} must be 0 or more, got {int(state[name])}"
            raise ValueError(msg)
    check_state_numbers(where, state, dim)
    for name in ("squares", "scale_m", "scale_v"):
        if name in state and not np.isfinite(state[name]).all():
            msg = f"{where}: state {name!r} must be finite, got rows that are not: the state is damaged"
            raise ValueError(msg)
    if "pending_ids" in state:
        ids = state["pending_ids"]
        check_pending_ids(f"{where}: state 'pending_ids'", ids, rows)
        if "pending_rows" in state and state["pending_rows"].shape != (ids.size, dim):
            shape = list(state["pending_rows"].shape)
            msg = f"{where}: state 'pending_rows' must be [{ids.size}, {dim}], a row for every one of 'pending_ids', got {shape}"
            raise ValueError(msg)


def check_pending_ids(name: str, ids: Any, rows: int | None) -> None:
    """Raise ValueError unless the rows of an open window ascend and are in the table.

    Args:
        name: names the ids in messages.
        ids: `[P]`, of NumPy or a framework. On a GPU this waits for the device.
        rows: of the table; None where they are not known.
    """
    most = "V" if rows is None else rows
    if len(ids) and (int(ids[0]) < 0 or (rows is not None and int(ids[-1]) >= rows) or bool((ids[1:] <= ids[:-1]).any())):
        few = ", ".join(map(str, ids[:8].tolist())) + (", ..." if len(ids) > 8 else "")
        msg = f"{name} must ascend and lie in [0, {most}), got [{few}]"
        raise ValueError(msg)


def lacks_sums(state: Mapping[str, Any]) -> bool:
    """Whether the updates of a state were made by a rule without sums of squares: scales have moments, but no row has a sum.

    Rows that no gradient has reached have neither, and of a shard that may be all. On a GPU this waits for the device.
    """
    return "scale_v" in state and bool(state["scale_v"].any()) and not bool(state["squares"].any())


def no_sums(where: str) -> ValueError:
    """The error of such a state that is to go on with norm="adagrad"."""
    msg = f'{where}: the state has updates but no sums of squares, which norm="adagrad" divides by: use Counter(norm="rms") with it, or a '
    msg += "fresh state (an update with another norm drops the sums)"
    return ValueError(msg)
