"""The definition of every bit, in NumPy.

Written to be read, not to be fast. Every back end and frontend is tested against this module for equality of bits. `docs/design.md` says
the same in words. V is the number of rows of a table, D the number of weights in a row, B = ceil(D/8) the bytes of a packed row, N a
number of ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualbin._checks import check_float, check_int, check_table_arrays
from dualbin._reference_average import average, average_step
from dualbin._reference_bag import bag_counts, bag_gradient, bag_weight_gradient, lookup_bag
from dualbin._reference_exchange import put_rows, route, take_rows
from dualbin._reference_hash import random16
from dualbin._reference_ngrams import ngram_rows
from dualbin._reference_planes import (
    check_bits,
    pack,
    pack_bits,
    read_planes,
    row_scale,
    row_values,
    unpack,
    weights,
    with_planes,
    write_planes,
)
from dualbin._reference_rules import GRADIENT_BITS, evidence, power, quantise, row_rms, step_rows, times_power_of_two, zone_growth
from dualbin._reference_sums import SUM_BLOCK
from dualbin._schema import RECORD, STATE_ARRAYS, packed_width
from dualbin.rules import Rule, resolve, state_spec

Array = NDArray[Any]


class Stats(NamedTuple):
    """What one update did."""

    flips: int  #: bits flipped
    rows: int  #: rows updated
    skipped: int  #: rows left alone because their gradient or scale was not finite
    clipped: int  #: counters at their maximum after the update


# ---- data ------------------------------------------------------------------------------------------------------------------------------


def lookup(bits: ArrayLike, scale: ArrayLike, ids: ArrayLike, dim: int, dtype: Any = np.float32, planes: int = 1) -> Array:
    """Rows of a table: `scale[id] * s * (2m + 1) / 2**(planes-1)`, shape `ids.shape + (dim,)`; scale 0 gives +0.0.

    The product is rounded to float32, and that to `dtype`. With one plane it is +scale or -scale.

    Raises IndexError for an id outside [0, V).
    """
    bits, scale, ids = check_bits(bits, dim, planes), np.asarray(scale), np.asarray(ids)
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim, planes)
    flat = _flat_ids(ids)
    bad = np.flatnonzero((flat < 0) | (flat >= len(bits)))
    if len(bad):
        msg = f"id {flat[bad[0]]} at position {bad[0]} is outside [0, {len(bits)})"
        raise IndexError(msg)
    return row_values(bits[flat], scale[flat], dim, dtype).reshape((*ids.shape, dim))


# ---- gradients -------------------------------------------------------------------------------------------------------------------------


def row_gradient(ids: ArrayLike, dy: ArrayLike, rows: int) -> tuple[Array, Array]:
    """Sum an output gradient by row: ascending distinct ids int64 [U] and float32 [U, D].

    Order: the occurrences of a row, by ascending position, are cut into blocks of 64; each block is summed in float32 from +0.0, then the
    blocks are.
    Ids outside [0, rows) are dropped.
    """
    flat = _flat_ids(np.asarray(ids))
    dy = np.asarray(dy)
    values = dy.reshape(len(flat), dy.shape[-1]).astype(np.float32)
    valid = np.flatnonzero((flat >= 0) & (flat < rows))
    order = valid[np.argsort(flat[valid], kind="stable")]
    unique, start, count = np.unique(flat[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(start, count)
    blocks_of_row = -(-count // SUM_BLOCK)
    first_block = np.cumsum(blocks_of_row) - blocks_of_row
    block = np.repeat(first_block, count) + rank // SUM_BLOCK
    blocks = int(blocks_of_row.sum())
    block_sums = _sum_by_place(values[order], block, rank % SUM_BLOCK, blocks)
    row_of_block = np.repeat(np.arange(len(unique)), blocks_of_row)
    return unique.astype(np.int64), _sum_by_place(block_sums, row_of_block, np.arange(blocks) - first_block[row_of_block], len(unique))


def _sum_by_place(values: Array, group: Array, place: Array, groups: int) -> Array:
    """float32 sums [groups, D] of values [N, D], of each group from +0.0 in the order of `place`, which counts its members from 0."""
    sums = np.zeros((groups, values.shape[1]), np.float32)
    by_place = np.argsort(place, kind="stable")
    ends = np.cumsum(np.bincount(place))
    with np.errstate(invalid="ignore", over="ignore"):
        for members in np.split(by_place, ends[:-1]):
            sums[group[members]] += values[members]  # at most one of each group
    return sums


def segment_sum(slots: ArrayLike, dy: ArrayLike, segments: int) -> Array:
    """The sums of :func:`row_gradient` at the slots' own places: float32 [segments, D], zeros where a slot does not occur."""
    unique, sums = row_gradient(slots, dy, segments)
    out = np.zeros((segments, sums.shape[1]), np.float32)
    out[unique] = sums
    return out


def slot_means(slots: ArrayLike, dy: ArrayLike, segments: int, divisor: int, dtype: Any = np.float32) -> Array:
    """:func:`segment_sum`, each sum divided by `divisor` in float32 and rounded to `dtype`: what a rank sends of its gradient."""
    return (segment_sum(slots, dy, segments) / np.float32(divisor)).astype(dtype)


def scale_gradient(bits: ArrayLike, rows: ArrayLike, dim: int, planes: int = 1) -> Array:
    """dL/dscale of rows with packed bits [U, planes * B] and row gradients float32 [U, D], float64 [U] (not yet rounded to float32).

    `sum_d s*(2m+1) * g / 2**(planes-1)`, summed exactly in integers of the row's largest magnitude times 2**-14.
    """
    q, exponent = quantise(np.asarray(rows, np.float32))
    aligned = (unpack(bits, dim, planes).astype(np.int64) * q).sum(axis=1)
    return times_power_of_two(aligned, exponent - GRADIENT_BITS - (planes - 1))


