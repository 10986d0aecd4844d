"""The code of docs/recipes.md runs as it stands, section by section."""

import re

import pytest

#: a section that goes on with the names of another
GOES_ON = {"Schedules": "Several tables and rates in PyTorch", "Data that is seen twice": "Fine-tuning a converted table"}
SECTIONS = (
    "Several tables and rates in PyTorch",
    "Schedules",
    "Several tables and rates in optax",
    "Bags in nnx",
    "Saving from both sides",
    "Fine-tuning a converted table",
    "Data that is seen twice",
)


def sections(root):
    page = (root / "docs" / "recipes.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)[1:]
    return {
        name: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_section(root, tmp_path, monkeypatch, section):
    for module in ("torch", "jax", "flax", "optax"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    found = sections(root)
    assert set(found) == set(SECTIONS)
    names = {}
    for name in filter(None, (GOES_ON.get(section), section)):
        assert found[name]
        for block in found[name]:
            exec(compile(block, f"docs/recipes.md, {name}", "exec"), names)
