"""Train the same models with different input tables and compare how good they get.

    python benchmarks/quality.py --device cuda --data text.npz --out results
    python benchmarks/quality.py --device cuda --task clicks --out results

The first line trains on a text: the file has two integer arrays, `train` and `valid`, of token ids. Hyper-parameters are chosen on the
first half of `valid`, and all of it is reported, the second half beside it. The second line predicts late flights, as one predicts clicks:
the data is fetched with pip once and kept; `--data` takes that file on a machine without network. See docs/quality.md for the method.
Writes to the output folder:

    results.jsonl   a line for each run, as soon as it has ended
    quality.md      the tables
    quality.json    the same with all numbers
    quality.png     perplexity against bits a weight in training
    clicks.png      AUC against bytes a row

A later run with the same output folder replaces the results of the tables that it runs in its frontend, and keeps all others.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _quality import flights, report
from _quality.clicks import ClickTask, click_tasks
from _quality.clicks_report import click_markdown, click_plot, make_click_rows
from _quality.clicks_variants import click_families
from _quality.data import Task, load, tasks
from _quality.plan import Plan, Pool, Setup
from _quality.variants import Family, ordered


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    sizes: dict[str, Task] | dict[str, ClickTask] = click_tasks(options.small)
    if options.task == "text":
        sizes = tasks(options.small, options.steps)
    families = choose(planned(options.task, options.small, jax=options.frontend == "jax"), options.only)
    if not families:
        print(f"error: --only {options.only!r} matches no input table", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    keep_others(results, options.frontend, families)
    setup = Setup(options.frontend, options.device, options.data.resolve(), sizes, options.threads, options.gpus)
    pool = Pool(setup, options.workers, results, options.budget, start)
    complete = pool.run(Plan(families, options.seeds), lambda record: announce(record, time.monotonic() - start))
    records = report.read(results)
    failed = [record for record in records if "error" in record]
    text = write(options, records, failed, facts(options, complete, time.monotonic() - start))
    print(f"\n{text}\n{len(records)} runs in {time.monotonic() - start:.0f} s" + ("" if complete else "; NOT all that were planned"))
    return 1 if failed or not records else 0


def planned(task: str, small: bool, jax: bool = False) -> list[Family]:
    """All families of "text" or "clicks", most important first."""
    if task == "clicks":
        return click_families(click_tasks(small)["clicks"].width)
    return ordered({name: size.width for name, size in tasks(small).items()}, jax)


def write(options: argparse.Namespace, records: list[report.Record], failed: list[report.Record], of_run: dict[str, Any]) -> str:
    """Write the tables and pictures of all results in the output folder; returns the tables."""
    rows = report.make_rows(records, planned("text", options.small), tasks(options.small, options.steps))
    clicks = make_click_rows(records, planned("clicks", options.small))
    text = "\n".join(part for part in (report.markdown(rows), click_markdown(clicks), report.failures(failed)) if part)
    (options.out / "quality.md").write_text(text)
    report.write_json(options.out / "quality.json", rows, clicks, of_run)
    report.plot(options.out / "quality.png", rows)
    click_plot(options.out / "clicks.png", clicks)
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="where to train")
    parser.add_argument("--frontend", choices=("torch", "jax"), default="torch", help="default: %(default)s; jax runs a part of the tables")
    parser.add_argument("--task", choices=("text", "clicks"), default="text", help="default: %(default)s")
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help=f"text: .npz file with integer arrays 'train' and 'valid'; clicks: a copy of what is otherwise {flights.default_path()}",
    )
    parser.add_argument("--out", type=Path, default=Path("quality-out"), help="folder for the results (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=510, help="begin no run that would end after so many seconds (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes that share a device (default: 7 on a GPU, 1 on the CPU)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to spread the processes over (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a chosen setting (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="steps of a run on a text (default: 2500, with --small 20)")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that everything works")
    parser.add_argument("--only", default=None, help="regular expression on 'task name'; fp32 runs in any case, as the ratios need it")
    options = parser.parse_args(arguments)
    if options.workers is None:
        options.workers = 7 if options.device == "cuda" else 1
    for name in ("workers", "gpus", "threads", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.steps is not None and options.steps < 10:
        parser.error(f"--steps must be at least 10, got {options.steps}")
    if options.task == "clicks" and (options.frontend != "torch" or options.steps is not None):
        parser.error("--task clicks is for --frontend torch and without --steps: a run is one pass over the data")
    if options.task == "text" and options.data is None:
        parser.error("--task text needs --data: an .npz file with integer arrays 'train' and 'valid'")
    try:
        re.compile(options.only or "")
        options.data = read_data(options.task, options.data)
    except re.error as error:
        parser.error(f"--only is not a regular expression: {error}")
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    return options


def read_data(task: str, path: Path | None) -> Path:
    """Where the data is, which can be read; that of "clicks" is fetched if it is nowhere.

    Raises:
        OSError, ValueError: it cannot be read or fetched.
    """
    if task == "text":
        assert path is not None
        load(path, 1)
        return path
    path = flights.fetched() if path is None else path
    flights.load(path)
    return path


def choose(families: list[Family], pattern: str | None) -> list[Family]:
    """The families that match, and those that they are compared with."""
    if pattern is None:
        return families
    matching = [family for family in families if re.search(pattern, f"{family.task} {family.name}")]
    needed = {family.task for family in matching}
    return [family for family in families if family in matching or (family.reference and family.task in needed)]


def keep_others(results: Path, frontend: str, families: list[Family]) -> None:
    """Remove the results that a run of these families in this frontend replaces."""
    replaced = {(frontend, family.task, family.name) for family in families}
    records = report.read(results) if results.exists() else []
    kept = [record for record in records if (record["frontend"], record.get("task"), record.get("family")) not in replaced]
    results.write_text("".join(json.dumps(record) + "\n" for record in kept))


def announce(record: report.Record, elapsed: float) -> None:
    if "error" in record:
        outcome = f"FAILED: {record['error']}\n{record.get('traceback', '')}"
    else:
        outcome = f"loss {record['selection']:.4f} {record['report']:.4f}, {record['seconds']:.1f} s, {record['mode']}"
    what = " ".join(str(record[name]) for name in ("task", "family", "variant", "seed") if name in record)
    print(f"[{elapsed:4.0f} s] {what}: {outcome}", flush=True)


def facts(options: argparse.Namespace, complete: bool, seconds: float) -> dict[str, Any]:
    """What is needed to understand the numbers later."""
    versions = {}
    for package in ("dualbin", "torch", "jax", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {
        "settings": settings,
        "complete": complete,
        "seconds": round(seconds, 1),
        "device": device_name(options.device),
        "python": platform.python_version(),
        "versions": versions,
    }


def device_name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    try:
        import torch
    except ImportError:
        return device
    return torch.cuda.get_device_name() if torch.cuda.is_available() else device


if __name__ == "__main__":
    sys.exit(main())
