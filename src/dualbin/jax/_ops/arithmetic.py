"""What updates and averages do to rows, in jax.numpy, for platforms without native handlers.

The arithmetic is that of docs/design.md in 64-bit types, which are switched on for it alone. It gives the same bits as the
native library except where XLA adds the occurrences of a row in another order, contracts multiply-adds (the moving average of `Bop`, Adam
of the scale), or flushes subnormal moments to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._checks import MIN_SCALE
from dualbin._reference_average import AVERAGE_WORD, THRESHOLD_PAIR
from dualbin.jax._ops.lookup import unpack
from dualbin.jax._ops.sums import add_by_slot
from dualbin.rules import Bop, Counter, Rule

_FINE_BITS = 24
_COARSE_SHIFT = 9
_TWO_LN2_Q16 = 90852


def wide(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return call


def pack(values: Array) -> Array:
    return jnp.packbits(values, axis=-1, bitorder="little")


@wide
def update_rows(
    bits: Array, scale: Array, state: Mapping[str, Array], context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule
) -> tuple[Array, Array, dict[str, Array], Array]:
    """Mask uint8 `[N, B]` and new scale float32 `[N, 1]`, zero except at a row's first occurrence; the new state and the stats."""
    rows, state = bits.shape[0], dict(state)
    first = first_occurrence(ids, rows)
    known = jnp.where(first, ids, 0)
    g = _sums_at_first(ids, dy, rows)
    old_scale = scale[known, 0]
    finite = jnp.isfinite(g).all(1) & jnp.isfinite(old_scale)
    candidate = first & (old_scale != 0)
    keep, skipped = candidate & finite, candidate & ~finite
    places = jnp.where(keep, ids, rows)
    g = jnp.where(keep[:, None], g, 0)
    lr, scale_lr = (lax.bitcast_convert_type(context[k], jnp.float32) for k in (6, 7))

    signs = unpack(bits[known], dim).astype(jnp.int64) * 2 - 1
    q, exponent = _quantise(g)
    new_scale, updates = old_scale, None
    if "count" in state:
        updates = state["count"][known] + (state["count"][known] < np.iinfo(np.int32).max).astype(jnp.int32)
        state["count"] = state["count"].at[places].set(updates, mode="drop")
    if "scale_m" in state:
        slope = _power_of_two((signs * q).sum(1), exponent - _FINE_BITS)
        m, v, trained = _adam(state["scale_m"][known], state["scale_v"][known], old_scale, slope, updates, lr, scale_lr)
        trains = (scale_lr > 0) & keep
        new_scale = jnp.where(trains, trained, old_scale)
        active = jnp.where(trains, places, rows)
        for name, values in (("scale_m", m), ("scale_v", v)):
            state[name] = state[name].at[active].set(values, mode="drop")

    direction = jnp.where(old_scale > 0, 1, -1)[:, None]
    toward = signs * direction
    clipped = jnp.zeros((), jnp.int64)
    if isinstance(rule, Counter):
        bits16 = column_bits(row_keys(context, known), dim)
        planes = state["counter"][known] if "counter" in state else None
        flips, level = _count(rule, planes, q, signs, direction, lr, updates, bits16)
        if planes is not None:
            state["counter"] = state["counter"].at[places].set(_write_planes(level, rule.bits - 1), mode="drop")
            clipped = ((level == (1 << (rule.bits - 1)) - 1) & keep[:, None]).sum()
    elif isinstance(rule, Bop):
        flips, average = _bop(rule, state["ema"][known], q, toward, lr, updates)
        state["ema"] = state["ema"].at[places].set(average, mode="drop")
    else:
        flips = toward * jnp.sign(q) > 0
    flips = flips & keep[:, None]
    stats = _stats(flips.sum(), keep.sum(), skipped.sum(), clipped)
    written = jnp.where(first, new_scale, 0).astype(jnp.float32)[:, None]
    return pack(flips), written, state, stats


