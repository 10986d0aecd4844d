"""The diagram of docs/design.md, checked against the imports of the Python modules and the includes of the C++ ones."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
CUDA = Path(__file__).parents[1] / "cuda"
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path for path in SRC.rglob("*.py")}


def imports(name: str) -> Iterator[str]:
    """Modules of dualbin that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [each if each in MODULES or each == "dualbin._native" else str(node.module) for each in found]
        else:
            continue
        yield from (each for each in found if each.split(".")[0] == "dualbin")


GRAPH = {name: {each for each in imports(name) if each != name} for name in MODULES}


def layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in {"torch", "jax", "_native"} else "shared"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_nothing_above_or_beside_it(name: str) -> None:
    allowed = {"torch": {"torch", "shared", "_native"}, "jax": {"jax", "shared", "_native"}, "shared": {"shared", "_native"}}[layer(name)]
    assert {each for each in GRAPH[name] if layer(each) not in allowed} == set()


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in GRAPH:
            return
        for each in sorted(GRAPH[name]):
            visit(each, (*path, name))
        done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


def test_only_one_module_of_the_pytorch_frontend_knows_the_native_functions() -> None:
    native = {"dualbin._native", "dualbin._backends"}
    users = {name for name, found in GRAPH.items() if layer(name) == "torch" and native & found}
    assert users == {"dualbin.torch._info", "dualbin.torch._native_call"}


#: folder -> the folders of cuda/ that it may include from
INCLUDES = {
    "include": {"include"},
    "rules": {"rules", "include"},
    "core": {"core", "include"},
    "cpu": {"cpu", "core", "rules", "include"},
    "kernels": {"kernels", "core", "rules", "include"},
    "bindings": {"bindings", "core", "include"},
}


def sources() -> list[Path]:
    return sorted(path for path in CUDA.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})


@pytest.mark.parametrize("source", sources(), ids=lambda path: str(path.relative_to(CUDA)))
def test_a_source_includes_nothing_above_or_beside_it(source: Path) -> None:
    folder = source.relative_to(CUDA).parts[0]
    for included in re.findall(r'#include ["<]([^">]+)[">]', source.read_text()):
        first = included.split("/")[0]
        target = "include" if first == "dualbin" else first if "/" in included and first in INCLUDES else None
        if (source.parent / included).exists():
            target = folder
        if target is not None:
            assert target in INCLUDES[folder], included
        if first in {"pybind11", "xla"}:
            assert folder == "bindings", included


def test_the_diagram_names_the_layers() -> None:
    text = (SRC.parent / "docs" / "design.md").read_text()
    diagram = text[text.index("## Layers") : text.index("## Data")]
    for name in ("src/dualbin/torch", "src/dualbin/jax", "dualbin._native", *(f"cuda/{folder}" for folder in INCLUDES)):
        assert name in diagram
