"""Entries of `dualbin`, `dualbin.io` and `dualbin.rules`."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import dualbin
from arguments.registry import Entry
from dualbin import io, rules

V, D = 11, 13
W = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
FOLDER = Path(tempfile.mkdtemp(prefix="dualbin-arguments-"))


def neutral() -> dict[str, Any]:
    from dualbin import reference

    return reference.init_state(rules.Counter(8), V, D, planes=2)


def table() -> io.Table:
    return io.Table(dualbin.pack(W, 2), dualbin.row_scale(W, 2), D, 2)


def written() -> Path:
    io.save(FOLDER / "good", {"t": table()})
    return FOLDER / "good"


def wide_table() -> io.Table:
    w = np.tile(W, (1, 10))[:, :128]
    return io.Table(dualbin.pack(w), dualbin.row_scale(w), 128)


def in_gguf() -> Path:
    io.to_gguf(FOLDER / "good.gguf", {"t": wide_table()})
    return FOLDER / "good.gguf"


COUNTER = {"bits": 4, "eta": 2.0, "dead_zone": 0.5, "every": 2, "anneal": 2.0, "center": True, "norm": "rms"}

ENTRIES = {
    "dualbin.backends": Entry(dualbin.backends, dict),
    "dualbin.NGrams": Entry(dualbin.NGrams, lambda: {"rows": 1000, "orders": (2, 3), "heads": 4, "boundary": 7, "seed": 5}),
    "dualbin.pack": Entry(dualbin.pack, lambda: {"w": W.copy(), "planes": 2}),
    "dualbin.row_scale": Entry(dualbin.row_scale, lambda: {"w": W.copy(), "planes": 2}),
    "dualbin.unpack": Entry(dualbin.unpack, lambda: {"bits": dualbin.pack(W, 2), "dim": D, "planes": 2}),
    "dualbin.io.load": Entry(io.load, lambda: {"path": written()}),
    "dualbin.io.save": Entry(io.save, lambda: {"path": FOLDER / "other", "tables": {"t": table()}, "state": {"t": neutral()}}),
    "dualbin.rules.Counter": Entry(rules.Counter, lambda: dict(COUNTER)),
    "dualbin.rules.Bop": Entry(rules.Bop, lambda: {"gamma": 0.05, "tau": 0.1, "every": 2}),
    "dualbin.rules.Sign": Entry(rules.Sign, lambda: {"every": 2}),
    "dualbin.rules.check_rule": Entry(rules.check_rule, lambda: {"rule": rules.Counter(8)}),
    "dualbin.rules.to_plain": Entry(rules.to_plain, lambda: {"rule": rules.Counter(8)}),
    "dualbin.rules.from_plain": Entry(rules.from_plain, lambda: {"value": rules.to_plain(rules.Counter(8))}),
    "dualbin.rules.resolve": Entry(rules.resolve, lambda: {"rule": rules.Counter(8), "planes": 2, "dim": D}),
}
OF_GGUF = {
    "dualbin.io.to_gguf": Entry(io.to_gguf, lambda: {"target": FOLDER / "table.gguf", "tables": {"t": wide_table()}}),
    "dualbin.io.from_gguf": Entry(io.from_gguf, lambda: {"path": in_gguf(), "names": ["t"]}),
}
if find_spec("gguf") is not None:
    ENTRIES |= OF_GGUF