def first_occurrence(ids: Array, rows: int) -> Array:
    """bool `[N]`: the id is in the table, and none before it is the same."""
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    new = jnp.concatenate([jnp.ones((min(1, ids.shape[0]),), bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(ids.shape, bool).at[order].set(new) & (ids >= 0) & (ids < rows)


def _sums_at_first(ids: Array, dy: Array, rows: int) -> Array:
    """float32 `[N, D]`: the sum of a row where its id occurs first."""
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    start = jnp.searchsorted(ordered, ids)
    return add_by_slot(jnp.where((ids >= 0) & (ids < rows), order[start], ids.shape[0]), dy, ids.shape[0])


def _quantise(g: Array) -> tuple[Array, Array]:
    """`q = rint(g * 2**(24-E))` int64 `[N, D]` and E `[N]`, the exponent of the row's largest magnitude."""
    _, exponent = jnp.frexp(jnp.abs(g).max(1, initial=0).astype(jnp.float64))
    return jnp.rint(_power_of_two(g, _FINE_BITS - exponent[:, None])).astype(jnp.int64), exponent


def _power_of_two(x: Array, exponent: Array) -> Array:
    """`x * 2**exponent` in float64, exactly."""
    factor = lax.bitcast_convert_type((exponent.astype(jnp.int64) + 1023) << 52, jnp.float64)
    return x.astype(jnp.float64) * factor


def _row_rms(q: Array) -> tuple[Array, Array]:
    h = jnp.abs(q) >> _COARSE_SHIFT
    mean = (h * h).sum(1) // q.shape[1]
    return h, jnp.maximum(jnp.floor(jnp.sqrt(mean.astype(jnp.float64))).astype(jnp.int64), 1)


def _zone_growth(anneal_q8: int, updates: Array | None) -> Array | int:
    """`reference.zone_growth`."""
    if not anneal_q8:
        return 0
    assert updates is not None
    x = (65536 + (updates.astype(jnp.int64) << 24) // anneal_q8).astype(jnp.uint64)
    length = 63 - lax.clz(x)
    mantissa = jnp.where(length <= 31, x << jnp.where(length <= 31, 31 - length, 0), x >> jnp.where(length <= 31, 0, length - 31))
    log2 = (length.astype(jnp.int64) - 16) << 16
    for place in range(15, -1, -1):
        mantissa = (mantissa * mantissa) >> 31
        carry = mantissa >> 32
        mantissa = mantissa >> carry
        log2 = log2 | (carry.astype(jnp.int64) << place)
    return jnp.floor(jnp.sqrt(((log2 * _TWO_LN2_Q16) >> 16).astype(jnp.float64))).astype(jnp.int64)


def _count(
    rule: Counter, planes: Array | None, q: Array, signs: Array, direction: Array, lr: Array, updates: Array | None, bits16: Array
) -> tuple[Array, Array]:
    """Flips and the new levels of the rule `Counter`; `signs` are the weights, `direction` the signs of the scales."""
    native = rule.native()
    _, rms = _row_rms(q)
    share = lr.astype(jnp.float64)
    wanted = (1.0 if rule.bits == 1 else share) * float(np.float32(native["eta"])) * 2.0**24
    rate = jnp.rint(jnp.minimum(wanted, 2.0**47)).astype(jnp.int64)
    coef = jnp.minimum((rate << 8) // rms, 1 << 30)[:, None]
    zone = (((int(native["dead_zone_q8"]) + _zone_growth(int(native["anneal_q8"]), updates)) * rms) >> 8)[:, None]
    e = signs * q
    if native["center"]:
        total = e.sum(1, keepdims=True)
        e = e - jnp.sign(total) * (jnp.abs(total) // q.shape[1])
    t = (jnp.maximum((jnp.abs(e) >> _COARSE_SHIFT) - zone, 0) * coef) >> 16
    if rule.bits == 1:
        t = (jnp.minimum(t, 1 << 16) * jnp.rint(jnp.minimum(share * 2.0**16, 2.0**30)).astype(jnp.int64)) >> 16
    delta = (jnp.where(e * direction > 0, -t, t) + bits16) >> 16
    level = delta if planes is None else _read_planes(planes, rule.bits - 1, q.shape[1]) + delta
    flips = level < 0
    return flips, jnp.minimum(jnp.where(flips, -level - 1, level), (1 << (rule.bits - 1)) - 1)


def _bop(rule: Bop, m: Array, q: Array, toward: Array, lr: Array, updates: Any) -> tuple[Array, Array]:
    """Flips and the new moving average of the rule `Bop`."""
    h, rms = _row_rms(q)
    normalised = (jnp.sign(q) * h).astype(jnp.float32) / rms.astype(jnp.float32)[:, None]
    gamma = jnp.maximum(lr * np.float32(rule.gamma), np.float32(1) / updates.astype(jnp.float32))[:, None]
    average = m + gamma * (normalised - m)
    return toward.astype(jnp.float32) * average > np.float32(rule.tau), average


def _adam(m: Array, v: Array, scale: Array, slope: Array, updates: Any, lr: Array, scale_lr: Array) -> tuple[Array, Array, Array]:
    """Row-wise Adam of the scale in float64."""
    g = jnp.clip(slope, -(2.0**60), 2.0**60).astype(jnp.float32).astype(jnp.float64)
    m = (0.9 * m.astype(jnp.float64) + 0.1 * g).astype(jnp.float32)
    v = (0.99 * v.astype(jnp.float64) + 0.01 * (g * g)).astype(jnp.float32)
    m_hat = m.astype(jnp.float64) / (1.0 - _power(0.9, updates))
    v_hat = v.astype(jnp.float64) / (1.0 - _power(0.99, updates))
    step = (lr.astype(jnp.float64) * scale_lr.astype(jnp.float64)) * (m_hat / (jnp.sqrt(v_hat) + 1e-12))
    return m, v, jnp.maximum((scale.astype(jnp.float64) - step).astype(jnp.float32), np.float32(MIN_SCALE))


def _power(base: float, n: Array) -> Array:
    """`base**n` by squaring, as everywhere else."""
    result, factor = jnp.ones(n.shape, jnp.float64), base
    for bit in range(31):
        result = jnp.where((n >> bit) & 1 == 1, result * factor, result)
        factor *= factor
    return result


def row_keys(context: Array, ids: Array, *more: int) -> tuple[Array, Array]:
    """Two keys for every row: a hash of the seed, the step, the row of the whole table, and further words."""
    start = context[4].astype(jnp.uint64) | context[5].astype(jnp.uint64) << 32
    row = ids.astype(jnp.uint64) + start
    words = [*context[:4], row.astype(jnp.uint32), (row >> 32).astype(jnp.uint32), *map(np.uint32, more)]
    k0, k1 = (jnp.full(ids.shape, key, jnp.uint32) for key in (0x243F6A88, 0x85A308D3))
    for word in words:
        k0, k1 = _mix_last(_mix_first(k0 ^ word)), _mix_last(_mix_first(k1 ^ word))
    return k0, k1


def pair_bits(keys: tuple[Array, Array], pairs: Any) -> Array:
    """uint32 `[N, P]`: the random bits of the columns 2j (low half) and 2j + 1 for every j of the uint32 `[P]` `pairs`."""
    k0, k1 = keys
    return _mix_last(_mix_first(k0[:, None] + pairs * np.uint32(0x9E3779B9)) ^ k1[:, None])


def column_bits(keys: tuple[Array, Array], dim: int) -> Array:
    """16 uniform bits for every weight of the rows, int64 `[N, D]`."""
    x = pair_bits(keys, jnp.arange((dim + 1) // 2, dtype=jnp.uint32))
    halves = jnp.stack([x & np.uint32(0xFFFF), x >> np.uint32(16)], axis=2)
    return halves.reshape(x.shape[0], -1)[:, :dim].astype(jnp.int64)


@wide
def average_rows(bits_a: Array, scale_a: Array, bits_b: Array, scale_b: Array, context: Array, *, dim: int) -> list[Array]:
    """`reference.average`; a weight outside [0, 1] gives scales of NaN and the bits of a."""
    weight = lax.bitcast_convert_type(context[6], jnp.float32)
    x = (np.float32(1) - weight).astype(jnp.float64) * scale_a.astype(jnp.float64)
    y = weight.astype(jnp.float64) * scale_b.astype(jnp.float64)
    total = jnp.abs(x) + jnp.abs(y)
    valid = (weight >= 0) & (weight <= 1)
    share = jnp.where(valid, jnp.abs(y) / total, 0)
    negative = jnp.where(x != 0, x, y) < 0
    scale = jnp.where(valid, jnp.where(negative, -total, total).astype(jnp.float32), np.float32(np.nan))
    keys = row_keys(context, jnp.arange(bits_a.shape[0]), AVERAGE_WORD)
    chance = jnp.rint(jnp.where(share > 0, share, 0) * 2.0**32).astype(jnp.int64)
    threshold = (chance + (pair_bits(keys, jnp.full((1,), THRESHOLD_PAIR, jnp.uint32)) & np.uint32(0xFFFF)).astype(jnp.int64)) >> 16
    takes_b = pack((column_bits(keys, dim) < threshold) & valid)
    inverted = jnp.where((y < 0) != negative, ~bits_b, bits_b)
    return [(bits_a & ~takes_b) | (inverted & takes_b), jnp.where(jnp.isnan(scale), np.float32(np.nan), scale)]


def _mix_first(x: Array) -> Array:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    return x ^ (x >> np.uint32(15))


def _mix_last(x: Array) -> Array:
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _read_planes(counter: Array, planes: int, dim: int) -> Array:
    split = counter.reshape(counter.shape[0], planes, -1)
    return sum((unpack(split[:, p], dim).astype(jnp.int64) << p for p in range(planes)), jnp.zeros((), jnp.int64))


def _write_planes(levels: Array, planes: int) -> Array:
    return jnp.concatenate([pack((levels >> p & 1).astype(jnp.uint8)) for p in range(planes)], axis=1)


def _stats(*counts: Array) -> Array:
    wide = jnp.stack([x.astype(jnp.uint64) for x in counts])
    return jnp.stack([wide.astype(jnp.uint32), (wide >> 32).astype(jnp.uint32)], axis=1).reshape(8)
