"""Type checkers know what the examples of the README make: above all, that `emb.weight` is a table. mypy has them in `make lint`."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dualbin


@pytest.mark.slow
def test_basedpyright_knows_the_examples_of_the_readme(root, tmp_path):
    checker = Path(sys.executable).with_name("basedpyright")
    if not checker.exists():
        pytest.skip("basedpyright is not installed")
    runpy.run_path(str(root / "scripts" / "typed_examples.py"))["main"](tmp_path)
    right = (tmp_path / "typed_torch.py").read_text()
    wrong = right.replace("assert_type(emb.weight, dbt.BinaryTable)", "assert_type(emb.weight, torch.Tensor)")
    (tmp_path / "wrong.py").write_text(wrong)  # a checker that looks at nothing would pass
    environment = Path(sys.executable).parents[1]
    config = {"typeCheckingMode": "standard", "venvPath": str(environment.parent), "venv": environment.name}
    config |= {"extraPaths": [str(Path(dualbin.__file__).parents[1])], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [checker, "--level", "error", "--outputjson", "--project", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})
    found = json.loads(result.stdout)
    messages = [f"{Path(each['file']).name}: {each['message']}" for each in found["generalDiagnostics"]]
    assert found["summary"]["filesAnalyzed"] == 3
    assert len(messages) == 1, messages
    assert messages[0].startswith("wrong.py")
    assert 'expected "Tensor" but received "BinaryTable"' in messages[0]
