"""Logs of clicks in the form of Criteo's: the Display Advertising Challenge and the Click Logs of 24 days. Standard library and NumPy only.

A line is an example, fields are between tabs: 0 or 1 (it was clicked), 13 integers, and 26 categories, hashes of 8 hexadecimal digits. An
empty field is a missing value. Examples are in the order of time.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from _clicks import PARTS, Batch

INTEGERS, CATEGORIES = 13, 26
LEVELS = 64  # rows of an integer
SAMPLE = 100_000  # lines from which the size of tables is taken

_LINE = re.compile(rf"[01](?:\t(?:-?\d{{1,18}})?){{{INTEGERS}}}(?:\t(?:[0-9a-fA-F]{{8}})?){{{CATEGORIES}}}")
_MISSING = -1


class CriteoLog:
    """The lines of files as batches, read anew for every pass and never held as a whole.

    Categories are hashes already, so the rest of a division is their row; row 0 is the missing value. The integers are a bag: each has a
    row for its size, two for every power of 2, and none where it is missing.

    Args:
        paths: files one after the other, as text or gzip (`.gz`).
        batch: examples of a batch; what fills none is left out of training.
        most_rows: of a table. It has 8 rows for every value that a field has in the first lines, 128 at least.

    Attributes:
        rows: of every table, that of the bag last.
        lines: of all files.
        steps: batches to train on.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line has another form (named by file and number), or there are too few lines for a batch.
    """

    def __init__(self, paths: Sequence[Path], batch: int, most_rows: int = 2**20) -> None:
        if most_rows < 2:
            msg = f"most_rows must be at least 2, got {most_rows}"
            raise ValueError(msg)
        self._paths, self._batch = tuple(paths), batch
        self.lines = sum(1 for _ in self._numbered())
        self.steps = int(0.8 * self.lines) // batch
        if self.steps == 0:
            msg = f"the files must have at least {batch} lines to train on, got {int(0.8 * self.lines)} of {self.lines}"
            raise ValueError(msg)
        _, _, categories = _parsed(list(islice(self._numbered(), SAMPLE)))
        distinct = [len(np.unique(column)) for column in categories.T]
        self.rows = [min(most_rows, max(128, 8 * count)) for count in distinct]
        self._modulus = np.array(self.rows, np.int64) - 1
        self.rows.append(INTEGERS * LEVELS)

    def batches(self, part: str) -> Iterator[Batch]:
        """Those of "train", "choose" or "report", which are the first 80 % of the lines, the next 10 %, and the last."""
        bounds = [0, int(0.8 * self.lines), int(0.9 * self.lines), self.lines]
        place = PARTS.index(part)
        lines = islice(self._numbered(), bounds[place], bounds[place + 1])
        while some := list(islice(lines, self._batch)):
            if part == "train" and len(some) < self._batch:
                return
            positive, integers, categories = _parsed(some)
            ids = np.where(categories == _MISSING, 0, 1 + categories % self._modulus)
            known = ~np.isnan(integers)
            offsets = np.concatenate([[0], known.sum(1).cumsum()])
            yield Batch(ids, _levels(integers)[known], offsets, positive)

    def _numbered(self) -> Iterator[tuple[Path, int, str]]:
        """All lines, each with its file and its number in it. A byte that is not ASCII is left for the check of its line."""
        for path in self._paths:
            number = 0
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="ascii", errors="replace", newline="\n") as file:
                try:
                    for number, line in enumerate(file, 1):
                        yield path, number, line.rstrip("\r\n")
                except (EOFError, zlib.error) as error:
                    msg = f"{path}: the compressed file is damaged after line {number}: {error}"
                    raise ValueError(msg) from error


def _parsed(lines: list[tuple[Path, int, str]]) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.int64]]:
    """Labels, integers `[examples, 13]` (NaN: missing) and categories `[examples, 26]` (-1: missing) of numbered lines."""
    fields = [line.split("\t") if _LINE.fullmatch(line) else _refuse(path, number, line) for path, number, line in lines]
    positive = np.array([line[0] == "1" for line in fields])
    integers = np.array([[float(value or "nan") for value in line[1 : 1 + INTEGERS]] for line in fields])
    categories = np.array([[int(value or "-1", 16) for value in line[1 + INTEGERS :]] for line in fields], np.int64)
    return positive, integers, categories


def _levels(integers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows of integers in the table of the bag: 64 each, from 0 for negative ones on, two for every power of 2."""
    with np.errstate(invalid="ignore"):
        size = np.where(integers < 0, 0, 1 + np.floor(2 * np.log2(1 + np.maximum(integers, 0))))
    return np.nan_to_num(size).clip(max=LEVELS - 1).astype(np.int64) + LEVELS * np.arange(INTEGERS)


def _refuse(path: Path, number: int, line: str) -> list[str]:
    """Say what is wrong with a line."""
    fields, wanted = line.split("\t"), 1 + INTEGERS + CATEGORIES
    if len(fields) != wanted:
        of_test = " (the challenge's test set has no labels)" if len(fields) == wanted - 1 else ""
        msg = f"{path}, line {number}: must be a label, 13 integers and 26 categories between tabs, got {len(fields)} fields{of_test}"
        raise ValueError(msg)
    kinds = ["0 or 1", *["an integer or empty"] * INTEGERS, *["8 hexadecimal digits or empty"] * CATEGORIES]
    for place, (kind, value) in enumerate(zip(kinds, fields, strict=True), 1):
        padding = ["0", *[""] * (wanted - 1)]
        padding[place - 1] = value
        if not _LINE.fullmatch("\t".join(padding)):
            msg = f"{path}, line {number}: field {place} must be {kind}, got {value!r}"
            raise ValueError(msg)
    raise AssertionError(line)
