"""Bad ids that lookups met on a GPU, where a kernel cannot raise: it counts them in a block of device memory, read on request.

Frontends add what they count themselves.
"""

from __future__ import annotations

from collections.abc import Callable

from dualbin._backends import load_native

_reports: list[Callable[[], list[Exception]]] = []


def add_report(report: Callable[[], list[Exception]]) -> None:
    """Have :func:`check_errors` ask `report` for what has gone wrong since it was asked last."""
    _reports.append(report)


def check_errors() -> None:
    """Raise if a lookup on a GPU met an id outside `[0, V)`, or offsets that make no bags, since the last check, which resets the record.

    Such a lookup returns rows of NaN and changes nothing else. This call waits for the devices on which lookups ran, whichever frontend
    made them. On the CPU there is nothing to report, since lookups raise at once, but for those of sharded tables with a `capacity`, which
    are as on a GPU: of this process, it reports their bad ids and the rows for which there were too few slots.

    Raises:
        IndexError: with the device, the number of bad ids and the first of them.
        RuntimeError: rows had no slot. (Where there are bad ids too, the IndexError says both.)
    """
    native, _ = load_native()
    problems: list[Exception] = []
    found = native.take_errors() if native is not None else {}
    if found:
        places = "; ".join(f"{count} on cuda:{device}, the first is {first}" for device, (count, first) in sorted(found.items()))
        msg = "ids outside [0, V), or offsets of bags that do not rise from 0 to the number of ids, in lookups since the last check: "
        msg += places
        problems.append(IndexError(msg))
    for report in _reports:
        problems += report()
    if problems:
        kind = IndexError if any(isinstance(problem, IndexError) for problem in problems) else type(problems[0])
        raise kind("; ".join(map(str, problems)))
