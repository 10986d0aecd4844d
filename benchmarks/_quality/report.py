"""From the lines of results.jsonl to rows, a Markdown table, JSON and a picture."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from _quality.data import Task, tasks
from _quality.variants import ADAM, BASELINES, BYTES, FP32, PROJECTION, RULES, SWEEPS, WINDOWS, Family, finished, simulated_ratio

Record = dict[str, Any]

_TITLES = {
    BASELINES: "What else there is",
    RULES: "Update rules with their defaults",
    PROJECTION: "A trained D x D projection behind the table",
    WINDOWS: "Evidence of several steps before a flip (`every`)",
    BYTES: "Narrow tables with a projection, for the same bytes",
    SWEEPS: "The settings of the simulation",
}


@dataclass(frozen=True)
class Row:
    """The chosen candidate of a family over its seeds.

    Attributes:
        options: of the chosen candidate.
        runs: seeds that ended.
        candidates: how many there were to choose from.
        at_edge: the chosen rate is the first or last of its grid.
        selection: perplexity on the first half of the held-out text, seed 0.
        perplexity: on the whole held-out text: exp of the mean loss of the seeds.
        spread: sample standard deviation of the seeds' perplexities; None for one seed.
        ratio: perplexity over that of the better fp32 table in the same run and frontend.
        ratio_spread: the same standard deviation over fp32's perplexity.
        second_half: the ratio on the second half of the text, on which nothing was chosen.
        simulated: the ratio of the simulation, to fp32 Adam.
        state_bits: bits a weight that training keeps beyond the one packed bit, without scales.
        scale_bits: the same of the scales and what trains them.
        training_bits: all of the table in training: weights, state, scales.
        served_bytes: bytes that are needed to look rows up after training.
        seconds: mean time of a run, among other runs on the same device.
    """

    frontend: str
    task: str
    group: str
    name: str
    options: str
    runs: int
    candidates: int
    at_edge: bool
    selection: float
    perplexity: float
    spread: float | None
    ratio: float | None
    ratio_spread: float | None
    second_half: float | None
    simulated: float | None
    state_bits: float
    scale_bits: float
    training_bits: float
    served_bytes: int
    seconds: float


def read(path: Path) -> list[Record]:
    """The lines of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_rows(records: Iterable[Record], families: list[Family], sizes: dict[str, Task]) -> list[Row]:
    """Rows in the order of `families`, for every frontend that has results."""
    by_family: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "error" not in record:
            by_family[record["frontend"], record["task"], record["family"]].append(record)
    rows = []
    for frontend in sorted({key[0] for key in by_family}, reverse=True):
        fp32 = {name: runs_of_best([by_family[frontend, name, family] for family in FP32]) for name in sizes}
        for family in families:
            found = by_family[frontend, family.task, family.name]
            chosen, rates = choose_runs(found, family.grid)
            if not chosen:
                continue
            best = fp32[family.task]
            row = _row(family, sizes[family.task], chosen, best, len({record["variant"] for record in found}), rates)
            rows.append(row)
            if chosen == best:
                rows += [_finished(kind, row, chosen, best) for kind in chosen[0].get("finished", ())]
    return rows


def choose_runs(records: list[Record], grid: str | None) -> tuple[list[Record], list[float]]:
    """The runs of the candidate with the least loss of selection with seed 0, and the values of the grid."""
    first = [record for record in records if record["seed"] == 0]
    if not first:
        return [], []
    best = min(first, key=lambda record: record["selection"])
    rates = sorted(record["options"][grid] for record in first) if grid else []
    return sorted((record for record in records if record["variant"] == best["variant"]), key=lambda record: record["seed"]), rates


def runs_of_best(families: list[list[Record]]) -> list[Record]:
    """Of several families, the runs of the one whose chosen candidate is best on what it was chosen on; or none."""
    chosen = [runs for runs, _ in (choose_runs(records, None) for records in families) if runs]
    return min(chosen, key=lambda runs: fmean(record["selection"] for record in runs), default=[])


def _second_half(runs: list[Record]) -> list[float]:
    """The losses of the seeds."""
    return [record["report"] for record in runs]


def _whole(runs: list[Record]) -> list[float]:
    """The same on both halves, which are equally long."""
    return [0.5 * (record["selection"] + record["report"]) for record in runs]


def _row(family: Family, task: Task, chosen: list[Record], fp32: list[Record], candidates: int, rates: list[float]) -> Row:
    first, weights = chosen[0], task.vocabulary * task.width
    largest = {part: max(record[f"{part}_bytes"] for record in chosen) for part in ("weights", "rule", "scale", "served")}
    bits = {part: 8 * size / weights for part, size in largest.items()}
    return Row(
        frontend=first["frontend"],
        task=family.task,
        group=family.group,
        name=family.name,
        options=first["variant"],
        runs=len(chosen),
        candidates=candidates,
        at_edge=bool(rates) and first["options"][family.grid] in (rates[0], rates[-1]),
        **_quality(chosen, fp32),
        simulated=_simulated(family, task, first["options"]),
        state_bits=bits["weights"] + bits["rule"] - 1,
        scale_bits=bits["scale"],
        training_bits=bits["weights"] + bits["rule"] + bits["scale"],
        served_bytes=largest["served"],
        seconds=fmean(record["seconds"] for record in chosen),
    )


