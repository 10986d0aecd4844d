"""A picture of a run: time over floor, a bar for each operation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _speed.cases import BAG, FORWARD, STEP, UPDATE

_SHOWN = (FORWARD, UPDATE, BAG, STEP)
_DTYPE = "fp32"
_OURS, _PEER, _FLOOR = "#1f77b4", "#b0b0b0", "black"


def plot(source: Path, target: Path) -> int:
    """Draw the JSON file `source` as the PNG `target`; returns how many bars it has.

    Raises:
        ValueError: there is nothing in the file that could be drawn.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    run = json.loads(source.read_text())
    panels = _panels(run["rows"])
    if not panels:
        msg = f"{source} has no measurement in {_DTYPE} with a floor"
        raise ValueError(msg)
    columns = 2
    lines = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(len(rows) for _, rows in line) + 3.5 for line in lines]
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(15, 0.24 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        _panel(axis, title, rows)
    figure.suptitle(f"{run['device']}: time / time of a copy of the bytes that have to move ({_DTYPE}; shorter is better)")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80)
    plt.close(figure)
    return sum(len(rows) for _, rows in panels)


def _panels(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Titles and rows: for each workload lookups and updates side by side; those of a table that has both in a step in one panel."""
    shown = [row for row in rows if row["dtype"] == _DTYPE and row["floor_ratio"] and row["direction"] in _SHOWN]
    whole = {row["workload"] for row in shown if row["direction"] == STEP}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in shown:
        found.setdefault((row["workload"], STEP if row["workload"] in whole else row["direction"]), []).append(row)
    workloads = list(dict.fromkeys(workload for workload, _ in found))
    keys = [(workload, direction) for workload in workloads for direction in _SHOWN if (workload, direction) in found]
    return [(f"{direction}: {workload}", found[workload, direction]) for workload, direction in keys]


def _panel(axis: Any, title: str, rows: list[dict[str, Any]]) -> None:
    names = [_name(row) for row in rows]
    ratios = [row["floor_ratio"] for row in rows]
    bars = axis.barh(names, ratios, color=[_PEER if row["peer"] else _OURS for row in rows])
    axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
    axis.axvline(1, linewidth=1, color=_FLOOR)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(lambda _value, _place: "")
    axis.set_xlim(min(0.8, *ratios), 2.0 * max(2.0, *ratios))
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(title.replace(": ", "\n", 1), fontsize=9, loc="left")


def _name(row: dict[str, Any]) -> str:
    name = row["operation"].removeprefix("dualbin.").replace(", a gradient that the caller holds", ", copied gradient")
    return f"{name}: {STEP}" if row["direction"] == STEP else name
