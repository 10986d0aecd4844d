"""The layers of docs/design.md, read from the table there and from the imports and includes of every file."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NATIVE = "dualbin._native"


@dataclass(frozen=True)
class Layer:
    """A row of the table: folders of the layer, the layers it may use (itself always), and libraries beside the standard ones."""

    name: str
    folder: str
    uses: frozenset[str]
    libraries: frozenset[str]


def read_layers() -> dict[str, Layer]:
    """The table under "## Layers" of docs/design.md."""
    section = (ROOT / "docs/design.md").read_text().split("## Layers")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if line.startswith("|")]
    layers = {}
    for name, folder, uses, libraries, _ in rows[2:]:
        words = [frozenset(re.findall(r"[\w.]+", cell)) for cell in (uses, libraries)]
        layers[name] = Layer(name, folder.strip("`"), *words)
    return layers


LAYERS = read_layers()


def layer_of(path: Path) -> str:
    """The layer with the longest folder that holds the file."""
    place = path.relative_to(ROOT).as_posix()
    holding = [layer for layer in LAYERS.values() if place.startswith(layer.folder + "/")]
    assert holding, f"{place} is in no layer of docs/design.md"
    return max(holding, key=lambda layer: len(layer.folder)).name


# ---- Python ------------------------------------------------------------------------------------------------------------------------------


def python_modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "src").rglob("*.py"):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = python_modules()


def imports(path: Path) -> Iterator[str]:
    """What a file imports anywhere: within functions and under TYPE_CHECKING too, since such an import is a dependency in hiding.

    That a package is loaded before its modules is no import of theirs.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES or name == NATIVE else str(node.module)


GRAPH = {name: sorted(set(imports(path))) for name, path in MODULES.items()}


def circles(graph: dict[str, list[str]]) -> set[frozenset[str]]:
    """Sets of modules that reach each other."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        open_ = list(graph[start])
        while open_:
            name = open_.pop()
            if name in graph and name not in seen:
                seen.add(name)
                open_ += graph[name]
        return seen

    reach = {name: reachable(name) for name in graph}
    return {frozenset(other for other in seen if name in reach[other]) for name, seen in reach.items() if name in seen}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_stay_within_the_layers(module: str) -> None:
    layer = LAYERS[layer_of(MODULES[module])]
    for target in GRAPH[module]:
        top = target.split(".")[0]
        if target in MODULES or target == NATIVE:
            used = "bindings" if target == NATIVE else layer_of(MODULES[target])
            assert used in layer.uses | {layer.name}, f"{module} ({layer.name}) imports {target} ({used})"
        elif top not in sys.stdlib_module_names:
            assert top in layer.libraries, f"{module} ({layer.name}) imports the library {top}"


def test_no_import_circles() -> None:
    assert circles(GRAPH) == set()


def test_only_one_module_of_the_pytorch_frontend_knows_the_native_functions() -> None:
    users = {name for name, found in GRAPH.items() if name.startswith("dualbin.torch") and {NATIVE, "dualbin._backends"} & set(found)}
    assert users == {"dualbin.torch._info", "dualbin.torch._native_call"}


# ---- C++ ---------------------------------------------------------------------------------------------------------------------------------

SOURCES = sorted(path for path in (ROOT / "cuda").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def local_file(name: str) -> Path | None:
    """The file of this repository that an include names, or None."""
    return next((path for root in ("cuda", "cuda/include") if (path := ROOT / root / name).is_file()), None)


def library(name: str) -> str:
    """The library of a header that is not ours: the folder it is in, or its name without the ending."""
    return name.split("/", maxsplit=1)[0].removesuffix(".h").removesuffix(".hpp")


CPP_GRAPH = {
    path.as_posix(): [file.as_posix() for name in INCLUDE.findall(path.read_text()) if (file := local_file(name))] for path in SOURCES
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_includes_stay_within_the_layers(path: Path) -> None:
    layer = LAYERS[layer_of(path)]
    for name in INCLUDE.findall(path.read_text()):
        file = local_file(name)
        if file is not None:
            used = layer_of(file)
            assert used in layer.uses | {layer.name}, f"{path.name} ({layer.name}) includes {name} ({used})"
        elif name.endswith((".h", ".hpp", ".cuh")):  # headers of the standard library have no ending
            assert library(name) in layer.libraries, f"{path.name} ({layer.name}) includes {name} of {library(name)}"


def test_no_include_circles() -> None:
    assert circles(CPP_GRAPH) == set()


# ---- the checks notice -------------------------------------------------------------------------------------------------------------------


def test_the_table_forbids_arrows_upwards() -> None:
    """A layer uses only layers below its own row, so that the table itself has no circle; the frontends do not use each other."""
    names = list(LAYERS)
    for layer in LAYERS.values():
        assert layer.uses <= set(names[names.index(layer.name) + 1 :]), f"{layer.name} uses a layer above it"
    assert "jax" not in LAYERS["torch"].uses
    for name in ("cpu", "kernels", "core", "rules", "interface"):
        assert not LAYERS[name].libraries & {"pybind11", "xla", "Python"}, f"{name} is free of Python"


def test_the_table_names_nothing_that_is_not_used() -> None:
    used: dict[str, set[str]] = {name: set() for name in LAYERS}
    for name, path in MODULES.items():
        used[layer_of(path)] |= {
            layer_of(MODULES[t]) if t in MODULES else "bindings" if t == NATIVE else t.split(".")[0] for t in GRAPH[name]
        }
    for path in SOURCES:
        for name in INCLUDE.findall(path.read_text()):
            file = local_file(name)
            used[layer_of(path)].add(layer_of(file) if file else library(name))
    for layer in LAYERS.values():
        assert (layer.uses | layer.libraries) - used[layer.name] == set(), layer.name


def test_circles_and_hidden_imports_are_found(tmp_path: Path) -> None:
    assert circles({"a": ["b"], "b": ["c", "x"], "c": ["a"], "d": ["a"]}) == {frozenset("abc")}
    hidden = tmp_path / "hidden.py"
    hidden.write_text("import os\ndef f():\n    from dualbin.torch import _optim\nif TYPE_CHECKING:\n    import dualbin.jax._ffi\n")
    assert set(imports(hidden)) == {"os", "dualbin.torch._optim", "dualbin.jax._ffi"}
