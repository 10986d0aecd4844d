"""Train the same models with different input tables and compare how good they get.

    python benchmarks/quality.py --device cuda --frontend torch --data text.npz --out results

The file has two integer arrays, `train` and `valid`: token ids of a text. Hyper-parameters are chosen on the first half of `valid`, and all
of it is reported, the second half beside it. See docs/quality.md for the method. Writes to the output folder:

    results.jsonl   a line for each run, as soon as it has ended
    quality.md      the tables
    quality.json    the same with all numbers
    quality.png     perplexity against bits a weight in training

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

from _quality import report
from _quality.data import load, tasks
from _quality.plan import Plan, Pool, Setup
from _quality.variants import FP32, Family, ordered


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    sizes = tasks(options.small, options.steps)
    everything = ordered({name: task.width for name, task in sizes.items()}, jax=False)
    families = choose(ordered({name: task.width for name, task in sizes.items()}, jax=options.frontend == "jax"), options.only)
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
    rows = report.make_rows(records, everything, sizes)
    failed = [record for record in records if "error" in record]
    text = report.markdown(rows, failed)
    (options.out / "quality.md").write_text(text)
    report.write_json(options.out / "quality.json", rows, facts(options, complete, time.monotonic() - start))
    report.plot(options.out / "quality.png", rows)
    print(f"\n{text}\n{len(records)} runs in {time.monotonic() - start:.0f} s" + ("" if complete else "; NOT all that were planned"))
    return 1 if failed or not records else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="where to train")
    parser.add_argument("--frontend", choices=("torch", "jax"), default="torch", help="default: %(default)s; jax runs a part of the tables")
    parser.add_argument("--data", type=Path, required=True, help=".npz file with integer arrays 'train' and 'valid'")
    parser.add_argument("--out", type=Path, default=Path("quality-out"), help="folder for the results (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=510, help="begin no run that would end after so many seconds (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=None, help="processes that share a device (default: 7 on a GPU, 1 on the CPU)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to spread the processes over (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a chosen setting (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="steps of a run (default: 2500, with --small 20)")
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
    try:
        re.compile(options.only or "")
        load(options.data, 1)
    except re.error as error:
        parser.error(f"--only is not a regular expression: {error}")
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    return options


def choose(families: list[Family], pattern: str | None) -> list[Family]:
    """The families that match, and fp32 of their tasks."""
    if pattern is None:
        return families
    matching = [family for family in families if re.search(pattern, f"{family.task} {family.name}")]
    needed = {family.task for family in matching}
    return [family for family in families if family in matching or (family.name in FP32 and family.task in needed)]


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
