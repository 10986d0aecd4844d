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

from dualbin import _checks
from dualbin._checks import check_float, check_int, check_table_arrays
from dualbin._reference_average import average, average_step  # noqa: F401  (as bags below: part of this module's interface)
from dualbin._reference_bag import SUM_BLOCK, bag_counts, bag_gradient, bag_weight_gradient, lookup_bag, sum_of_lanes  # noqa: F401
from dualbin._reference_hash import random16
from dualbin._schema import packed_width
from dualbin.rules import Bop, Counter, Rule, Sign, check_rule, state_spec

Array = NDArray[Any]

FINE_BITS = 24  #: a row is scaled to integers below 2**24 ...
COARSE_SHIFT = 9  #: ... and the rule sees these without their last 9 bits
MIN_SCALE = np.float32(_checks.MIN_SCALE)
TWO_LN2_Q16 = 90852  #: 2 ln 2 in 1/65536


class Stats(NamedTuple):
    """What one update did."""

    flips: int  #: bits flipped
    rows: int  #: rows updated
    skipped: int  #: rows left alone because their gradient or scale was not finite
    clipped: int  #: counters at their maximum after the update


# ---- data ------------------------------------------------------------------------------------------------------------------------------


def pack(w: ArrayLike) -> Array:
    """Pack the signs of a float table [V, D] into uint8 [V, B]; `x` gives 1 where `x >= 0`. NaN is a ValueError."""
    values = _float_matrix("w", w)
    bad = np.argwhere(np.isnan(values))
    if len(bad):
        msg = f"w must be free of NaN, got NaN at row {bad[0][0]}, column {bad[0][1]}"
        raise ValueError(msg)
    return np.packbits(values >= 0, axis=1, bitorder="little")


def unpack(bits: ArrayLike, dim: int) -> Array:
    """Unpack uint8 [V, B] to int8 +1/-1 [V, dim]."""
    packed = np.asarray(bits)
    check_int("dim", dim, low=1)
    if packed.dtype != np.uint8:
        msg = f"bits must be uint8, got {packed.dtype}"
        raise TypeError(msg)
    if packed.ndim != 2 or packed.shape[1] != packed_width(dim):
        msg = f"bits must have shape [V, {packed_width(dim)}] for dim {dim}, got {list(packed.shape)}"
        raise ValueError(msg)
    return np.unpackbits(packed, axis=1, count=dim, bitorder="little").astype(np.int8) * np.int8(2) - np.int8(1)


def row_scale(w: ArrayLike) -> Array:
    """Mean magnitude of every row of a float table [V, D], float32 [V, 1]; 1e-4 for a row of zeros (0 would mark a padding row).

    The mean is taken in float64 over 32 strided lanes, each in ascending order, and the lanes are added in halves: the order of a GPU warp.
    """
    values = np.abs(_float_matrix("w", w).astype(np.float64))
    mean = (sum_of_lanes(values)[:, None] / values.shape[1]).astype(np.float32)
    return np.where(mean > 0, mean, MIN_SCALE)


def lookup(bits: ArrayLike, scale: ArrayLike, ids: ArrayLike, dim: int, dtype: Any = np.float32) -> Array:
    """Rows of a table: `scale[id] * (+1 or -1)`, shape `ids.shape + (dim,)`. The scale is rounded to `dtype` once; scale 0 gives +0.0.

    Raises IndexError for an id outside [0, V).
    """
    bits, scale, ids = np.asarray(bits), np.asarray(scale), np.asarray(ids)
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim)
    flat = _flat_ids(ids)
    bad = np.flatnonzero((flat < 0) | (flat >= len(bits)))
    if len(bad):
        msg = f"id {flat[bad[0]]} at position {bad[0]} is outside [0, {len(bits)})"
        raise IndexError(msg)
    magnitude = scale[flat].astype(dtype)
    values = np.where(unpack(bits[flat], dim) > 0, magnitude, -magnitude)
    return np.where(scale[flat] == 0, np.zeros((), dtype), values).reshape((*ids.shape, dim))


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


def scale_gradient(bits: ArrayLike, rows: ArrayLike, dim: int) -> Array:
    """dL/dscale of rows with packed bits [U, B] and row gradients float32 [U, D]: `sum_d w * g`, float64 [U] (not yet rounded to float32).

    Summed exactly, in integers of the row's largest magnitude times 2**-24.
    """
    q, exponent = quantise(np.asarray(rows, np.float32))
    aligned = (unpack(bits, dim).astype(np.int64) * q).sum(axis=1)
    return np.ldexp(aligned.astype(np.float64), exponent - FINE_BITS)


