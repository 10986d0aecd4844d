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


#: how ids are drawn: all rows alike; p ~ 1 / (id + 1); always the same row; p ~ rank ** -1.05 with the ranks scattered over the rows
UNIFORM, ZIPF, ONE_ROW, POWER_LAW = "uniform", "zipf", "one row", "power law 1.05"

_EXPONENT = 1.05
_SCATTER = 2_654_435_761  # odd and no factor of a number of rows here: rank times this, modulo the rows, takes neighbours apart


@dataclass(frozen=True)
class Workload:
    """A table of `rows` x `dim` weights and `count` ids a call, drawn by `law`."""

    rows: int
    dim: int
    count: int
    law: str = UNIFORM

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}, N = {self.count}, {self.law}"

    def draw(self) -> list[np.ndarray]:
        """The sets of ids, int64 [count], the same in every run."""
        rng = np.random.default_rng(0)
        return [self._ids(rng) for _ in range(ID_SETS)]

    def _ids(self, rng: np.random.Generator) -> np.ndarray:
        if self.law == UNIFORM:
            return rng.integers(0, self.rows, self.count)
        if self.law == ONE_ROW:
            return np.full(self.count, min(7, self.rows - 1))
        uniform = rng.random(self.count)
        if self.law == ZIPF:
            total = np.cumsum(1 / np.arange(1, self.rows + 1))
            return np.searchsorted(total, uniform * total[-1])
        if self.law != POWER_LAW:
            msg = f"law must be one of {UNIFORM}, {ZIPF}, {ONE_ROW}, {POWER_LAW}, got {self.law!r}"
            raise ValueError(msg)
        least = self.rows ** (1 - _EXPONENT)  # the inverse of the distribution function of a continuous power law from 1 to `rows`
        ranks = (1 - uniform * (1 - least)) ** (1 / (1 - _EXPONENT))
        return np.clip(ranks.astype(np.int64) - 1, 0, self.rows - 1) * _SCATTER % self.rows

    def forward_bytes(self, value_bytes: int, id_bytes: int, planes: int = 1) -> int:
        """What a lookup must move: rows written; packed rows, their scales and ids read."""
        return self.count * (self.dim * value_bytes + planes * self._packed_bytes + 4 + id_bytes)

    def update_bytes(self, value_bytes: int, id_bytes: int, bits: int, unique: float) -> float:
        """What an update must move: gradient and ids read, `bits` bits a weight of the `unique` rows read and written."""
        return self.count * (self.dim * value_bytes + id_bytes) + 2 * unique * bits * self._packed_bytes

    @property
    def _packed_bytes(self) -> int:
        return -(-self.dim // 8)


def workloads(device: str, small: bool) -> list[Workload]:
    """The workloads of a device; `small` ones only show that everything works."""
    if small:
        return [Workload(3000, 64, 500), Workload(1000, 40, 700, ZIPF)]
    if device == "cpu":
        return [
            Workload(100_000, 768, 16384),
            Workload(100_000, 768, 16384, ZIPF),
            Workload(10_000_000, 128, 65536),
            Workload(256_000, 4096, 2048),
        ]
    return [
        Workload(262_144, 4096, 16384),
        Workload(50_304, 768, 65536, ZIPF),
        Workload(10_000_000, 128, 262_144),
        Workload(5_000_000, 64, 131_072),
        Workload(50_304, 768, 65536, ONE_ROW),
        Workload(16_777_216, 128, 1_048_570, POWER_LAW),  # the shape of a large recommender's tables
    ]


class Data:
    """The arrays of a workload, in NumPy; frontends copy them."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.ids = workload.draw()
        self.unique = statistics.fmean(np.unique(ids).size for ids in self.ids)
        rng = np.random.default_rng(1)
        width = -(-workload.dim // 8)
        self._random = np.frombuffer(bytearray(rng.bytes(workload.rows * width)), np.uint8).reshape(workload.rows, width)
        self.scale = np.full((workload.rows, 1), 0.3, np.float32)

    def bits(self, planes: int = 1) -> np.ndarray:
        """Packed rows; planes repeat the same bits, which makes no difference to the speed."""
        return np.tile(self._random, (1, planes))

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
