"""Hooks of mkdocs: pages from outside docs/, pages of the reference, and files of the repository that pages link to."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

#: pages that are files in the root of the repository
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
MODULES = {"torch": "dualbin.torch", "jax": "dualbin.jax", "rules": "dualbin.rules", "io": "dualbin.io", "dualbin": "dualbin"}
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)([^)]*\))")


def on_files(files: Files, config: Any) -> Files:
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=LINK.sub(_from_root, text)))
    for name, module in MODULES.items():
        lines = [f"# {module}", *(f"::: {module}.{each}\n    options: {{heading_level: 2}}" for each in _public(module))]
        files.append(File.generated(config, f"api/{name}.md", content="\n\n".join(lines)))
    linked = {
        match[2] for page in files.documentation_pages() for match in LINK.finditer(page.content_string) if match[2].startswith("../")
    }
    for target in sorted(linked):
        source = ROOT / target.removeprefix("../")
        if source.is_file() and target.removeprefix("../") not in PAGES.values():
            files.append(File.generated(config, _place(target), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("api/"):
        return markdown

    def replace(match: re.Match[str]) -> str:
        target = match[2]
        if not target.startswith("../"):
            return match[0]
        inside = {source: name for name, source in PAGES.items()}
        place = inside.get(target.removeprefix("../")) or (_place(target) if (ROOT / target.removeprefix("../")).is_file() else "index.md")
        return f"{match[1]}{place}{match[3]}"

    return LINK.sub(replace, markdown)


def _from_root(match: re.Match[str]) -> str:
    """A link of a page in the root, as one of a page in docs."""
    target = match[2]
    return f"{match[1]}{target.removeprefix('docs/') if target.startswith('docs/') else '../' + target}{match[3]}"


def _place(target: str) -> str:
    """Where a file of the repository is in the site: as text, which browsers show."""
    name = target.removeprefix("../")
    return f"files/{name}.txt" if name.endswith((".py", ".md")) else f"files/{name}"


def _public(module: str) -> list[str]:
    """`__all__` of a module, or its public classes and functions, without importing it."""
    path = ROOT / "src" / Path(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if name not in {"__version__", "io", "reference", "rules"}]
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")]
