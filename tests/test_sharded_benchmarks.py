"""benchmarks/sharded_jax.py and largest.py with tiny tables, as a user calls them; tests/ranks/benchmark.py has sharded.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(root: Path, script: str, out: Path, *arguments: str, **environment: str) -> Any:
    command = [sys.executable, str(root / "benchmarks" / script), *arguments, "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_jax(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    found = run(root, "sharded_jax.py", tmp_path / "out.json", "--small", **flags)
    assert found["facts"]["devices"] == 2
    results = {result["name"]: result for result in found["results"]}
    assert all(result["ms"] > 0 for result in results.values())
    assert "reduce-scatter u32[512,5]" in results["lookup, uniform"]["collectives"]  # packed: 16 bytes of bits and 4 of the scale
    assert {"lookup, 1/rank", "forward, backward and step, uniform", "forward, backward and step, 1/rank"} <= results.keys()


@pytest.mark.slow
def test_the_largest_table_is_read_by_half_as_many_ranks(root: Path, tmp_path: Path) -> None:
    if not importlib.util.find_spec("torch"):
        pytest.skip("needs torch")
    arguments = ["--device", "cpu", "--ranks", "2", "--rows", "5001", "--steps", "2", "--ids", "300", "--folder", str(tmp_path / "saved")]
    found = run(root, "largest.py", tmp_path / "out.json", *arguments, OMP_NUM_THREADS="1")
    assert found["equal"] is True
    assert (found["train"]["ranks"], found["read"]["ranks"]) == (2, 1)
    assert found["weights"] == 5001 * 128
    assert not (tmp_path / "saved").exists()
