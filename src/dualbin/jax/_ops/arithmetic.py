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
from dualbin._record import join_record, split_record
from dualbin._reference_average import AVERAGE_WORD, THRESHOLD_PAIR
from dualbin._reference_rules import GRADIENT_BITS, MAX_COEFFICIENT, MAX_MEAN_SQUARE, TWO_LN2_Q16
from dualbin._schema import packed_width
from dualbin.jax._ops.lookup import unpack, unpack_levels
from dualbin.jax._ops.sums import add_by_slot
from dualbin.rules import Bop, Counter, Rule


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
    """Mask uint8 `[N, planes * B]` and new scale float32 `[N, 1]`, zero except at a row's first occurrence; the new state and the stats.

    `state` has the arrays as they lie in memory; the rule is resolved for the planes of the table.
    """
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

    old = bits[known]
    planes = old.shape[1] // packed_width(dim)
    weights = unpack_levels(old, dim).astype(jnp.int64)
    q, exponent = _quantise(g)
    new_scale, numbers = _update_numbers(state, known, q, exponent, weights, planes, rule, old_scale, lr, scale_lr)
    new_scale = jnp.where(keep, new_scale, old_scale)

    turn = jnp.where(old_scale > 0, 1, -1)[:, None]
    toward = jnp.sign(weights) * turn
    clipped = jnp.zeros((), jnp.int64)
    magnitudes: Array | None = None
    if isinstance(rule, Counter):
        bits16 = column_bits(row_keys(context, known), dim)
        hidden = state["counter"][known] if "counter" in state else old[:, :0]
        magnitude = _read_planes(jnp.concatenate([old[:, packed_width(dim) :], hidden], axis=1), dim)
        flips, magnitude = _count(rule, magnitude, q, exponent, jnp.sign(weights), turn, lr, numbers, bits16)
        magnitudes = _write_planes(magnitude, rule.bits - 1)
        if "counter" in state:
            below = magnitudes[:, (planes - 1) * packed_width(dim) :]
            state["counter"] = state["counter"].at[places].set(below, mode="drop")
        if rule.bits > 1:
            clipped = ((magnitude == (1 << (rule.bits - 1)) - 1) & keep[:, None]).sum()
    elif isinstance(rule, Bop):
        flips, average = _bop(rule, state["ema"][known], q, toward, lr, numbers["count"])
        state["ema"] = state["ema"].at[places].set(average, mode="drop")
    else:
        flips = toward * jnp.sign(g) > 0
    flips = flips & keep[:, None]
    mask = pack(flips)
    if magnitudes is not None and planes > 1:
        served = old[:, packed_width(dim) :] ^ magnitudes[:, : (planes - 1) * packed_width(dim)]
        mask = jnp.concatenate([mask, jnp.where(keep[:, None], served, np.uint8(0))], axis=1)
    for name, array in _with_numbers(state, numbers).items():
        state[name] = state[name].at[places].set(array, mode="drop")
    stats = _stats(flips.sum(), keep.sum(), skipped.sum(), clipped)
    written = jnp.where(first, new_scale, 0).astype(jnp.float32)[:, None]
    return mask, written, state, stats


def read_as(array: Array, dtype: str) -> Array:
    """The bits of an array as another type of the same size, for `dualbin._record`."""
    return lax.bitcast_convert_type(array, jnp.dtype(dtype))


def stack_columns(columns: list[Array]) -> Array:
    """Arrays `[V]` as the columns of one, for `dualbin._record`."""
    return jnp.stack(columns, axis=-1)


def _update_numbers(
    state: Mapping[str, Array],
    known: Array,
    q: Array,
    exponent: Array,
    weights: Array,
    planes: int,
    rule: Rule,
    scale: Array,
    lr: Array,
    scale_lr: Array,
) -> tuple[Array, dict[str, Array]]:
    """The new scales of the rows, and their new numbers by name: those of a record, or `count` and `squares` where there are any."""
    per_row = {name: state[name][known] for name in ("record", "count", "squares") if name in state}
    numbers = split_record(per_row, read_as)
    if "count" in numbers:
        numbers["count"] = numbers["count"] + (numbers["count"] < np.iinfo(np.int32).max).astype(jnp.int32)
    if rule.sums_squares:
        mean = _power_of_two((q * q).sum(1).astype(jnp.float64) / float(q.shape[1]), 2 * (exponent - GRADIENT_BITS))
        numbers["squares"] = (numbers["squares"].astype(jnp.float64) + jnp.minimum(mean, MAX_MEAN_SQUARE)).astype(jnp.float32)
    if "scale_m" in numbers:
        slope = _power_of_two((weights * q).sum(1), exponent - (GRADIENT_BITS + planes - 1))
        old_m, old_v = numbers["scale_m"], numbers["scale_v"]
        m, v, new = _adam(old_m, old_v, scale, slope, numbers["count"], lr, scale_lr)
        trains = scale_lr > 0
        numbers |= {"scale_m": jnp.where(trains, m, old_m), "scale_v": jnp.where(trains, v, old_v)}
        scale = jnp.where(trains, new, scale)
    return scale, numbers


def _with_numbers(state: Mapping[str, Array], numbers: Mapping[str, Array]) -> dict[str, Array]:
    """The numbers of rows as the arrays of a state have them."""
    return join_record(numbers, read_as, stack_columns) if "record" in state else dict(numbers)


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
    """`q = rint(g * 2**(14-E))` int64 `[N, D]` and E `[N]`, the exponent of the row's largest magnitude."""
    _, exponent = jnp.frexp(jnp.abs(g).max(1, initial=0).astype(jnp.float64))
    return jnp.rint(_power_of_two(g, GRADIENT_BITS - exponent[:, None])).astype(jnp.int64), exponent


