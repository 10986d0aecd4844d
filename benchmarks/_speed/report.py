"""From measurements to rows with ratios, Markdown tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _speed.workloads import DTYPES

_LEGEND = (
    "Medians in microseconds. / floor: over the time in which the device copies as many bytes as have to move; for peers, what a packed "
    "table without counters has to move. / peer: over the fastest peer with the same workload, frontend and dtype."
)

#: what names of updates begin with, before the rule
_OPTAX, _FUSED, _STEP = "dualbin.jax.grad, xor, optax.apply_updates, ", "dualbin.jax.xor_update, ", "dualbin.torch.XOR.step, "


@dataclass
class Row:
    """One case in one dtype.

    Attributes:
        bytes: what has to move; 0 where there is no floor.
        floor_us: the time in which the device copies as much.
        times_us: samples of the time of a call; empty if the measurement failed.
        median_us: their median.
        floor_ratio: median over floor.
        peer_ratio: median over that of the fastest peer with the same workload, frontend, direction and dtype.
        fastest_peer: the name of that peer.
        memory: bytes allocated at most, where that was asked.
        error: why there is no time.
        skipped: whether that is no failure.
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
    memory: int | None = None
    error: str | None = None
    skipped: bool = False

    def __post_init__(self) -> None:
        if self.times_us:
            self.median_us = median(self.times_us)
            self.floor_ratio = self.median_us / self.floor_us if self.floor_us else None

    @property
    def failed(self) -> bool:
        return self.error is not None and not self.skipped

    def __str__(self) -> str:
        what = f"{self.workload}, {self.frontend}, {self.direction}, {self.dtype}: {self.operation}"
        if self.median_us is None:
            return f"{what}: {'skipped' if self.skipped else 'FAILED'}: {self.error}"
        ratio = "" if self.floor_ratio is None else f", {self.floor_ratio:.2f} x floor"
        memory = "" if self.memory is None else f", {self.memory / 1e9:.1f} GB"
        return f"{what}: {self.median_us:.1f} us{ratio}{memory}"


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
    """The device, a table for each direction, what else was found, and a line for each failure."""
    device = facts["device"] + (f", driver {facts['driver']}" if facts["driver"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{device}; Python {facts['python']}, {versions}", "", f"`{facts['command']}`", ""]
    if "copy" in facts:
        copy = facts["copy"]
        lines += [f"A copy of {copy['bytes'] / 1e6:.0f} MB (bytes read and written), with {copy['frontend']}: {copy['gb_s']:.1f} GB/s.", ""]
    absent = [] if "fbgemm_gpu" in facts["versions"] else ["\nNot among the peers, as it is not installed: FBGEMM."]
    lines += [_LEGEND, *absent, *(f"\nSlower path in use: {text}" for text in facts["fallbacks"])]
    for direction in dict.fromkeys(row.direction for row in rows):
        members = [row for row in rows if row.direction == direction]
        lines += ["", f"### {direction[0].upper()}{direction[1:]}", "", *_table(members)]
    lines += _launches(facts.get("launches", []))
    lines += _beside(rows)
    errors = [*failures, *(str(row) for row in rows if row.error is not None)]
    lines += ["", "Not measured:", "", *(f"- {error}" for error in errors)] if errors else []
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    dtypes = [dtype for dtype in DTYPES if any(row.dtype == dtype for row in rows)]
    memory = any(row.memory for row in rows)
    names = ["workload", "frontend", "operation", *(name for dtype in dtypes for name in (dtype, "/ floor", "/ peer"))]
    lines = ["| " + " | ".join([*names, *(["GB"] if memory else [])]) + " |", "|---|---|---|" + "--:|" * (3 * len(dtypes) + memory)]
    found = {(row.workload, row.frontend, row.operation, row.dtype): row for row in rows}
    for workload in dict.fromkeys(key[0] for key in found):
        for frontend, operation in dict.fromkeys(key[1:3] for key in found if key[0] == workload):
            members = [found.get((workload, frontend, operation, dtype)) for dtype in dtypes]
            cells = [workload, frontend, operation, *(cell for row in members for cell in _cells(row))]
            if memory:
                most = max((row.memory or 0 for row in members if row), default=0)
                cells.append(f"{most / 1e9:.1f}" if most else "")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cells(row: Row | None) -> list[str]:
    if row is None or row.median_us is None:
        return ["" if row is None else "skipped" if row.skipped else "failed", "", ""]
    return [_time(row.median_us), *("" if ratio is None else f"{ratio:.2f}" for ratio in (row.floor_ratio, row.peer_ratio))]


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 1000 else f"{microseconds:.0f}"


def _launches(launches: list[dict[str, Any]]) -> list[str]:
    if not launches:
        return []
    lines = ["", "### Launches of XOR.step", "", "| workload | kernels | copies and fills | names |", "|---|--:|--:|---|"]
    for found in launches:
        lines.append(f"| {found['workload']} | {found['kernels']:g} | {found['copies']:g} | {', '.join(found['names'])} |")
    return lines


def _beside(rows: list[Row]) -> list[str]:
    """JAX over PyTorch, and the updates of optax over the fused ones."""
    lines = []
    for row, other in pairs(rows):
        difference = row.median_us - other.median_us
        cells = [row.workload, row.dtype, row.operation, _time(row.median_us), other.operation, _time(other.median_us)]
        lines.append("| " + " | ".join([*cells, f"{row.median_us / other.median_us:.2f}", f"{difference:+.1f}"]) + " |")
    if not lines:
        return []
    head = "| workload | dtype | operation | us | beside | us | ratio | difference |"
    return ["", "### JAX beside PyTorch, optax beside the fused update", "", head, "|---|---|---|--:|---|--:|--:|--:|", *lines]


def pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Measured operations of JAX, each with the one that it should be as fast as."""
    found = {(row.workload, row.dtype, row.direction, row.operation): row for row in rows if row.median_us is not None}
    for key, row in found.items():
        other = found.get((*key[:3], counterpart(row.operation)))
        if other is not None:
            yield row, other


def counterpart(operation: str) -> str:
    """What an operation of JAX is set beside, that of PyTorch or the fused one of JAX; "" if it is none of dualbin's."""
    for mine, other in ((_OPTAX, _FUSED), (_FUSED, _STEP)):
        if operation.startswith(mine):
            return other + operation.removeprefix(mine)
    return "dualbin.torch.lookup" if operation == "dualbin.jax.lookup" else ""


def write_json(path: Path, rows: list[Row], failures: list[str], facts: dict[str, Any]) -> None:
    """Rows, failures, and what the run was, as one JSON object with a line for each row."""
    head = json.dumps({**facts, "failures": failures}, indent=1)
    lines = ",\n".join("  " + json.dumps(_rounded(asdict(row))) for row in rows)
    whole = head.removesuffix("\n}") + ',\n "rows": [\n' + lines + "\n ]\n}\n"
    fresh = path.with_suffix(".part")  # a run that is ended while it writes leaves the file before
    fresh.write_text(whole)
    fresh.replace(path)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "times_us": [round(time, 3) for time in row["times_us"]]}
