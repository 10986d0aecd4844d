"""Packed planes: part of :mod:`dualbin.reference`, which re-exports what is public.

A weight is `s * (2m + 1) / 2**(k-1)` times the scale of its row: `s`, +1 or -1, is plane 0, the other k-1 planes are the integer m, most
significant first. With one plane m is 0, and a weight is +scale or -scale.

Where a function takes `xp`, it is the array module, `numpy` or `jax.numpy`: JAX runs it on platforms without the native library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualbin import _checks
from dualbin._checks import check_int, check_planes
from dualbin._reference_sums import sum_of_lanes
from dualbin._schema import packed_width

Array = NDArray[Any]
AnyArray = Any  #: of the array module

MIN_SCALE = np.float32(_checks.MIN_SCALE)

#: of the search for a scale: bits to which magnitudes are rounded, first steps of 1/64 of the largest magnitude, refinements after them
_SEARCH_BITS = 15
_SEARCH_STEPS = tuple(range(64, 4, -4))
_REFINEMENTS = 4


def check_bits(bits: ArrayLike, dim: int, planes: int) -> Array:
    """Return `bits` as uint8 [V, planes * B]."""
    packed = np.asarray(bits)
    width = check_planes(planes) * packed_width(check_int("dim", dim, low=1))
    if packed.dtype != np.uint8:
        msg = f"bits must be uint8, got {packed.dtype}"
        raise TypeError(msg)
    if packed.ndim != 2 or packed.shape[1] != width:
        msg = f"bits must have shape [V, {width}] for dim {dim} and {planes} planes, got {list(packed.shape)}"
        raise ValueError(msg)
    return packed


def unpack_bits(packed: AnyArray, dim: int, xp: Any = np) -> AnyArray:
    """The bits uint8 [..., dim] of packed rows uint8 [..., B]: element d is bit d % 8 of byte d // 8."""
    bits = packed[..., None] >> xp.arange(8, dtype=np.uint8) & np.uint8(1)
    return bits.reshape(*packed.shape[:-1], 8 * packed.shape[-1])[..., :dim]


def pack_bits(bits: AnyArray, xp: Any = np) -> AnyArray:
    """The inverse of :func:`unpack_bits`; padding bits are 0."""
    return xp.packbits(bits, axis=-1, bitorder="little")