def quantise(rows: Array) -> tuple[Array, Array]:
    """Scale every row to integers: `q = rint(g * 2**(24-E))` int64 [U, D], with E [U] the exponent of the row's largest magnitude."""
    _, exponent = np.frexp(np.abs(rows).max(axis=1, initial=0).astype(np.float64))
    q = np.rint(np.ldexp(rows.astype(np.float64), (FINE_BITS - exponent)[:, None]))
    return q.astype(np.int64), exponent


def row_rms(q: Array) -> tuple[Array, Array]:
    """Coarse magnitudes `h = |q| >> 9` and the root mean square of every row of them, at least 1; both int64."""
    h = np.abs(q) >> COARSE_SHIFT
    mean = (h * h).sum(axis=1) // q.shape[1]
    return h, np.maximum(np.floor(np.sqrt(mean.astype(np.float64))).astype(np.int64), 1)


# ---- update ----------------------------------------------------------------------------------------------------------------------------


def init_state(rule: Rule, rows: int, dim: int, *, scale_lr: float = 3e-3) -> dict[str, Any]:
    """A fresh optimizer state of one table: the arrays of :func:`dualbin.rules.state_spec` at zero, `step` 0 and an empty window."""
    spec = state_spec(check_rule(rule), rows, dim, train_scale=scale_lr > 0)
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
    lr: float = 1.0,
    scale_lr: float = 3e-3,
    seed: int = 0,
    first_row: int = 0,
) -> Stats:
    """One optimizer step on a table, in place: `bits` uint8 [V, B], `scale` float32 [V, 1] and `state` change.

    Args:
        ids, dy: ids [N] and output gradient [N, D] of the step; ids outside [0, V) are padding. Without a valid id nothing happens.
        rule, lr, scale_lr, seed: as in the optimizers; `lr`, `scale_lr` and the rule's floats are used as float32.
        first_row: of a table that is a range of the rows of a larger one, the row where it starts there. With it, and `step` counted for
            the whole table, its rows become what they become in the whole table.
    """
    check_float("lr", lr, low=0.0)
    check_float("scale_lr", scale_lr, low=0.0)
    check_int("first_row", first_row, low=0)
    check_table_arrays(bits.shape, str(bits.dtype), scale.shape, str(scale.dtype), dim)
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
    full = state["pending_steps"] + 1 == every
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

    w = unpack(bits[ids], dim)
    q, _ = quantise(rows)
    new_scale = old_scale
    if "count" in state:
        state["count"][ids] += state["count"][ids] < np.iinfo(np.int32).max
    if "scale_m" in state and scale_lr > 0:
        new_scale = _adam_scale(state, ids, old_scale, scale_gradient(bits[ids], rows, dim), float(lr) * float(scale_lr))

    sign = np.where(old_scale > 0, 1, -1)[:, None]
    toward_flip = w * sign  # a positive product with the gradient is evidence for a flip
    clipped = 0
    if isinstance(rule, Counter):
        flips, clipped = _counter(rule, state, ids, q, w, sign, lr, seed, first_row)
    elif isinstance(rule, Bop):
        flips = _bop(rule, state, ids, q, toward_flip, lr)
    else:
        assert isinstance(rule, Sign)
        flips = toward_flip * np.sign(rows) > 0
    bits[ids] ^= np.packbits(flips, axis=1, bitorder="little")
    scale[ids, 0] = new_scale
    return Stats(int(flips.sum()), len(ids), skipped, clipped)


