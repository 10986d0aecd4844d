"""What the rules do to rows whose gradients are summed: part of :mod:`dualbin.reference`.

U is the number of rows, D that of weights in a row; a magnitude `a` is the integer of all planes below the sign, those that the table
holds and those of the counter.

These functions are also what JAX runs on platforms without the native library: `xp` is the array module, `numpy` or `jax.numpy` with 64-bit
types. They change no array, and each operation is one that both round alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dualbin._reference_planes import MIN_SCALE, levels_of, read_planes, write_planes
from dualbin._schema import packed_width
from dualbin.rules import Bop, Counter, Rule

Array = Any  #: of the array module

GRADIENT_BITS = 14  #: a row is scaled to integers of at most 2**14: they fit 16 bits, and their squares add up exactly
MAX_COEFFICIENT = 1 << 30
MAX_MEAN_SQUARE = 2.0**100
TWO_LN2_Q16 = 90852  #: 2 ln 2 in 1/65536


class RowStep(NamedTuple):
    """What an update does to rows."""

    flips: Array  #: bool [U, D]
    served: Array  #: uint8 [U, (planes-1) * B]: the magnitude planes of the table after the update
    scale: Array  #: float32 [U]
    state: dict[str, Array]  #: the rows of the state arrays that it was given
    clipped: Array  #: bool [U, D]: counters at their maximum


def step_rows(
    rule: Rule,
    bits: Array,
    scale: Array,
    state: Mapping[str, Array],
    rows: Array,
    lr: Any,
    scale_lr: Any,
    uniform: Array,
    xp: Any = np,
) -> RowStep:
    """One update of rows by their summed gradients.

    Args:
        rule: with every value resolved for the planes of the table.
        bits: uint8 [U, planes * B] before the update.
        scale: float32 [U], not 0.
        state: the rows of the state arrays by the names of docs/design.md, "Data".
        rows: float32 [U, D], finite.
        lr, scale_lr: float32.
        uniform: int64 [U, D], 16 random bits for every weight; `Counter` alone reads them.
    """
    dim = rows.shape[1]
    width = packed_width(dim)
    planes = bits.shape[1] // width
    new = dict(state)
    q, exponent = quantise(rows, xp)
    if "count" in new:
        new["count"] = new["count"] + (new["count"] < np.iinfo(np.int32).max).astype(np.int32)
    if rule.sums_squares:
        new["squares"] = add_squares(new["squares"], q, exponent, xp)
    levels = levels_of(bits, dim, xp).astype(np.int64)
    signs = xp.sign(levels)
    new_scale = scale
    if "scale_m" in new:
        slope = times_power_of_two((levels * q).sum(axis=1), exponent - GRADIENT_BITS - (planes - 1))
        m, v, moved = adam_scale(new["scale_m"], new["scale_v"], new["count"], scale, slope, lr, scale_lr, xp)
        trains = scale_lr > 0
        new |= {"scale_m": xp.where(trains, m, new["scale_m"]), "scale_v": xp.where(trains, v, new["scale_v"])}
        new_scale = xp.where(trains, moved, scale)

    turn = xp.where(scale > 0, 1, -1)[:, None]
    served, clipped = bits[:, width:], xp.zeros((len(rows), dim), bool)
    if isinstance(rule, Counter):
        hidden = new.get("counter", served[:, :0])
        magnitude = read_planes(xp.concatenate([served, hidden], axis=1), dim, xp)
        flips, magnitude = counter(rule, q, exponent, signs, turn, magnitude, lr, new.get("squares"), new.get("count"), uniform, xp)
        packed = write_planes(magnitude, rule.bits - 1, xp)
        served = packed[:, : served.shape[1]]
        if "counter" in new:
            new["counter"] = packed[:, served.shape[1] :]
        if rule.bits > 1:
            clipped = magnitude == (1 << (rule.bits - 1)) - 1
    elif isinstance(rule, Bop):
        flips, new["ema"] = bop(rule, new["ema"], new["count"], q, signs * turn, lr, xp)
    else:
        flips = signs * turn * xp.sign(rows) > 0
    return RowStep(flips, served, new_scale, new, clipped)


def times_power_of_two(x: Array, exponent: Array) -> Array:
    """`x * 2**exponent`, float64 of any number and integers: exact, for a power that is a normal number."""
    return x.astype(np.float64) * ((exponent.astype(np.int64) + 1023) << 52).view(np.float64)


def quantise(rows: Array, xp: Any = np) -> tuple[Array, Array]:
    """Scale every row to integers: `q = rint(g * 2**(14-E))` int64 [U, D], with E [U] the exponent of the row's largest magnitude."""
    _, exponent = xp.frexp(xp.abs(rows).max(axis=1, initial=0).astype(np.float64))
    return xp.rint(times_power_of_two(rows, (GRADIENT_BITS - exponent)[:, None])).astype(np.int64), exponent


