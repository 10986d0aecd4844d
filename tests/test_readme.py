"""The examples of the README run as they stand."""

import re

import pytest


def python_blocks(root):
    return re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("number", "framework"), [(0, "torch"), (1, "jax")])
def test_block(root, tmp_path, monkeypatch, number, framework):
    pytest.importorskip(framework)
    blocks = python_blocks(root)
    assert len(blocks) == 2
    assert f"import {framework}," in blocks[number]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(blocks[number], f"README.md, block {number}", "exec"), names)
    assert 0 < names["loss"].item() < 1.5  # two classes: chance is 0.69