def read_planes(packed: AnyArray, dim: int, xp: Any = np, dtype: Any = np.int64) -> AnyArray:
    """Integers [..., dim] from bit-planes uint8 [..., planes * B], most significant plane first; no planes give zeros."""
    planes = packed.reshape(*packed.shape[:-1], packed.shape[-1] // packed_width(dim), packed_width(dim))
    levels = xp.zeros((*packed.shape[:-1], dim), dtype)
    for p in range(planes.shape[-2]):
        levels = levels << 1 | unpack_bits(planes[..., p, :], dim, xp).astype(dtype)
    return levels


def write_planes(levels: AnyArray, planes: int, xp: Any = np) -> AnyArray:
    """The inverse of :func:`read_planes`; padding bits of every plane are 0."""
    packed = [pack_bits((levels >> p & 1).astype(np.uint8), xp) for p in range(planes - 1, -1, -1)]
    return xp.concatenate(packed, axis=-1) if packed else xp.zeros((*levels.shape[:-1], 0), np.uint8)


def levels_of(packed: AnyArray, dim: int, xp: Any = np) -> AnyArray:
    """`s * (2m + 1)` of packed rows uint8 [..., planes * B]: int16 [..., dim]."""
    width = packed_width(dim)
    odd = 2 * read_planes(packed[..., width:], dim, xp, np.int16) + 1
    return xp.where(unpack_bits(packed[..., :width], dim, xp) == 1, odd, -odd)


def weights_of(packed: AnyArray, dim: int, xp: Any = np) -> AnyArray:
    """What the scales of packed rows are multiplied with: `s * (2m + 1) / 2**(planes-1)`, exact in float32 [..., dim]."""
    unit = np.float32(0.5 ** (packed.shape[-1] // packed_width(dim) - 1))
    return levels_of(packed, dim, xp).astype(np.float32) * unit


def row_values(packed: AnyArray, scale: AnyArray, dim: int, dtype: Any, xp: Any = np) -> AnyArray:
    """The values [..., dim] of packed rows with their scales float32 [..., 1]: the product in float32, then in `dtype`; +0.0 at scale 0."""
    with np.errstate(over="ignore"):
        return xp.where(scale == 0, xp.zeros((), dtype), (scale * weights_of(packed, dim, xp)).astype(dtype))


def unpack(bits: ArrayLike, dim: int, planes: int = 1) -> Array:
    """Unpack uint8 [V, planes * B]: int8 +1/-1 [V, dim] for one plane, int16 `s * (2m + 1)` for more."""
    levels = levels_of(check_bits(bits, dim, planes), dim)
    return levels.astype(np.int8) if planes == 1 else levels


def weights(bits: ArrayLike, dim: int, planes: int = 1) -> Array:
    """What a row's scale is multiplied with: `s * (2m + 1) / 2**(planes-1)`, exact in float32 [V, dim]."""
    return weights_of(check_bits(bits, dim, planes), dim)


def pack(w: ArrayLike, planes: int = 1) -> Array:
    """Pack a float table [V, D] into uint8 [V, planes * B].

    A sign is 1 where `w >= 0`; with more planes `m = floor(|w| * 2**(planes-2) / scale)`, at most `2**(planes-1) - 1`, in float64 with the
    scale of :func:`row_scale`: the nearest level. NaN is a ValueError, with more than one plane infinity is one, too.
    """
    values = float_matrix("w", w)
    check_finite(values, infinity_too=check_planes(planes) > 1)
    signs = pack_bits(values >= 0)
    if planes == 1:
        return signs
    half = float(1 << (planes - 1)) / 2
    levels = np.floor(np.abs(values.astype(np.float64)) * half / row_scale(values, planes).astype(np.float64))
    levels = np.minimum(levels, (1 << (planes - 1)) - 1).astype(np.int64)
    return np.concatenate([signs, write_planes(levels, planes - 1)], axis=1)


def row_scale(w: ArrayLike, planes: int = 1) -> Array:
    """The scale with which :func:`pack` quantises every row of a float table [V, D]: float32 [V, 1], never below 1e-4.

    One plane: the mean magnitude, which is the scale of least squared error. It is taken in float64 over 32 strided lanes, each in
    ascending order, and the lanes are added in halves: the order of a GPU warp. (A scale of 0 would mark a padding row.)

    More planes: the scale of least squared error among those that a search meets (Lloyd 1982, doi:10.1109/TIT.1982.1056489). Magnitudes
    are integers `h = rint(|w| * 2**(15-E))` there, E the exponent of the row's largest, so that sums have no order. A candidate that
    gives the levels m leaves an error that is least where `A*A/C` is largest, with `A = sum h*(2m+1)` and `C = sum (2m+1)**2`; `A/C` then
    is its best scale, in units of `2**(E-15) * 2**(planes-1)`. The first candidates put the highest level at j/64 of the largest
    magnitude, j = 64, 60, ... 8; the first best of them is refined four times by quantising anew with its best scale.
    """
    values = np.abs(float_matrix("w", w).astype(np.float64))
    if check_planes(planes) == 1:
        return _mean_magnitude(values)
    _, exponent = np.frexp(values.max(axis=1))
    h = np.rint(np.ldexp(values, (_SEARCH_BITS - exponent)[:, None])).astype(np.int64)
    largest = np.maximum(h.max(axis=1, keepdims=True), 1)
    top = (1 << (planes - 1)) - 1
    best_a, best_c = np.zeros(len(h), np.int64), np.ones(len(h), np.int64)
    score = np.full(len(h), -1.0)

    def offer(levels: Array) -> None:
        nonlocal best_a, best_c, score
        odd = 2 * np.minimum(levels, top) + 1
        a, c = (h * odd).sum(axis=1), (odd * odd).sum(axis=1)
        new = a.astype(np.float64) * a.astype(np.float64) / c.astype(np.float64)
        better = new > score
        best_a, best_c, score = np.where(better, a, best_a), np.where(better, c, best_c), np.where(better, new, score)

    for step in _SEARCH_STEPS:
        offer(h * (64 * (2 * top + 1)) // (2 * step * largest))
    for _ in range(_REFINEMENTS):
        offer(h * best_c[:, None] // np.maximum(2 * best_a, 1)[:, None])
    scale = np.ldexp(best_a.astype(np.float64) / best_c.astype(np.float64), exponent - _SEARCH_BITS + planes - 1).astype(np.float32)
    return np.maximum(scale, MIN_SCALE)[:, None]


def _mean_magnitude(values: Array) -> Array:
    mean = (sum_of_lanes(values)[:, None] / values.shape[1]).astype(np.float32)
    return np.maximum(mean, MIN_SCALE)


def with_planes(bits: ArrayLike, scale: ArrayLike, dim: int, planes: int, fewer: int, *, rescale: bool = True) -> tuple[Array, Array]:
    """The top `fewer` planes of a table of `planes`, and their scales.

    With `rescale` a row's scale is that of least squared error against the values of all planes: `f32(scale * (A / C) * 2**(fewer-planes))`
    in float64, with the exact sums `A = sum (2M+1)*(2m+1)` and `C = sum (2m+1)**2` over its weights, M of `planes` and m of `fewer` planes;
    its magnitude is at least 1e-4. Else the scales stay. Padding rows stay so.

    Raises:
        ValueError: `fewer` is above `planes`.
    """
    packed, old = check_bits(bits, dim, planes), np.asarray(scale)
    check_int("fewer", fewer, low=1, high=planes)
    top = packed[:, : fewer * packed_width(dim)].copy()
    if not rescale:
        return top, old.copy()
    all_planes = np.abs(unpack(packed, dim, planes).astype(np.int64))
    few = np.abs(unpack(top, dim, fewer).astype(np.int64))
    a, c = (all_planes * few).sum(axis=1, keepdims=True), (few * few).sum(axis=1, keepdims=True)
    return top, fewer_scale(old, a, c, planes - fewer)


def fewer_scale(scale: AnyArray, a: AnyArray, c: AnyArray, dropped: int, xp: Any = np) -> AnyArray:
    """The scale float32 [..., 1] of :func:`with_planes` from its sums A and C, integers [..., 1], and how many planes are gone."""
    ratio = a.astype(np.float64) / c.astype(np.float64)
    new = (scale.astype(np.float64) * ratio * 2.0**-dropped).astype(np.float32)
    return xp.where(scale == 0, np.float32(0), xp.copysign(xp.maximum(xp.abs(new), MIN_SCALE), scale))


def float_matrix(name: str, value: ArrayLike) -> Array:
    """Return a float table as float32 or float64 [V, D]."""
    array = np.asarray(value)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        msg = f"{name} must be a float array, got {array.dtype}"
        raise TypeError(msg)
    if array.ndim != 2 or 0 in array.shape:
        msg = f"{name} must have shape [V, D] with V and D at least 1, got {list(array.shape)}"
        raise ValueError(msg)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def check_finite(values: Array, *, infinity_too: bool) -> None:
    bad = np.argwhere(~np.isfinite(values) if infinity_too else np.isnan(values))
    if len(bad):
        row, column = bad[0]
        msg = f"w must be {'finite' if infinity_too else 'free of NaN'}, got {values[row, column]} at row {row}, column {column}"
        raise ValueError(msg)
