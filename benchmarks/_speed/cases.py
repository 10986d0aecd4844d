"""What a measurement is: a call, what it must move, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _speed.timing import Call, Clock

#: topics, in the order in which they run: what is most wanted first, so that a run that is cut has it
LOOKUPS, UPDATES, STEPS, CALLS, BAGS, GROUPING, HUGE = "lookups", "updates", "steps", "calls", "bags", "grouping", "huge"
TOPICS = (UPDATES, LOOKUPS, STEPS, CALLS, BAGS, GROUPING, HUGE)

#: directions; cases are compared with peers of the same one
FORWARD, FORWARD_OUT, UPDATE, STEP = "forward", "forward, out=", "backward + update", "forward + backward + update"
BAG, GROUP, GRAPH = "bags, forward", "grouping", "forward + backward + update, replayed CUDA graph"
HOST_FORWARD, HOST_BOTH, HOST_UPDATE = "forward, time of the host", "forward + backward, time of the host", "update, time of the host"


def on_device(clock: Clock, call: Call) -> list[float]:
    return clock.times(call)


def on_host(clock: Clock, call: Call) -> list[float]:
    return clock.host_times(call)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        direction: one of the above.
        bytes: what a packed table must move. Of a peer in an update, what one without counters must. 0: no floor.
        prepare: makes everything and returns the call. Its argument counts the calls; its result is what to wait for. Raises `Skip` where
            there is nothing to measure.
        peer: what a user would take instead of dualbin.
        time: how the call is timed.
    """

    direction: str
    name: str
    bytes: float
    prepare: Callable[[], Callable[[int], Any]]
    peer: bool = False
    time: Callable[[Clock, Call], list[float]] = on_device


@dataclass(frozen=True)
class Group:
    """Cases of one workload and dtype, which may share what they need; it is freed after them.

    Attributes:
        memory: whether the memory that was taken is worth a line.
    """

    workload: str
    dtype: str
    cases: list[Case]
    memory: bool = False
