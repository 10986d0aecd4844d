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


def test_the_page_links_every_script(root):
    page = (root / "docs" / "pytorch.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(\.\./(examples/torch/\w+\.py)\)", page))
    assert linked == {f"examples/torch/{path.name}" for path in (root / "examples" / "torch").glob("[!_]*.py")}


def test_code_on_the_page_runs(root):
    """The first block, and the one that converts a model."""
    page = (root / "docs" / "pytorch.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(blocks[0], names)
    assert type(names["xor"]).__name__ == "XOR"
    names["model"] = names["torch"].nn.Sequential(names["torch"].nn.Embedding(10_000, 8))
    exec(next(block for block in blocks if "dbt.convert(" in block), names)
    assert names["report"].bytes_saved == 10_000 * (32 - 5)
