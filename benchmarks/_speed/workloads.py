"""What is measured: sizes, ids, the bytes that have to move, and the arrays that both frontends start from."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

#: sets of ids that calls take in turn, so that no call finds the rows of the one before in a cache
ID_SETS = 8

#: gradients that calls take in turn; one is larger than the caches
GRADIENTS = 2

#: dtypes of rows and gradients, and their bytes a value
DTYPES = {"fp32": 4, "bf16": 2}

FORWARD, FORWARD_OUT, UPDATE = "forward", "forward, out=", "backward + update"

#: rows of random numbers that a gradient repeats: its values do not matter for the speed, and drawing all of them takes seconds
_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Workload:
    """A table of `rows` x `dim` weights and `count` ids a call, drawn uniformly or (`zipf`) with p ~ 1 / (id + 1)."""

    rows: int
    dim: int
    count: int
    zipf: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}, N = {self.count}, {'zipf' if self.zipf else 'uniform'}"

    def draw(self) -> list[np.ndarray]:
        """The sets of ids, int64 [count], the same in every run."""
        rng = np.random.default_rng(0)
        if not self.zipf:
            return [rng.integers(0, self.rows, self.count) for _ in range(ID_SETS)]
        total = np.cumsum(1 / np.arange(1, self.rows + 1))
        return [np.searchsorted(total, rng.random(self.count) * total[-1]) for _ in range(ID_SETS)]

    def forward_bytes(self, value_bytes: int, id_bytes: int) -> int:
        """What a lookup must move: rows written, packed rows and ids read."""
        return self.count * (self.dim * value_bytes + self._packed_bytes + id_bytes)

    def update_bytes(self, value_bytes: int, bits: int, unique: float) -> float:
        """What an update must move: the gradient read, `bits` bits a weight of the `unique` rows read and written."""
        return self.count * self.dim * value_bytes + 2 * unique * bits * self._packed_bytes

    @property
    def _packed_bytes(self) -> int:
        return -(-self.dim // 8)


def workloads(device: str, small: bool) -> list[Workload]:
    """The workloads of a device; `small` ones only show that everything works."""
    if small:
        return [Workload(3000, 64, 500), Workload(1000, 40, 700, zipf=True)]
    if device == "cpu":
        return [Workload(100_000, 768, 16384)]
    return [Workload(262_144, 4096, 16384), Workload(50_304, 768, 65536, zipf=True), Workload(10_000_000, 128, 262_144)]


class Data:
    """The arrays of a workload, in NumPy; frontends copy them."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.ids = workload.draw()
        self.unique = statistics.fmean(np.unique(ids).size for ids in self.ids)
        rng = np.random.default_rng(1)
        width = -(-workload.dim // 8)
        self.bits = np.frombuffer(bytearray(rng.bytes(workload.rows * width)), np.uint8).reshape(workload.rows, width)
        self.scale = np.full((workload.rows, 1), 0.3, np.float32)

    @cached_property
    def blocks(self) -> list[np.ndarray]:
        """A block of rows, float32, for each gradient."""
        rng = np.random.default_rng(2)
        shape = (min(_BLOCK_ROWS, self.workload.count), self.workload.dim)
        return [rng.standard_normal(shape, np.float32) for _ in range(GRADIENTS)]

    @property
    def repeats(self) -> int:
        """How often a block is needed to have a row for each id."""
        return -(-self.workload.count // self.blocks[0].shape[0])


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        direction: FORWARD, FORWARD_OUT or UPDATE; cases are compared with peers of the same one.
        bytes: what a packed table must move. Of a peer in an update, what one without counters must.
        prepare: makes everything and returns the call. Its argument counts the calls; its result is what to wait for.
        peer: what a user would take instead of dualbin.
    """

    direction: str
    name: str
    bytes: float
    prepare: Callable[[], Callable[[int], Any]]
    peer: bool = False
