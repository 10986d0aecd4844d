"""What an optimizer state may be, whichever frontend takes it over: arrays of NumPy or of a framework, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dualbin._checks import check_padding_bits


class ExportedState(dict[str, Any]):
    """The state of one table outside an optimizer, arrays and ints by name, that knows the planes of its table.

    The width of a counter tells how many bits are below the planes of the table, not how many planes those are: the state of 2 planes of
    `Counter(8)` would fit 1 plane of `Counter(7)`. A plain dict is taken, too; of it nothing can be said.

    Attributes:
        planes: of the table.
    """

    def __init__(self, arrays: Mapping[str, Any], planes: int) -> None:
        super().__init__(arrays)
        self.planes = planes


def check_state_planes(where: str, state: object, planes: int) -> None:
    """Raise ValueError if a state is known, by its attribute `planes`, to be that of a table with another number of planes."""
    own = getattr(state, "planes", planes)
    if own != planes:
        msg = f"{where} is the state of a table of {own} planes, but this table has {planes}: its counters are the bits below those planes"
        msg += "; train the table that it belongs to, or begin with a fresh state"
        raise ValueError(msg)


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