# ---- update ----------------------------------------------------------------------------------------------------------------------------


def init_state(rule: Rule, rows: int, dim: int, *, planes: int = 1, scale_lr: float = 3e-3) -> dict[str, Any]:
    """A fresh optimizer state of one table: the arrays of :func:`dualbin.rules.state_spec` at zero, `step` 0 and an empty window."""
    rule = resolve(rule, planes, dim)
    spec = state_spec(rule, rows, dim, planes=planes, train_scale=scale_lr > 0)
    state: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
    state["step"] = 0
    if rule.every > 1:
        state |= {"pending_ids": np.zeros(0, np.int64), "pending_rows": np.zeros((0, dim), np.float32), "pending_steps": 0}
    return state


def update(
    bits: Array,
    scale: Array,
    state: dict[str, Any],
    ids: ArrayLike,
    dy: ArrayLike,
    *,
    rule: Rule,
    dim: int,
    planes: int = 1,
    lr: float = 1.0,
    scale_lr: float = 3e-3,
    seed: int = 0,
    first_row: int = 0,
) -> Stats:
    """One optimizer step on a table, in place: `bits` uint8 [V, planes * B], `scale` float32 [V, 1] and `state` change.

    Args:
        ids, dy: ids [N] and output gradient [N, D] of the step; ids outside [0, V) are padding. Without a valid id nothing happens.
        rule, lr, scale_lr, seed: as in the optimizers; `lr`, `scale_lr` and the rule's floats are used as float32.
        planes: of the table; what the rule leaves open is looked up for it.
        first_row: of a table that is a range of the rows of a larger one, the row where it starts there. With it, and `step` counted for
            the whole table, its rows become what they become in the whole table.
    """
    check_float("lr", lr, low=0.0)
    check_float("scale_lr", scale_lr, low=0.0)
    check_int("first_row", first_row, low=0)
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim, planes)
    rule = resolve(rule, planes, dim)
    unique, rows = row_gradient(ids, dy, len(bits))
    if len(unique) == 0:
        return Stats(0, 0, 0, 0)
    if rule.every > 1:
        window = _add_to_window(state, unique, rows, rule.every, len(bits))
        if window is None:
            return Stats(0, 0, 0, 0)
        unique, rows = window
    stats = _update_rows(bits, scale, state, unique, rows, rule, np.float32(lr), np.float32(scale_lr), seed, first_row)
    state["step"] += 1
    return stats


def _add_to_window(state: dict[str, Any], unique: Array, rows: Array, every: int, table_rows: int) -> tuple[Array, Array] | None:
    """Add a step's row sums to the window of `every`; the window's sums when it is full."""
    merged = row_gradient(
        np.concatenate([state["pending_ids"], unique]), np.concatenate([state["pending_rows"], rows]), table_rows
    )  # old + new, since the old rows come first
    full = state["pending_steps"] + 1 >= every  # above it where a run goes on with a smaller one
    state["pending_steps"] = 0 if full else state["pending_steps"] + 1
    state["pending_ids"], state["pending_rows"] = (merged[0][:0], merged[1][:0]) if full else merged
    return merged if full else None


def _update_rows(
    bits: Array,
    scale: Array,
    state: Mapping[str, Any],
    ids: Array,
    rows: Array,
    rule: Rule,
    lr: np.float32,
    scale_lr: np.float32,
    seed: int,
    first_row: int,
) -> Stats:
    """One update of distinct rows `ids` [U] by their summed gradients `rows` [U, D]."""
    dim = rows.shape[1]
    old_scale = scale[ids, 0]
    finite = np.isfinite(rows).all(axis=1) & np.isfinite(old_scale)
    skipped = int(((old_scale != 0) & ~finite).sum())
    keep = (old_scale != 0) & finite
    ids, rows, old_scale = ids[keep], rows[keep], old_scale[keep]
    if len(ids) == 0:
        return Stats(0, 0, skipped, 0)

    uniform = random16(seed, state["step"], first_row + ids, dim)
    per_row = {name: state[name][ids] for name in STATE_ARRAYS | RECORD if name in state}
    step = step_rows(rule, bits[ids], old_scale, per_row, rows, lr, scale_lr, uniform)
    width = packed_width(dim)
    bits[ids, :width] ^= pack_bits(step.flips)
    bits[ids, width:] = step.served
    scale[ids, 0] = step.scale
    for name, array in step.state.items():
        state[name][ids] = array
    return Stats(int(step.flips.sum()), len(ids), skipped, int(step.clipped.sum()))


# ---- checks ----------------------------------------------------------------------------------------------------------------------------


def _flat_ids(ids: Array) -> Array:
    if ids.dtype not in (np.int32, np.int64):
        msg = f"ids must be int32 or int64, got {ids.dtype}"
        raise TypeError(msg)
    return ids.reshape(-1).astype(np.int64)


__all__ = [
    "SUM_BLOCK",
    "Stats",
    "average",
    "average_step",
    "bag_counts",
    "bag_gradient",
    "bag_weight_gradient",
    "evidence",
    "init_state",
    "lookup",
    "lookup_bag",
    "ngram_rows",
    "pack",
    "power",
    "put_rows",
    "quantise",
    "random16",
    "read_planes",
    "route",
    "row_gradient",
    "row_rms",
    "row_scale",
    "scale_gradient",
    "segment_sum",
    "slot_means",
    "take_rows",
    "unpack",
    "update",
    "weights",
    "with_planes",
    "write_planes",
    "zone_growth",
]