def evidence(q: Array, w: Array, *, center: bool) -> Array:
    """`w * q` of rows [U, D], int64; with `center` less its mean over the row (towards 0), which is the business of the scale."""
    e = w.astype(np.int64) * q
    total = e.sum(axis=1, keepdims=True)
    return e - np.sign(total) * (np.abs(total) // q.shape[1]) if center else e


def zone_growth(anneal_q8: int, count: Array) -> Array:
    """`floor(256 * sqrt(2 ln(1 + n / anneal)))` for every count n: what is added to a dead zone, in 1/256 rms, int64.

    In integers, since libraries differ in the last bit of a logarithm: log2 to 16 binary places, by repeated squaring.
    """
    x = 65536 + (count.astype(np.int64) << 24) // anneal_q8
    length = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1  # exact: x is below 2**53
    mantissa = np.where(length <= 31, x << np.maximum(31 - length, 0), x >> np.maximum(length - 31, 0)).astype(np.uint64)
    log2 = (length - 16) << 16
    for place in range(15, -1, -1):
        mantissa = (mantissa * mantissa) >> np.uint64(31)
        carry = mantissa >> np.uint64(32)
        mantissa >>= carry
        log2 |= carry.astype(np.int64) << place
    return np.floor(np.sqrt(((log2 * TWO_LN2_Q16) >> 16).astype(np.float64))).astype(np.int64)


def _counter(
    rule: Counter, state: Mapping[str, Any], ids: Array, q: Array, w: Array, sign: Array, lr: np.float32, seed: int, first_row: int
) -> tuple[Array, int]:
    native = rule.native()
    _, rms = row_rms(q)
    step = 1.0 if rule.bits == 1 else float(lr)
    rate = int(np.rint(min(step * float(np.float32(native["eta"])) * 2.0**24, 2.0**47)))
    coef = np.minimum((rate << 8) // rms, 1 << 30)[:, None]
    growth = zone_growth(int(native["anneal_q8"]), state["count"][ids]) if native["anneal_q8"] else 0
    zone = (((int(native["dead_zone_q8"]) + growth) * rms) >> 8)[:, None]
    e = evidence(q, w, center=bool(native["center"]))
    t = (np.maximum((np.abs(e) >> COARSE_SHIFT) - zone, 0) * coef) >> 16
    if rule.bits == 1:  # a probability, times lr
        t = (np.minimum(t, 1 << 16) * int(np.rint(min(float(lr) * 2.0**16, 2.0**30)))) >> 16
    delta = (np.where(e * sign > 0, -t, t) + random16(seed, state["step"], first_row + ids, q.shape[1])) >> 16
    level = _read_planes(state["counter"][ids], q.shape[1]) if rule.bits > 1 else np.zeros_like(q)
    level = level + delta
    flips = level < 0
    top = (1 << (rule.bits - 1)) - 1
    level = np.minimum(np.where(flips, -level - 1, level), top)
    if rule.bits == 1:
        return flips, 0
    state["counter"][ids] = _write_planes(level, rule.bits - 1)
    return flips, int((level == top).sum())


def _bop(rule: Bop, state: Mapping[str, Any], ids: Array, q: Array, toward_flip: Array, lr: np.float32) -> Array:
    h, rms = row_rms(q)
    normalised = (np.sign(q) * h).astype(np.float32) / rms.astype(np.float32)[:, None]
    mean_rate = np.float32(1) / state["count"][ids].astype(np.float32)
    gamma = np.maximum(lr * np.float32(rule.gamma), mean_rate)[:, None]
    m = state["ema"][ids]
    m = m + gamma * (normalised - m)
    state["ema"][ids] = m
    return toward_flip.astype(np.float32) * m > np.float32(rule.tau)


def _adam_scale(state: Mapping[str, Any], ids: Array, scale: Array, gradient: Array, rate: float) -> Array:
    """Row-wise Adam (Kingma & Ba 2015, arXiv:1412.6980) in float64; moments and scale are stored as float32."""
    g = np.clip(gradient, -(2.0**60), 2.0**60).astype(np.float32).astype(np.float64)
    m = (0.9 * state["scale_m"][ids].astype(np.float64) + 0.1 * g).astype(np.float32)
    v = (0.99 * state["scale_v"][ids].astype(np.float64) + 0.01 * (g * g)).astype(np.float32)
    state["scale_m"][ids], state["scale_v"][ids] = m, v
    counts = state["count"][ids]
    m_hat = m.astype(np.float64) / (1.0 - np.array([power(0.9, int(n)) for n in counts]))
    v_hat = v.astype(np.float64) / (1.0 - np.array([power(0.99, int(n)) for n in counts]))
    step = rate * (m_hat / (np.sqrt(v_hat) + 1e-12))
    return np.maximum((scale.astype(np.float64) - step).astype(np.float32), MIN_SCALE)


def power(base: float, n: int) -> float:
    """`base**n` by squaring: the same products in the same order everywhere, which a library's pow does not promise."""
    result = 1.0
    while n:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


def _read_planes(counter: Array, dim: int) -> Array:
    """Counter levels int64 [U, dim] from bit-planes uint8 [U, planes * B], least significant plane first."""
    planes = counter.reshape(len(counter), -1, packed_width(dim))
    levels = np.zeros((len(counter), dim), np.int64)
    for p in range(planes.shape[1]):
        levels |= np.unpackbits(planes[:, p], axis=1, count=dim, bitorder="little").astype(np.int64) << p
    return levels


def _write_planes(levels: Array, planes: int) -> Array:
    return np.concatenate([np.packbits((levels >> p) & 1, axis=1, bitorder="little") for p in range(planes)], axis=1)


# ---- checks ----------------------------------------------------------------------------------------------------------------------------


def _float_matrix(name: str, value: ArrayLike) -> Array:
    array = np.asarray(value)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        msg = f"{name} must be a float array, got {array.dtype}"
        raise TypeError(msg)
    if array.ndim != 2 or 0 in array.shape:
        msg = f"{name} must have shape [V, D] with V and D at least 1, got {list(array.shape)}"
        raise ValueError(msg)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _flat_ids(ids: Array) -> Array:
    if ids.dtype not in (np.int32, np.int64):
        msg = f"ids must be int32 or int64, got {ids.dtype}"
        raise TypeError(msg)
    return ids.reshape(-1).astype(np.int64)