def _quality(runs: list[Record], fp32: list[Record]) -> dict[str, Any]:
    """What a row says about how good a table is; `fp32` are the runs that it is compared with."""
    perplexity, spread = _mean_and_spread(_whole(runs))
    found = {"selection": math.exp(runs[0]["selection"]), "perplexity": perplexity, "spread": spread}
    if not fp32:
        return found | {"ratio": None, "ratio_spread": None, "second_half": None}
    unit = math.exp(fmean(_whole(fp32)))
    return found | {
        "ratio": perplexity / unit,
        "ratio_spread": None if spread is None else spread / unit,
        "second_half": math.exp(fmean(_second_half(runs)) - fmean(_second_half(fp32))),
    }


def _simulated(family: Family, task: Task, options: dict[str, Any]) -> float | None:
    """The ratio of the simulation, which had the full size only."""
    if task != tasks()[task.name]:
        return None
    return 1.0 if family.name == ADAM else simulated_ratio(task.name, options)


def _finished(kind: str, row: Row, chosen: list[Record], fp32: list[Record]) -> Row:
    """The row of the table that is packed, as `kind`, when fp32 training is over."""
    simulated = kind == "signs" and row.task == "lm" and row.name == ADAM and row.simulated
    changes = {
        "name": finished(kind),
        "options": f"{row.name}, {row.options}",
        **_quality([record["finished"][kind] for record in chosen], fp32),
        "simulated": 1.259 if simulated else None,
        "served_bytes": chosen[0]["finished"][kind]["served_bytes"],
    }
    return Row(**(asdict(row) | changes))


def _mean_and_spread(losses: list[float]) -> tuple[float, float | None]:
    return math.exp(fmean(losses)), stdev(map(math.exp, losses)) if len(losses) > 1 else None


# ---- output ------------------------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    *("input table", "setting", "seeds", "perplexity", "/ best fp32", "second half", "simulation"),
    *("state", "scale", "training", "served MB", "s a run"),
)


def markdown(rows: list[Row]) -> str:
    """A table for each frontend, task and group."""
    sections: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        sections[row.frontend, row.task, row.group].append(row)
    lines = []
    for (frontend, task, group), members in sections.items():
        name = "Language model" if task == "lm" else "Skip-gram"
        lines += [f"### {name}, {frontend}: {_TITLES[group][0].lower()}{_TITLES[group][1:]}", ""]
        lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|---|" + "--:|" * (len(_COLUMNS) - 2)]
        lines += [_line(row) for row in members] + [""]
    return "\n".join(lines)


def failures(failed: list[Record]) -> str:
    """A list of the runs that did not end well; empty if there are none."""
    if not failed:
        return ""
    lines = [f"- {record.get('task')} {record.get('family')} ({record.get('variant')}): {record['error']}" for record in failed]
    return "\n".join(["Failed runs:", "", *lines, ""])


def _line(row: Row) -> str:
    setting = row.options + (" (at the edge of its grid)" if row.at_edge else "")
    cells = [
        row.name,
        setting,
        str(row.runs),
        f"{row.perplexity:.2f}" + ("" if row.spread is None else f" ± {row.spread:.2f}"),
        "" if row.ratio is None else f"{row.ratio:.3f}" + ("" if row.ratio_spread is None else f" ± {row.ratio_spread:.3f}"),
        "" if row.second_half is None else f"{row.second_half:.3f}",
        "" if row.simulated is None else f"{row.simulated:.3f}",
        *(f"{bits:.3g}" for bits in (row.state_bits, row.scale_bits, row.training_bits)),
        f"{row.served_bytes / 1e6:.3f}",
        f"{row.seconds:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def write_json(path: Path, rows: list[Row], clicks: list[Any], facts: dict[str, Any]) -> None:
    """Rows of the text tasks and of clicks, and what the run was, as one JSON object."""
    tables = {name: [asdict(row) for row in members] for name, members in (("rows", rows), ("clicks", clicks))}
    path.write_text(json.dumps({**facts, **tables}, indent=1) + "\n")


def plot(path: Path, rows: list[Row]) -> None:
    """Quality against training bits a weight: one panel for each task and frontend."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.ratio is not None and row.name not in FP32]
    panels = list(dict.fromkeys((row.task, row.frontend) for row in shown))
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 5.5), squeeze=False, layout="constrained")
    markers = {BASELINES: "s", RULES: "o", PROJECTION: "D", WINDOWS: "^", BYTES: "x", SWEEPS: "."}
    for axis, (task, frontend) in zip(axes[0], panels, strict=True):
        members = [row for row in shown if (row.task, row.frontend) == (task, frontend)]
        for group, marker in markers.items():
            points = [row for row in members if row.group == group]
            if not points:
                continue
            x, y = [row.training_bits for row in points], [row.ratio for row in points]
            error = None if group == BYTES else [row.ratio_spread or 0.0 for row in points]
            axis.errorbar(x, y, error, fmt=marker, label=_TITLES[group].replace("`", ""), alpha=0.8)
            if group in (BASELINES, RULES):
                for row in points:
                    side, shift = ("right", -4) if row.training_bits > 48 or "planes" in row.name else ("left", 4)
                    place = (row.training_bits, row.ratio)
                    axis.annotate(row.name, place, xytext=(shift, 4), textcoords="offset points", fontsize=7, ha=side)
        axis.axhline(1, linewidth=0.8, color="gray")
        axis.set_xscale("log", base=2)
        name = "Language model" if task == "lm" else "Skip-gram"
        axis.set(title=f"{name}, {frontend}", xlabel="bits a weight in training (table and state)", ylabel="perplexity / that of fp32")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
