"""How a test runs the checks, in processes of their own, and what it makes of the reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def check(world: int, device: str, folder: Path) -> None:
    """Raise AssertionError unless every check and every script succeeds on every one of `world` ranks.

    Args:
        world: the number of ranks.
        device: "cpu", or "cuda" with a GPU for every rank.
        folder: an empty one for the reports and whatever else the ranks write.
    """
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "PYTHONPATH": path}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the scripts take GPUs where there are any
    strict = ["-W", "error"] if device == "cpu" else []  # what NCCL warns of differs between releases
    command = [sys.executable, *strict, "-m", "ranks.run", str(world), str(folder), device]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True, check=False)
    reports = {}
    for rank in range(world):
        file = folder / f"{rank}.json"
        reports[rank] = json.loads(file.read_text()) if file.exists() else {"failure": "no report"}
    failures = [f"rank {rank}, {name}: {said}" for rank, report in reports.items() for name, said in report.items() if said != "ok"]
    assert not failures, "\n".join([*failures, done.stderr[-2000:]])
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = set((folder / "names").read_text().split())
    assert all(set(report) == wanted for report in reports.values())
