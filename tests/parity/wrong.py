"""Wrong back ends of the operations of :mod:`parity.operations`: the suite has to notice each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from dualbin import reference
from parity.operations import Case, Native, Problem, Results


def _changed(**changes: Callable[[Problem], Any]) -> Callable[[Problem], Results]:
    """The native library, called with other arguments."""

    def run(p: Problem) -> Results:
        changed = {name: change(p) for name, change in changes.items()}
        plain = {name: np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for name, x in changed.items()}
        return Native().run(replace(p, **plain))

    return run


def _one_bag_further(p: Problem) -> Any:
    return np.concatenate([p.offsets[:1], np.minimum(p.offsets[1:] + 1, len(p.ids))]).astype(p.offsets.dtype)


def _rounded_before_dividing(p: Problem) -> Results:
    inverse = (1 / np.maximum(p.counts, 1)).astype(p.dtype)
    owners = np.repeat(np.arange(len(p.counts)), np.diff(p.offsets))
    rows = p.dy[owners] * inverse[owners][:, None]
    rows[p.ids == p.padding_idx] = 0
    return [rows]


def _rounded_twice(p: Problem) -> Results:
    wide = Native().run(replace(p, dy=p.dy.astype(np.float32)))[0]
    with np.errstate(over="ignore"):
        return [
            wide.astype(np.float16).astype(p.dtype) if p.dtype == ml_dtypes.bfloat16 else wide.astype(ml_dtypes.bfloat16).astype(p.dtype)
        ]


def _columns_in_order(p: Problem) -> Results:
    owners = np.repeat(np.arange(len(p.dy)), np.diff(p.offsets))
    signs = reference.unpack(p.bits, p.case.dim)[p.ids].astype(np.float32)
    sums = np.cumsum(signs * p.dy[owners].astype(np.float32), axis=1, dtype=np.float32)[:, -1]
    return [np.where(p.ids == p.padding_idx, np.float32(0), p.scale[p.ids, 0] * sums + np.float32(0))]


def _nearest(p: Problem) -> Results:
    """The average as a majority: the bits of the heavier table."""
    _, scale = Native().run(p)
    return [np.where(0.7 * np.abs(p.scale) >= 0.3 * np.abs(p.scale_b), p.bits, p.bits_b), scale]


MEAN, WEIGHTED, BAG = (Case(name, "int64", "bfloat16", 100, "hot") for name in ("rows-mean", "rows-weighted", "bag-weighted"))

WRONG: dict[str, tuple[Case, Callable[[Problem], Results]]] = {
    "divides by one more": (MEAN, _changed(counts=lambda p: p.counts + np.int32(1))),
    "divides by the length of the bag": (
        replace(MEAN, pattern="padding"),
        _changed(counts=lambda p: np.diff(p.offsets).astype(np.int32)),
    ),
    "rounds before it divides": (MEAN, _rounded_before_dividing),
    "rounds a product twice": (WEIGHTED, _rounded_twice),
    "drops the weights": (WEIGHTED, _changed(weights=lambda _: None)),
    "drops one weight of a bag": (BAG, _changed(weights=lambda p: np.where(np.arange(len(p.ids)) == 100, np.float32(1), p.weights))),
    "cuts bags one id further": (BAG, _changed(offsets=_one_bag_further)),
    "gives rows the next bag's gradient": (WEIGHTED, _changed(dy=lambda p: np.roll(p.dy, 1, axis=0))),
    "counts the padding row": (Case("counts", "int32", "float32", 8, "padding"), _changed(padding_idx=lambda _: -1)),
    "gives the padding row a gradient": (replace(WEIGHTED, pattern="padding"), _changed(padding_idx=lambda _: -1)),
    "adds columns in another order": (Case("weights", "int64", "float32", 767, "hot"), _columns_in_order),
    "averages to the nearest": (Case("average", "int64", "float32", 100, "one"), _nearest),
    "averages with the weights exchanged": (
        Case("average", "int64", "float32", 100, "one"),
        _changed(bits=lambda p: p.bits_b, bits_b=lambda p: p.bits, scale=lambda p: p.scale_b, scale_b=lambda p: p.scale),
    ),
    "packs with the scale of another row": (
        Case("pack", "int64", "float32", 100, "hot", 3),
        lambda p: [Native().run(p)[0], np.roll(Native().run(p)[1], 1)],
    ),
    "packs -0.0 as a negative number": (
        Case("pack", "int64", "bfloat16", 8, "hot"),
        lambda p: Native().run(replace(p, dy=np.where(p.dy == 0, np.array(-1, p.dtype), p.dy))),
    ),
    "looks up half a level off": (Case("lookup", "int32", "float32", 9, "hot", 3), lambda p: [Native().run(p)[0] - p.scale[p.ids] / 4]),
    "looks up planes in another order": (
        Case("lookup", "int32", "float32", 9, "hot", 3),
        _changed(bits=lambda p: p.bits[:, [0, 1, 4, 5, 2, 3]]),
    ),
    "keeps the scale of all planes": (Case("fewer-rescaled", "int32", "float32", 9, "hot", 4), lambda p: [Native().run(p)[0], p.scale]),
    "looks up with a scale of one sign": (Case("lookup", "int32", "float16", 9, "hot"), _changed(scale=lambda p: np.abs(p.scale))),
}