def row_rms(q: Array, xp: Any = np) -> Array:
    """The root mean square of every row of integers, rounded down, at least 1; int64 [U]."""
    mean = (q * q).sum(axis=1) // q.shape[1]
    return xp.maximum(xp.floor(xp.sqrt(mean.astype(np.float64))).astype(np.int64), 1)


def add_squares(squares: Array, q: Array, exponent: Array, xp: Any = np) -> Array:
    """The sums of mean squares float32 [U] with those of the rows q added: what `norm="adagrad"` divides by the root of.

    Row-wise Adagrad (Duchi, Hazan, Singer 2011, JMLR 12; one sum a row as in DLRM, arXiv:1906.00091).
    """
    mean = times_power_of_two((q * q).sum(axis=1).astype(np.float64) / float(q.shape[1]), 2 * (exponent - GRADIENT_BITS))
    return (squares.astype(np.float64) + xp.minimum(mean, MAX_MEAN_SQUARE)).astype(np.float32)


def coefficient(rate: Array, rms: Array, squares: Array | None, exponent: Array, xp: Any = np) -> Array:
    """Levels per unit of q, in 2**-32: `rate * 2**8` over the rms of the update, or over the root of `squares`; int64 [U].

    The root of a sum is not below its last addend, so with `squares` the quotient by the rms is an upper bound: it holds where a tiny mean
    square is lost in float32.
    """
    by_rms = xp.minimum((rate << 8) // rms, MAX_COEFFICIENT)
    if squares is None:
        return by_rms
    root = times_power_of_two(xp.sqrt(squares.astype(np.float64)), GRADIENT_BITS - exponent)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = xp.where(root > 0, (rate << 8).astype(np.float64) / root, float(MAX_COEFFICIENT))
    return xp.minimum(xp.minimum(quotient, float(MAX_COEFFICIENT)).astype(np.int64), by_rms)


def evidence(q: Array, signs: Array, *, center: bool, xp: Any = np) -> Array:
    """`s * q` of rows [U, D], int64; with `center` less its mean over the row (towards 0), which is the business of the scale."""
    e = signs.astype(np.int64) * q
    total = e.sum(axis=1, keepdims=True)
    return e - xp.sign(total) * (xp.abs(total) // q.shape[1]) if center else e


def zone_growth(anneal_q8: int, count: Array, xp: Any = np) -> Array:
    """`floor(256 * sqrt(2 ln(1 + n / anneal)))` for every count n: what is added to a dead zone, in 1/256 rms, int64.

    In integers, since libraries differ in the last bit of a logarithm: log2 to 16 binary places, by repeated squaring.
    """
    x = 65536 + (count.astype(np.int64) << 24) // anneal_q8
    length = xp.frexp(x.astype(np.float64))[1].astype(np.int64) - 1  # exact: x is below 2**53
    mantissa = xp.where(length <= 31, x << xp.maximum(31 - length, 0), x >> xp.maximum(length - 31, 0)).astype(np.uint64)
    log2 = (length - 16) << 16
    for place in range(15, -1, -1):
        mantissa = (mantissa * mantissa) >> np.uint64(31)
        carry = mantissa >> np.uint64(32)
        mantissa = mantissa >> carry
        log2 = log2 | (carry.astype(np.int64) << place)
    return xp.floor(xp.sqrt(((log2 * TWO_LN2_Q16) >> 16).astype(np.float64))).astype(np.int64)


def counter(
    rule: Counter,
    q: Array,
    exponent: Array,
    signs: Array,
    turn: Array,
    magnitude: Array,
    lr: Any,
    squares: Array | None,
    count: Array | None,
    uniform: Array,
    xp: Any = np,
) -> tuple[Array, Array]:
    """One step of the counters of rows.

    Args:
        rule: with every value resolved.
        q, exponent: of :func:`quantise`.
        signs: +1/-1 [U, D] before the step.
        turn: +1/-1 [U, 1], the sign of the row's scale: a positive `turn * signs * gradient` is evidence for a flip.
        magnitude: a int64 [U, D], below 2**(bits-1).
        lr: float32.
        squares, count: float32 [U] and int32 [U], this update included, where the rule reads them.
        uniform: int64 [U, D], 16 random bits for every weight.

    Returns:
        bool [U, D], the flips, and the new magnitudes.
    """
    native = rule.native()
    rms = row_rms(q, xp)
    share = xp.asarray(lr).astype(np.float64)
    wanted = (1.0 if rule.bits == 1 else share) * float(np.float32(native["eta"])) * 2.0**24
    rate = xp.rint(xp.minimum(wanted, 2.0**47)).astype(np.int64)
    coef = coefficient(rate, rms, squares if rule.norm == "adagrad" else None, exponent, xp)[:, None]
    growth = zone_growth(int(native["anneal_q8"]), count, xp) if native["anneal_q8"] else 0
    zone = (((int(native["dead_zone_q8"]) + growth) * rms) >> 8)[:, None]
    against = -turn * evidence(q, signs, center=bool(native["center"]), xp=xp)  # positive: for the sign as it is
    over = xp.sign(against) * xp.maximum(xp.abs(against) - zone, 0)
    if rule.bits == 1:  # a probability, times lr
        chance = xp.minimum((xp.maximum(-over, 0) * coef) >> 16, 1 << 16)
        return (chance * xp.rint(xp.minimum(share * 2.0**16, 2.0**30)).astype(np.int64)) >> 16 > uniform, magnitude
    moved = magnitude + ((over * coef + (uniform << 16)) >> 32)  # stochastic rounding: the floor of a level and a uniform part of one
    flips = moved < 0
    return flips, xp.minimum(xp.where(flips, -moved - 1, moved), (1 << (rule.bits - 1)) - 1)


def bop(rule: Bop, m: Array, count: Array, q: Array, toward_flip: Array, lr: Any, xp: Any = np) -> tuple[Array, Array]:
    """Flips and the new moving average, every operation rounded to float32."""
    normalised = q.astype(np.float32) / row_rms(q, xp).astype(np.float32)[:, None]
    gamma = xp.maximum(lr * np.float32(rule.gamma), np.float32(1) / count.astype(np.float32))[:, None]
    m = m + gamma * (normalised - m)
    return toward_flip.astype(np.float32) * m > np.float32(rule.tau), m


def adam_scale(
    m: Array, v: Array, count: Array, scale: Array, gradient: Array, lr: Any, scale_lr: Any, xp: Any = np
) -> tuple[Array, Array, Array]:
    """Row-wise Adam (Kingma & Ba 2015, arXiv:1412.6980) in float64: new moments and scale, stored as float32."""
    g = xp.clip(gradient, -(2.0**60), 2.0**60).astype(np.float32).astype(np.float64)
    m = (0.9 * m.astype(np.float64) + 0.1 * g).astype(np.float32)
    v = (0.99 * v.astype(np.float64) + 0.01 * (g * g)).astype(np.float32)
    m_hat = m.astype(np.float64) / (1.0 - power(0.9, count, xp))
    v_hat = v.astype(np.float64) / (1.0 - power(0.99, count, xp))
    rate = xp.asarray(lr).astype(np.float64) * xp.asarray(scale_lr).astype(np.float64)
    step = rate * (m_hat / (xp.sqrt(v_hat) + 1e-12))
    return m, v, xp.maximum((scale.astype(np.float64) - step).astype(np.float32), MIN_SCALE)


def power(base: float, n: Array, xp: Any = np) -> Array:
    """`base**n`, float64, of integers below 2**31, by squaring: the same products in the same order, which no library's pow promises."""
    result = xp.ones(n.shape, np.float64)
    for bit in range(31):
        result = xp.where((n >> bit) & 1 == 1, result * base, result)
        base *= base
    return result