def _power_of_two(x: Array, exponent: Array) -> Array:
    """`x * 2**exponent` in float64, exactly."""
    factor = lax.bitcast_convert_type((exponent.astype(jnp.int64) + 1023) << 52, jnp.float64)
    return x.astype(jnp.float64) * factor


def _row_rms(q: Array) -> Array:
    mean = (q * q).sum(1) // q.shape[1]
    return jnp.maximum(jnp.floor(jnp.sqrt(mean.astype(jnp.float64))).astype(jnp.int64), 1)


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
    return jnp.floor(jnp.sqrt(((log2 * TWO_LN2_Q16) >> 16).astype(jnp.float64))).astype(jnp.int64)


def _coefficient(rate: Array, rms: Array, squares: Array | None, exponent: Array) -> Array:
    """`reference.coefficient`."""
    by_rms = jnp.minimum((rate << 8) // rms, MAX_COEFFICIENT)
    if squares is None:
        return by_rms
    root = _power_of_two(jnp.sqrt(squares.astype(jnp.float64)), GRADIENT_BITS - exponent)
    quotient = jnp.where(root > 0, (rate << 8).astype(jnp.float64) / root, float(MAX_COEFFICIENT))
    return jnp.minimum(jnp.minimum(quotient, float(MAX_COEFFICIENT)).astype(jnp.int64), by_rms)


def _count(
    rule: Counter,
    magnitude: Array,
    q: Array,
    exponent: Array,
    signs: Array,
    turn: Array,
    lr: Array,
    numbers: Mapping[str, Array],
    bits16: Array,
) -> tuple[Array, Array]:
    """Flips and the new magnitudes of the rule `Counter`; `turn` are the signs of the scales."""
    native = rule.native()
    rms = _row_rms(q)
    share = lr.astype(jnp.float64)
    wanted = (1.0 if rule.bits == 1 else share) * float(np.float32(native["eta"])) * 2.0**24
    rate = jnp.rint(jnp.minimum(wanted, 2.0**47)).astype(jnp.int64)
    coef = _coefficient(rate, rms, numbers["squares"] if rule.sums_squares else None, exponent)[:, None]
    growth = _zone_growth(int(native["anneal_q8"]), numbers.get("count"))
    zone = (((int(native["dead_zone_q8"]) + growth) * rms) >> 8)[:, None]
    e = signs * q
    if native["center"]:
        total = e.sum(1, keepdims=True)
        e = e - jnp.sign(total) * (jnp.abs(total) // q.shape[1])
    against = -turn * e  # positive: for the sign as it is
    over = jnp.sign(against) * jnp.maximum(jnp.abs(against) - zone, 0)
    if rule.bits == 1:
        chance = jnp.minimum((jnp.maximum(-over, 0) * coef) >> 16, 1 << 16)
        return (chance * jnp.rint(jnp.minimum(share * 2.0**16, 2.0**30)).astype(jnp.int64)) >> 16 > bits16, magnitude
    moved = magnitude + ((over * coef + (bits16 << 16)) >> 32)
    flips = moved < 0
    return flips, jnp.minimum(jnp.where(flips, -moved - 1, moved), (1 << (rule.bits - 1)) - 1)


def _bop(rule: Bop, m: Array, q: Array, toward: Array, lr: Array, updates: Any) -> tuple[Array, Array]:
    """Flips and the new moving average of the rule `Bop`."""
    normalised = q.astype(jnp.float32) / _row_rms(q).astype(jnp.float32)[:, None]
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
    level_a, level_b = (unpack_levels(bits, dim).astype(jnp.int64) for bits in (bits_a, bits_b))
    apart = (jnp.where((y < 0) != negative, -level_b, level_b) - level_a) // 2
    way = jnp.where(valid, (jnp.abs(apart) * threshold + 65535 - column_bits(keys, dim)) >> 16, 0)
    level = level_a + 2 * jnp.sign(apart) * way
    planes = bits_a.shape[1] // packed_width(dim)
    bits = jnp.concatenate([pack(level > 0), _write_planes(jnp.abs(level) >> 1, planes - 1)], axis=1)
    return [bits, jnp.where(jnp.isnan(scale), np.float32(np.nan), scale)]


def _mix_first(x: Array) -> Array:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    return x ^ (x >> np.uint32(15))


def _mix_last(x: Array) -> Array:
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _read_planes(packed: Array, dim: int) -> Array:
    """`reference.read_planes`."""
    split = packed.reshape(packed.shape[0], packed.shape[1] // packed_width(dim), packed_width(dim))
    levels = jnp.zeros((packed.shape[0], dim), jnp.int64)
    for p in range(split.shape[1]):
        levels = levels << 1 | unpack(split[:, p], dim).astype(jnp.int64)
    return levels


def _write_planes(levels: Array, planes: int) -> Array:
    """`reference.write_planes`."""
    packed = [pack((levels >> p & 1).astype(jnp.uint8)) for p in range(planes - 1, -1, -1)]
    return jnp.concatenate(packed, axis=1) if packed else jnp.zeros((levels.shape[0], 0), jnp.uint8)


def _stats(*counts: Array) -> Array:
    wide = jnp.stack([x.astype(jnp.uint64) for x in counts])
    return jnp.stack([wide.astype(jnp.uint32), (wide >> 32).astype(jnp.uint32)], axis=1).reshape(8)
