"""`io.load` of mutated files: a ValueError that names the file, or tables and states that `io.save` takes back.

Mutations know the format: dtypes, offsets and shapes in the header, metadata, contents, the length of the header, the end of the file.
`make test` tries 2,000, `make fuzz` 100,000 (DUALBIN_FUZZ), each from its own seed, which the message of a failure says.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualbin
from dualbin import io, reference, rules
from dualbin._state_checks import ExportedState

COUNT = int(os.environ.get("DUALBIN_FUZZ", "2000"))
PARTS = 8  #: tests that share the mutations
ROWS, DIM = 5, 13

NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 1e30, 0.5, None, "8", True, [], {})
TEXTS = (
    "",
    "0",
    "1",
    "2",
    "3",
    "-1",
    "13",
    "14",
    "9" * 19,
    "9" * 400,
    "1.0",
    "NaN",
    "\u0663",
    "dualbin",
    "{}",
    "[]",
    '{"Counter": {}}',
    "x" * 5000,
)
DTYPES = ("U8", "I8", "F16", "BF16", "F32", "F64", "I32", "I64", "U64", "BOOL", "F8_E4M3", "X", "", None)


def good_files(folder: Path) -> list[bytes]:
    """Files of tables alone, and with the states of rules that keep different arrays."""
    w = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    made = []
    for rule, planes in ((None, 1), (rules.Counter(8), 3), (rules.Counter(4, every=3), 1), (rules.Bop(), 1)):
        table = io.Table(dualbin.pack(w, planes), dualbin.row_scale(w, planes), DIM, planes)
        states = None
        if rule is not None:
            state = reference.init_state(rule, ROWS, DIM, planes=planes)
            for _ in range(4):
                bits, scale = table.bits.copy(), table.scale.copy()
                reference.update(bits, scale, state, np.arange(3), w[:3], rule=rule, dim=DIM, planes=planes)
            states = {"t": ExportedState(state, planes, rule)}
        io.save(folder / "good", {"t": table, "u": table}, states)
        made.append((folder / "good").read_bytes())
    return made


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def file_of(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def change_metadata(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    metadata = header["__metadata__"]
    key = rng.choice(sorted(metadata))
    match rng.randrange(4):
        case 0:
            del metadata[key]
        case 1:
            metadata[key] = rng.choice(TEXTS)
        case 2:
            metadata[rng.choice(("v", "t", "", "t.t", "format")) + rng.choice((".dim", ".planes", ".rule", "", "."))] = rng.choice(TEXTS)
        case 3:
            text = list(metadata[key])
            text[rng.randrange(len(text))] = chr(rng.randrange(32, 127))
            metadata[key] = "".join(text)
    return file_of(header, body)


def change_entry(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    key = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[key]
    match rng.randrange(6):
        case 0:
            entry["dtype"] = rng.choice(DTYPES)
        case 1:
            entry["shape"] = [rng.choice((*NUMBERS, ROWS, DIM)) for _ in range(rng.randrange(4))]
        case 2:
            entry["data_offsets"][rng.randrange(2)] = rng.choice((*NUMBERS, len(body), len(body) + 1))
        case 3:
            del header[key]
        case 4:
            header[rng.choice(("t.count", "t.nonsense", "v.bits", "bits", "", ".", "t.bits.x", "t.record", "\u0000"))] = header.pop(key)
        case 5:
            del entry[rng.choice(sorted(entry))]
    return file_of(header, body)


def change_contents(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    key = rng.choice(sorted(set(header) - {"__metadata__"}))
    start, end = header[key]["data_offsets"]
    changed = bytearray(body)
    if isinstance(start, int) and isinstance(end, int) and end > start:
        values = (
            b"\xff" * 8,
            b"\x00" * 8,
            b"\x00\x00\xc0\x7f" * 2,
            b"\x00\x00\x80\xff" * 2,
            b"\xff\xff\xff\xff\xff\xff\xff\x7f",
            rng.randbytes(8),
        )
        at = start + rng.randrange(end - start) // 4 * 4
        piece = rng.choice(values)[: end - at]
        changed[at : at + len(piece)] = piece
    return file_of(header, bytes(changed))


def change_bytes(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    data = bytearray(file_of(header, body))
    match rng.randrange(4):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            data += rng.randbytes(rng.randrange(1, 40))
        case 2:
            data[:8] = rng.choice((0, 1, 2**63, 2**64 - 1, len(data), len(data) - 8, rng.randrange(len(data)))).to_bytes(8, "little")
        case 3:
            for _ in range(rng.randrange(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


MUTATIONS: tuple[Callable[..., bytes], ...] = (change_metadata, change_entry, change_contents, change_bytes)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three mutations; what cannot be parsed any more is left at that."""
    for _ in range(rng.randrange(1, 4)):
        try:
            header, body = header_of(data)
            data = rng.choice(MUTATIONS)(header, body, rng)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            break
    return data


def check(path: Path, back: Path) -> bool:
    """Load a file: whether it was taken. What was taken is what can be saved."""
    try:
        tables, states = io.load(path)
    except ValueError as error:
        if str(path) not in str(error):
            msg = f"the message does not name the file: {error}"
            raise AssertionError(msg) from error
        return False
    io.save(back, tables, states)
    again, states_again = io.load(back)
    for name, table in tables.items():
        assert again[name].bits.tobytes() == table.bits.tobytes()
        assert again[name].scale.tobytes() == table.scale.tobytes()
    assert {name: set(state) for name, state in states.items()} == {name: set(state) for name, state in states_again.items()}
    return True


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_files(part: int, tmp_path: Path) -> None:
    files = good_files(tmp_path)
    path, taken, tried = tmp_path / "file", 0, range(part, COUNT, PARTS)
    tracemalloc.start()
    try:
        for seed in tried:
            rng = random.Random(seed)
            path.write_bytes(mutated(rng.choice(files), rng))
            try:
                taken += check(path, tmp_path / "back")
            except Exception as error:
                msg = f"seed {seed}: {type(error).__name__}: {error}"
                raise AssertionError(msg) from error
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < taken < len(tried) / 2, "most mutations matter, some do not"
    assert peak < 2**22, f"files of some kilobytes took {peak} bytes"


def test_another_error_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = good_files(tmp_path)
    header, body = header_of(files[1])
    start, _ = header["t.scale"]["data_offsets"]
    (tmp_path / "file").write_bytes(file_of(header, body[:start] + b"\x00\x00\xc0\x7f" + body[start + 4 :]))
    assert not check(tmp_path / "file", tmp_path / "back")
    monkeypatch.setattr(io, "_check_format", lambda *_: {}["no such check"])
    (tmp_path / "file").write_bytes(files[0])
    with pytest.raises(KeyError):
        check(tmp_path / "file", tmp_path / "back")
