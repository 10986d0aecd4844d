"""The scripts of docs/pytorch.md run as they stand."""

import os
import re
import subprocess
import sys

import pytest

SCRIPTS = {"single": (), "amp": (), "compile": ("--backend", "aot_eager")}  # Inductor has its test in test_compile.py


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(root, name):
    command = [sys.executable, str(root / "examples" / "torch" / f"{name}.py"), *SCRIPTS[name]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    first, last = map(float, re.search(r"loss ([\d.]+) at the start, ([\d.]+) at the end", result.stdout).groups())
    assert last < 0.9 * first
