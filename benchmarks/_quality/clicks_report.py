"""From the lines of results.jsonl to rows, a Markdown table and a picture of the task "clicks"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from _quality.clicks_variants import DEFAULTS, PASSES, RATES, SPARSE_ADAM, TASK
from _quality.report import Record, choose_runs, runs_of_best
from _quality.variants import ADAGRAD, BASELINES, BYTES, PROJECTION, RULES, Family

_TITLES = {
    BASELINES: "what else there is",
    RULES: "counters, `eta` chosen",
    PROJECTION: "wide rows behind a trained projection",
    BYTES: "narrow fp32 rows, Adagrad",
    DEFAULTS: "what the library does if nothing is given",
    RATES: "the rate of the scales",
    PASSES: "a second pass over the data",
}


@dataclass(frozen=True)
class ClickRow:
    """The chosen candidate of a family over its seeds.

    Attributes:
        options: of the chosen candidate.
        runs: seeds that ended.
        candidates: how many there were to choose from.
        at_edge: the chosen value is the first or last of its grid.
        chosen_on: AUC on the part on which the candidate was chosen, mean of the seeds.
        auc: AUC on the last tenth, mean of the seeds.
        spread: sample standard deviation of the seeds' AUC; None for one seed.
        difference: AUC less that of the better fp32 table in the same run.
        training_bytes, served_bytes: for each row, with everything that a row has in training and after it.
        seconds: mean time of a run, among other runs on the same device.
    """

    group: str
    name: str
    options: str
    runs: int
    candidates: int
    at_edge: bool
    chosen_on: float
    auc: float
    spread: float | None
    difference: float | None
    training_bytes: float
    served_bytes: float
    seconds: float


def make_click_rows(records: Iterable[Record], families: list[Family]) -> list[ClickRow]:
    """Rows in the order of `families`. The better fp32 table is followed by what becomes of it after training."""
    by_family: dict[str, list[Record]] = {}
    for record in records:
        if record.get("task") == TASK and "error" not in record:
            by_family.setdefault(record["family"], []).append(record)
    fp32 = runs_of_best([by_family.get(name, []) for name in (ADAGRAD, SPARSE_ADAM)])
    best = fmean(_aucs(fp32)) if fp32 else None
    rows = []
    for family in families:
        found = by_family.get(family.name, [])
        chosen, values = choose_runs(found, family.grid)
        if not chosen:
            continue
        first = chosen[0]
        common = {
            "group": family.group,
            "candidates": len({record["variant"] for record in found}),
            "at_edge": bool(values) and first["options"][family.grid] in (values[0], values[-1]),
            "training_bytes": first["training_bytes"] / first["rows"],
            "seconds": fmean(record["seconds"] for record in chosen),
        }
        rows.append(_row(chosen, best, name=family.name, options=first["variant"], size=first["served_bytes"] / first["rows"], **common))
        if chosen == fp32:
            for what, after in first["finished"].items():
                runs = [record["finished"][what] for record in chosen]
                options, size = f"{family.name}, {first['variant']}", after["served_bytes"] / first["rows"]
                rows.append(_row(runs, best, name=f"{what} of the finished fp32 table", options=options, size=size, **common))
    return rows


def _row(runs: list[Record], best: float | None, size: float, **options: Any) -> ClickRow:
    """`runs` hold losses, `options` the rest of the row."""
    found = _aucs(runs)
    return ClickRow(
        runs=len(runs),
        chosen_on=fmean(1 - record["selection"] for record in runs),
        auc=fmean(found),
        spread=stdev(found) if len(found) > 1 else None,
        difference=None if best is None else fmean(found) - best,
        served_bytes=size,
        **options,
    )


def _aucs(runs: list[Record]) -> list[float]:
    return [1 - record["report"] for record in runs]


# ---- output ------------------------------------------------------------------------------------------------------------------------------

_COLUMNS = ("input table", "setting", "seeds", "AUC", "- best fp32", "AUC chosen on", "training B a row", "served B a row", "s a run")


def click_markdown(rows: list[ClickRow]) -> str:
    """A table for each group."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += [f"### Clicks: {_TITLES[group]}", ""]
        lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|---|" + "--:|" * (len(_COLUMNS) - 2)]
        lines += [_line(row) for row in rows if row.group == group] + [""]
    return "\n".join(lines)


def _line(row: ClickRow) -> str:
    cells = [
        row.name,
        row.options + (" (at the edge of its grid)" if row.at_edge else ""),
        str(row.runs),
        f"{row.auc:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}"),
        "" if row.difference is None else f"{round(row.difference, 4) + 0.0:+.4f}",  # no -0.0000
        f"{row.chosen_on:.4f}",
        *(f"{size:.4g}" for size in (row.training_bytes, row.served_bytes)),
        f"{row.seconds:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def click_plot(path: Path, rows: list[ClickRow]) -> None:
    """AUC against bytes of a row in training, and after it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    markers = {BASELINES: "s", RULES: "o", PROJECTION: "D", BYTES: "x"}
    shown = [row for row in rows if row.group in markers]
    if not shown:
        return
    figure, axes = plt.subplots(1, 2, figsize=(15, 5.5), layout="constrained", sharey=True)
    for axis, size, label in zip(axes, ("training_bytes", "served_bytes"), ("in training", "served"), strict=True):
        for group, marker in markers.items():
            points = [row for row in shown if row.group == group]
            if points:
                x, y = [getattr(row, size) for row in points], [row.auc for row in points]
                axis.errorbar(x, y, [row.spread or 0.0 for row in points], fmt=marker, label=_TITLES[group].replace("`", ""), alpha=0.8)
        for row in shown:
            axis.annotate(row.name, (getattr(row, size), row.auc), xytext=(4, 4), textcoords="offset points", fontsize=6)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title="Clicks", xlabel=f"bytes a row, {label}", ylabel="AUC")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
