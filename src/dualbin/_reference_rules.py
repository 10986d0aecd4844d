"""What the rules do to rows whose gradients are summed, in NumPy: part of :mod:`dualbin.reference`.

U is the number of rows, D that of weights in a row; a magnitude `a` is the integer of all planes below the sign, those that the table
holds and those of the counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualbin._reference_hash import random16
from dualbin._reference_planes import MIN_SCALE
from dualbin.rules import Bop, Counter

Array = NDArray[Any]

GRADIENT_BITS = 14  #: a row is scaled to integers of at most 2**14: they fit 16 bits, and their squares add up exactly
MAX_COEFFICIENT = 1 << 30
MAX_MEAN_SQUARE = 2.0**100
TWO_LN2_Q16 = 90852  #: 2 ln 2 in 1/65536


def quantise(rows: Array) -> tuple[Array, Array]:
    """Scale every row to integers: `q = rint(g * 2**(14-E))` int64 [U, D], with E [U] the exponent of the row's largest magnitude."""
    _, exponent = np.frexp(np.abs(rows).max(axis=1, initial=0).astype(np.float64))
    q = np.rint(np.ldexp(rows.astype(np.float64), (GRADIENT_BITS - exponent)[:, None]))
    return q.astype(np.int64), exponent


def row_rms(q: Array) -> Array:
    """The root mean square of every row of integers, rounded down, at least 1; int64 [U]."""
    mean = (q * q).sum(axis=1) // q.shape[1]
    return np.maximum(np.floor(np.sqrt(mean.astype(np.float64))).astype(np.int64), 1)


def add_squares(squares: Array, q: Array, exponent: Array) -> Array:
    """The sums of mean squares float32 [U] with those of the rows q added: what `norm="adagrad"` divides by the root of.

    Row-wise Adagrad (Duchi, Hazan, Singer 2011, JMLR 12; one sum a row as in DLRM, arXiv:1906.00091).
    """
    mean = np.ldexp((q * q).sum(axis=1).astype(np.float64) / float(q.shape[1]), 2 * (exponent - GRADIENT_BITS))
    return (squares.astype(np.float64) + np.minimum(mean, MAX_MEAN_SQUARE)).astype(np.float32)


def coefficient(rate: int, rms: Array, squares: Array | None, exponent: Array) -> Array:
    """Levels per unit of q, in 2**-32: `rate * 2**8` over the rms of the update, or over the root of `squares`; int64 [U].

    The root of a sum is not below its last addend, so with `squares` the quotient by the rms is an upper bound: it holds where a tiny mean
    square is lost in float32.
    """
    by_rms = np.minimum((rate << 8) // rms, MAX_COEFFICIENT)
    if squares is None:
        return by_rms
    root = np.ldexp(np.sqrt(squares.astype(np.float64)), GRADIENT_BITS - exponent)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(root > 0, float(rate << 8) / root, float(MAX_COEFFICIENT))
    return np.minimum(np.minimum(quotient, float(MAX_COEFFICIENT)).astype(np.int64), by_rms)


def evidence(q: Array, signs: Array, *, center: bool) -> Array:
    """`s * q` of rows [U, D], int64; with `center` less its mean over the row (towards 0), which is the business of the scale."""
    e = signs.astype(np.int64) * q
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


def counter(
    rule: Counter,
    state: Mapping[str, Any],
    ids: Array,
    q: Array,
    exponent: Array,
    signs: Array,
    turn: Array,
    magnitude: Array,
    lr: np.float32,
    seed: int,
    step: int,
    rows: Array,
) -> tuple[Array, Array]:
    """One step of the counters of rows `ids` of a state.

    Args:
        rule: with every value resolved.
        q, exponent: of :func:`quantise`.
        signs: +1/-1 [U, D] before the step.
        turn: +1/-1 [U, 1], the sign of the row's scale: a positive `turn * signs * gradient` is evidence for a flip.
        magnitude: a int64 [U, D], below 2**(bits-1).
        rows: the ids in the whole table, for random numbers.

    Returns:
        bool [U, D], the flips, and the new magnitudes.
    """
    native = rule.native()
    rms = row_rms(q)
    rate = int(np.rint(min((1.0 if rule.bits == 1 else float(lr)) * float(np.float32(native["eta"])) * 2.0**24, 2.0**47)))
    coef = coefficient(rate, rms, state["squares"][ids] if rule.norm == "adagrad" else None, exponent)[:, None]
    growth = zone_growth(int(native["anneal_q8"]), state["count"][ids]) if native["anneal_q8"] else 0
    zone = (((int(native["dead_zone_q8"]) + growth) * rms) >> 8)[:, None]
    against = -turn * evidence(q, signs, center=bool(native["center"]))  # positive: for the sign as it is
    over = np.sign(against) * np.maximum(np.abs(against) - zone, 0)
    uniform = random16(seed, step, rows, q.shape[1])
    if rule.bits == 1:  # a probability, times lr
        chance = np.minimum((np.maximum(-over, 0) * coef) >> 16, 1 << 16)
        return (chance * int(np.rint(min(float(lr) * 2.0**16, 2.0**30)))) >> 16 > uniform, magnitude
    moved = magnitude + ((over * coef + (uniform << 16)) >> 32)  # stochastic rounding: the floor of a level and a uniform part of one
    flips = moved < 0
    return flips, np.minimum(np.where(flips, -moved - 1, moved), (1 << (rule.bits - 1)) - 1)


def bop(rule: Bop, state: Mapping[str, Any], ids: Array, q: Array, toward_flip: Array, lr: np.float32) -> Array:
    normalised = q.astype(np.float32) / row_rms(q).astype(np.float32)[:, None]
    mean_rate = np.float32(1) / state["count"][ids].astype(np.float32)
    gamma = np.maximum(lr * np.float32(rule.gamma), mean_rate)[:, None]
    m = state["ema"][ids]
    m = m + gamma * (normalised - m)
    state["ema"][ids] = m
    return toward_flip.astype(np.float32) * m > np.float32(rule.tau)


def adam_scale(state: Mapping[str, Any], ids: Array, scale: Array, gradient: Array, rate: float) -> Array:
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
