"""Real text that every machine has: the English of Python's own documentation."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]")
END, UNKNOWN = "<end>", "<unknown>"
HELD_OUT = 10  # every tenth document is held out
MIN_TOKENS = 20_000

_SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Corpus:
    """Token ids (int32) of the two parts, and the word of each id."""

    train: np.ndarray
    held_out: np.ndarray
    words: list[str]


def python_documents() -> list[str]:
    """The topics of `help()` and every docstring of the standard library, each once."""
    from pydoc_data import topics  # noqa: PLC0415  (half a megabyte of text)

    documents = list(topics.topics.values())
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(root).parts):
            documents += _docstrings(path)
    return list(dict.fromkeys(documents))


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and files for other versions
        return []
    return list(_docstrings_below(tree))


def _docstrings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child)


def file_documents(path: Path) -> list[str]:
    """The paragraphs of a text file."""
    return [text for text in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")) if text.strip()]


def make_corpus(documents: list[str], *, max_words: int = 10_000) -> Corpus:
    """Split documents into words, lower case; words seen once in the training part, and those past `max_words`, become one symbol."""
    tokens = [[*WORD.findall(document.lower()), END] for document in documents]
    train = [token for n, document in enumerate(tokens) if n % HELD_OUT for token in document]
    held_out = [token for n, document in enumerate(tokens) if n % HELD_OUT == 0 for token in document]
    if len(train) < MIN_TOKENS:
        msg = f"the text has {len(train)} words to train on, at least {MIN_TOKENS} are needed"
        raise ValueError(msg)
    frequent = [word for word, count in Counter(train).most_common(max_words - 1) if count > 1]
    words = [UNKNOWN, *frequent]
    ids = {word: n for n, word in enumerate(words)}
    return Corpus(*(np.array([ids.get(token, 0) for token in part], np.int32) for part in (train, held_out)), words)
