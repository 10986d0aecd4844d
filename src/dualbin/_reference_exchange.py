"""The definition of what travels between ranks that share a table: which rows, and in what form. A part of :mod:`dualbin.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def route(
    ids: ArrayLike, rows: int, share: int, world: int, capacity: int = 0, spare: int = 0, missed: Array | None = None
) -> tuple[Array, Array, Array]:
    """Which rank holds which rows of a batch. Rank r of `world` holds rows `[r * share, (r + 1) * share)` of `rows`.

    Args:
        ids: [N].
        capacity: places of a rank; 0: as many as are needed.
        spare: with a capacity, places before those of rank 0, the first of which is for occurrences without one of their own.
        missed: int64 [3 + world], changed in place: added to it the occurrences without a place, then the minimum and the maximum with bad
            ids, and the maximum with the number of distinct ids of every rank.

    Returns:
        Distinct ids, ascending, each counted from the first row of its rank: [min(N, rows)], or [world * capacity] with places of its own
        for every rank, which get its first ids; `share` where there is none. The place of every occurrence [N], spare added; without one
        0, or -1 where there is no capacity. How many distinct ids lie before the end of each rank, and the first position of a bad id or
        -1: [world + 1].
    """
    flat = np.asarray(ids).astype(np.int64)
    good = (flat >= 0) & (flat < rows)
    distinct = np.unique(flat[good])
    ranks = distinct // share
    ends = np.searchsorted(distinct, share * np.arange(1, world + 1))
    places = np.arange(len(distinct))
    if capacity:
        among = places - np.concatenate([[0], ends])[ranks]
        places = np.where(among < capacity, ranks * capacity + among, -1)
    local = np.full(world * capacity if capacity else min(len(flat), rows), share, np.int64)
    local[places[places >= 0]] = (distinct - ranks * share)[places >= 0]
    slots = np.full(len(flat), 0 if capacity else -1, np.int64)
    slots[good] = places[np.searchsorted(distinct, flat[good])] + spare
    if capacity:
        slots[slots < spare] = 0
    if missed is not None:
        missed[0] += (slots == 0).sum()
        missed[1], missed[2] = min([missed[1], *flat[~good]]), max([missed[2], *flat[~good]])
        missed[3:] = np.maximum(missed[3:], np.diff(ends, prepend=0))
    return local, slots, np.concatenate([ends, np.flatnonzero(~good)[:1] if not good.all() else [-1]])


def take_rows(bits: ArrayLike, scale: ArrayLike, ids: ArrayLike) -> Array:
    """Rows as they travel, uint8 `[N, W + 4]`: the bytes of all planes, then those of the float32 scale, little-endian.

    Ids outside the table get zeros and a scale of NaN.
    """
    bits, scale, ids = np.asarray(bits), np.asarray(scale, "<f4").reshape(-1), np.asarray(ids)
    inside = (ids >= 0) & (ids < len(bits))
    known = np.where(inside, ids, 0)
    scales = np.where(inside, scale[known], np.float32(np.nan)).astype("<f4")
    return np.concatenate([np.where(inside[:, None], bits[known], np.uint8(0)), scales.view(np.uint8).reshape(-1, 4)], axis=1)


def put_rows(packed: ArrayLike, bits: Array, scale: Array, ids: ArrayLike | None = None) -> None:
    """The inverse: rows that have travelled, to the places `ids` (by default 0, 1, 2, ...) of a table, in place.

    Ids are distinct, or bring the same; those outside the table are padding.
    """
    packed = np.asarray(packed)
    ids = np.arange(len(packed)) if ids is None else np.asarray(ids)
    inside = (ids >= 0) & (ids < len(bits))
    bits[ids[inside]] = packed[inside, :-4]
    scale.reshape(-1)[ids[inside]] = np.ascontiguousarray(packed[inside, -4:]).view("<f4")[:, 0]
