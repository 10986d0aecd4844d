"""The first and the last rows of a table that is too large for the reference, as the reference trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualbin import reference
from dualbin.rules import Rule

#: rows at each end. A large table has 1000 rows more than a power of two rows or weights: the last rows lie on both sides of it.
ROWS, BEYOND = 2000, 1000

#: ids a step
COUNT = 900

Read = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  #: bits and scale of rows [start, stop), as copies


@dataclass
class End:
    """Rows [start, start + ROWS) of the table, a shard of it."""

    start: int
    bits: np.ndarray
    scale: np.ndarray
    state: dict[str, Any]

    def has(self, ids: np.ndarray) -> np.ndarray:
        return (ids >= self.start) & (ids < self.start + ROWS)


class Ends:
    """Both ends of a table of `rows` x `dim` weights under a rule without a window."""

    def __init__(self, read: Read, rows: int, dim: int, rule: Rule, planes: int, scale_lr: float) -> None:
        self._rows, self._dim, self._planes = rows, dim, planes
        self._options = {"rule": rule, "dim": dim, "planes": planes, "scale_lr": scale_lr}
        state = [reference.init_state(rule, ROWS, dim, planes=planes, scale_lr=scale_lr) for _ in range(2)]
        self.ends = [End(start, *read(start, start + ROWS), state[place]) for place, start in enumerate((0, rows - ROWS))]

    def batches(self, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids int64 at both ends, in no order and with repeats, the last row among them, and gradients."""
        rng = np.random.default_rng(4)
        for _ in range(steps):
            ids = rng.integers(0, ROWS, COUNT) + rng.choice([0, self._rows - ROWS], COUNT)
            ids[:2] = (self._rows - 1, self._rows - BEYOND)
            yield ids, rng.normal(size=(COUNT, self._dim)).astype(np.float32)

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        rows = np.full((len(ids), self._dim), np.nan, np.float32)
        for end in self.ends:
            mine = end.has(ids)
            rows[mine] = reference.lookup(end.bits, end.scale, ids[mine] - end.start, self._dim, planes=self._planes)
        assert not np.isnan(rows).any()
        return rows

    def step(self, ids: np.ndarray, dy: np.ndarray) -> int:
        """Train both ends; returns the number of flips."""
        flips = 0
        for end in self.ends:
            mine = end.has(ids)
            stats = reference.update(end.bits, end.scale, end.state, ids[mine] - end.start, dy[mine], first_row=end.start, **self._options)
            flips += stats.flips
        return flips

    def check(self, read: Read) -> None:
        """The table has the bits and scales of the reference at both ends."""
        for end in self.ends:
            bits, scale = read(end.start, end.start + ROWS)
            np.testing.assert_array_equal(bits, end.bits)
            np.testing.assert_array_equal(scale, end.scale)
