"""docs/determinism.md names tests: they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "determinism.md").read_text(encoding="utf-8"))))


def test_the_page_names_tests() -> None:
    assert len(NAMES) > 15


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_named_tests_exist(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file()
    functions = {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions
