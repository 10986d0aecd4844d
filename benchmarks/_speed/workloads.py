"""What is measured: sizes, ids, the bytes that have to move, and the arrays that both frontends start from."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

#: sets of ids that calls take in turn, so that no call finds the rows of the one before in a cache
ID_SETS = 8

#: gradients that calls take in turn; one is larger than the caches
GRADIENTS = 2

#: dtypes of rows and gradients, and their bytes a value
DTYPES = {"fp32": 4, "bf16": 2}

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

    @property
    def width(self) -> int:
        """Bytes of a packed row of one plane."""
        return -(-self.dim // 8)

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
        return self.count * (self.dim * value_bytes + planes * self.width + 4 + id_bytes)

    def update_bytes(self, value_bytes: int, id_bytes: int, bits: int, unique: float) -> float:
        """What an update must move: gradient and ids read, `bits` bits a weight of the `unique` rows read and written."""
        return self.count * (self.dim * value_bytes + id_bytes) + 2 * unique * bits * self.width


@dataclass(frozen=True)
class Bags:
    """A table of `rows` x `dim` weights and `count` bags of `size` ids a call, all rows alike."""

    rows: int
    dim: int
    count: int
    size: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}, {self.count} bags of {self.size}"

    def draw(self) -> list[np.ndarray]:
        """The sets of ids, int64 [count * size], the same in every run."""
        return Workload(self.rows, self.dim, self.count * self.size).draw()

    def bytes(self, value_bytes: int, planes: int = 1) -> int:
        """What must move: bags written; ids, offsets, scales and rows read, these in the sectors of 32 bytes that memory gives."""
        sectors = -(-planes * -(-self.dim // 8) // 32) + 1
        return self.count * (self.dim * value_bytes + 8) + self.count * self.size * (32 * sectors + 8)


def workloads(device: str, small: bool) -> list[Workload]:
    """The tables of lookups and updates on a device; `small` ones only show that everything works."""
    if small:
        return [Workload(1000, 40, 700, ZIPF)]
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


def bags(device: str, small: bool) -> list[Bags]:
    if small:
        return [Bags(2000, 64, 50, 20)]
    if device == "cpu":
        return [Bags(1_000_000, 64, 16384, 20)]
    return [Bags(10_000_000, 128, 65536, 20), Bags(10_000_000, 64, 65536, 20)]


def groupings(small: bool) -> list[Workload]:
    """Ids that are grouped by their rows: only their number and that of the rows matter."""
    if small:
        return [Workload(3000, 64, count) for count in (64, 512)]
    return [Workload(10_000_000, 64, count) for count in (512, 2048, 16384, 65536, 131_072, 262_144, 1_048_570)]


def small_calls(small: bool) -> list[Workload]:
    """Calls whose launches take longer than their work."""
    rows = 1000 if small else 100_000
    return [Workload(rows, 128, count) for count in (1, 8, 64, 512)]


def huge(small: bool) -> list[tuple[Workload, int]]:
    """Tables that fit on one GPU at a few bits a weight only, and the bits of their counters."""
    if small:
        return [(Workload(5000, 128, 400, POWER_LAW), 8), (Workload(4000, 160, 300), 2)]
    return [(Workload(2**28, 128, 1_048_570, POWER_LAW), 8), (Workload(320_000_000, 160, 262_144), 2)]  # 51.2e9 weights


class Data:
    """Ids and gradients of a workload, in NumPy; frontends copy them, and make tables of random bits themselves."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.ids = workload.draw()
        self.unique = statistics.fmean(np.unique(ids).size for ids in self.ids)

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


@lru_cache(maxsize=32)
def data_of(workload: Workload) -> Data:
    """The same ids for lookups and updates in both frontends, drawn once."""
    return Data(workload)
