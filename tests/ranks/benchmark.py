"""benchmarks/sharded.py with tiny tables, on the ranks that are here already."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from ranks.support import device

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sharded.py"


def the_benchmark_measures_and_counts(rank: int, world: int) -> None:
    spec = importlib.util.spec_from_file_location("sharded_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = Path(os.environ["RANKS_FOLDER"], "sharded.json")
    command = ["sharded.py", "--device", device().type, "--ranks", str(world), "--small", "--out", str(out)]
    with patch.object(sys, "argv", command), patch.multiple(script, WARM_UP=1, SAMPLES=1, CALLS=2):
        run = script.Run(script.parse(), device())
        run.all_cases()
        if rank == 0:
            run.report()
    if rank:
        return
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    assert all(result["ms"] > 0 for result in results.values() if "ms" in result)
    cases = [
        "sharded forward, eager, uniform",
        "sharded forward, eager, 1/rank",
        "sharded bags of 16, step, eager",
        "nn.Embedding under DDP",
    ]
    cases += ["replicas, step with shard_state", "sharded forward, captured" if device().type == "cuda" else "captured"]
    assert all(any(name.startswith(case) for name in results) for case in cases), list(results)
    forward = results["sharded forward, eager, uniform"]
    assert forward["collectives"] == 3  # numbers, ids, rows
    assert 0 < forward["share_of_fp32_rows"] < 1 / 12
    assert results["sharded forward, eager, 1/rank"]["sent_bytes"] < forward["sent_bytes"]
