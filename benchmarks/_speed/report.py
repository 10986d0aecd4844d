"""From measurements to rows with ratios, a Markdown table and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _speed.workloads import DTYPES

_LEGEND = (
    "Medians in microseconds. / floor: over the time in which the device copies as many bytes as have to move; for peers, what a packed "
    "table without counters has to move. / peer: over the fastest peer with the same frontend, direction and dtype."
)
_COLUMNS = ("frontend", "direction", "operation")


@dataclass
class Row:
    """One case in one dtype.

    Attributes:
        bytes: what has to move.
        floor_us: the time in which the device copies as much.
        times_us: samples of the time of a call; empty if the measurement failed.
        median_us: their median.
        floor_ratio: median over floor.
        peer_ratio: median over that of the fastest peer with the same workload, frontend, direction and dtype.
        fastest_peer: the name of that peer.
        error: why there is no time.
    """

    workload: str
    frontend: str
    direction: str
    operation: str
    dtype: str
    peer: bool
    bytes: float
    floor_us: float
    times_us: list[float]
    median_us: float | None = None
    floor_ratio: float | None = None
    peer_ratio: float | None = None
    fastest_peer: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.times_us:
            self.median_us = median(self.times_us)
            self.floor_ratio = self.median_us / self.floor_us

    def __str__(self) -> str:
        what = f"{self.workload}, {self.frontend}, {self.direction}, {self.dtype}: {self.operation}"
        if self.median_us is None:
            return f"{what}: FAILED: {self.error}"
        return f"{what}: {self.median_us:.1f} us, {self.floor_ratio:.2f} x floor"


def compare(rows: list[Row]) -> None:
    """Fill in the ratios to the fastest peers."""
    fastest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.workload, row.frontend, row.direction, row.dtype)
        if row.peer and row.median_us and (key not in fastest or row.median_us < (fastest[key].median_us or 0)):
            fastest[key] = row
    for row in rows:
        peer = fastest.get((row.workload, row.frontend, row.direction, row.dtype))
        if peer is not None and row.median_us and peer.median_us:
            row.peer_ratio, row.fastest_peer = row.median_us / peer.median_us, peer.operation


def markdown(rows: list[Row], failures: Iterable[str], facts: dict[str, Any]) -> str:
    """The device, a table for each workload, and a line for each failure."""
    device = facts["device"] + (f", driver {facts['driver']}" if facts["driver"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{device}; Python {facts['python']}, {versions}", "", f"`{facts['command']}`", ""]
    if "copy" in facts:
        copy = facts["copy"]
        lines += [f"A copy of {copy['bytes'] / 1e6:.0f} MB (bytes read and written), with {copy['frontend']}: {copy['gb_s']:.1f} GB/s.", ""]
    lines += [_LEGEND, *(f"\nSlower path in use: {text}" for text in facts["fallbacks"])]
    for workload in dict.fromkeys(row.workload for row in rows):
        lines += ["", f"### {workload}", "", *_table([row for row in rows if row.workload == workload])]
    errors = [*failures, *(str(row) for row in rows if row.error is not None)]
    lines += ["", "Not measured:", "", *(f"- {error}" for error in errors)] if errors else []
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    names = [*_COLUMNS, *(name for dtype in DTYPES for name in (dtype, "/ floor", "/ peer"))]
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|" + "--:|" * (3 * len(DTYPES))]
    found = {(row.frontend, row.direction, row.operation, row.dtype): row for row in rows}
    for frontend, direction, operation in dict.fromkeys(key[:3] for key in found):
        cells = [frontend, direction, operation]
        for dtype in DTYPES:
            cells += _cells(found.get((frontend, direction, operation, dtype)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cells(row: Row | None) -> list[str]:
    if row is None or row.median_us is None:
        return ["failed" if row else "", "", ""]
    time = f"{row.median_us:.1f}" if row.median_us < 1000 else f"{row.median_us:.0f}"
    return [time, *("" if ratio is None else f"{ratio:.2f}" for ratio in (row.floor_ratio, row.peer_ratio))]


def write_json(path: Path, rows: list[Row], failures: list[str], facts: dict[str, Any]) -> None:
    """Rows, failures, and what the run was, as one JSON object."""
    path.write_text(json.dumps({**facts, "failures": failures, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
