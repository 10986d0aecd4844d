"""The average of two packed tables: part of :mod:`dualbin.reference`, which re-exports it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualbin._average_step import default_step, hash_rows
from dualbin._checks import check_float, check_int, check_table_arrays
from dualbin._reference_hash import column_bits, pair_bits, row_keys, step_words
from dualbin._reference_planes import levels_of, pack_bits, write_planes
from dualbin._schema import packed_width

Array = NDArray[Any]
AnyArray = Any  #: of the array module

AVERAGE_WORD = 0x13198A2E  #: keeps these random numbers apart from those of an update with the same seed and step
THRESHOLD_PAIR = 0xFFFFFFFF  #: no row has so many columns


def average(
    bits_a: ArrayLike,
    scale_a: ArrayLike,
    bits_b: ArrayLike,
    scale_b: ArrayLike,
    weight: float,
    dim: int,
    planes: int = 1,
    *,
    seed: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> tuple[Array, Array]:
    """`(1 - weight) * a + weight * b` of two tables, in expectation: bits uint8 [V, planes * B] and scale float32 [V, 1].

    With `x = f32(1 - weight) * scale_a` and `y = weight * scale_b` (both exact in float64) the magnitude of the new scale is
    `f32(|x| + |y|)`, and a weight goes the share `t = |y| / (|x| + |y|)` of the way from the level of a to that of b, rounded up or down to
    a level at random, such that the expectation of a value is the average of the values. That chance is why a small weight moves a table
    at all: the nearest level to the average of two neighbours is that of a for ever. With one plane, a bit is that of b with probability t.
    The sign of the scale is that of x, or of y where x is 0; where y has the other sign, the signs of b are inverted.

    A row whose scales are both 0 stays what it is in a. Where one of them is 0, the row is the other one, times its weight.

    t is rounded to 32 bits, a chance of 16 bits for the whole row is added, and the sum's high half T is t in 1/65536. Of e levels between
    a and b a weight goes `(e * T + 65535 - r) >> 16`, r its 16 random bits. `random16` tells where these come from; one word more,
    `AVERAGE_WORD`, is hashed.

    Args:
        bits_a, bits_b: uint8 [V, planes * B].
        scale_a, scale_b: float32 [V, 1].
        weight: of b, in [0, 1], used as float32.
        dim: D.
        planes: of both tables.
        seed, step: choose the random numbers; averages that follow each other need different steps.
        first_row: of a table that is a range of the rows of a larger one, the row where it starts there.
    """
    bits_a, scale_a, bits_b, scale_b = (np.asarray(x) for x in (bits_a, scale_a, bits_b, scale_b))
    check_table_arrays(bits_a.shape, str(bits_a.dtype), scale_a.shape, str(scale_a.dtype), dim, planes)
    check_table_arrays(bits_b.shape, str(bits_b.dtype), scale_b.shape, str(scale_b.dtype), dim, planes)
    if bits_a.shape != bits_b.shape:
        msg = f"both tables must have the same number of rows, got {len(bits_a)} and {len(bits_b)}"
        raise ValueError(msg)
    w = np.float32(check_float("weight", weight, low=0.0, high=1.0))
    check_int("first_row", first_row, low=0)

    keys = row_keys(step_words(seed, step), first_row + np.arange(len(bits_a)), AVERAGE_WORD)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return average_rows(bits_a, scale_a, bits_b, scale_b, w, keys, dim)


def average_rows(
    bits_a: AnyArray,
    scale_a: AnyArray,
    bits_b: AnyArray,
    scale_b: AnyArray,
    weight: Any,
    keys: tuple[AnyArray, AnyArray],
    dim: int,
    xp: Any = np,
) -> tuple[AnyArray, AnyArray]:
    """:func:`average` with the keys of the rows and a weight, float32, in [0, 1]; `xp` as in `_reference_rules`."""
    x = (np.float32(1) - weight).astype(np.float64) * scale_a.astype(np.float64)
    y = weight.astype(np.float64) * scale_b.astype(np.float64)
    total = xp.abs(x) + xp.abs(y)
    share = xp.abs(y) / total
    negative = xp.where(x != 0, x, y) < 0
    scale = xp.where(negative, -total, total).astype(np.float32)
    chance = xp.rint(xp.where(share > 0, share, 0) * 2.0**32).astype(np.int64)
    chance_of_row = (pair_bits(keys, xp.full((1,), THRESHOLD_PAIR, np.uint32)) & np.uint32(0xFFFF)).astype(np.int64)
    threshold = (chance + chance_of_row) >> 16
    level_a, level_b = (levels_of(bits, dim, xp).astype(np.int64) for bits in (bits_a, bits_b))  # odd; a step between neighbours is 2
    apart = (level_b * xp.where((y < 0) != negative, -1, 1) - level_a) // 2
    way = (xp.abs(apart) * threshold + 65535 - column_bits(keys, dim, xp)) >> 16
    level = level_a + 2 * xp.sign(apart) * way
    planes = bits_a.shape[1] // packed_width(dim)
    bits = xp.concatenate([pack_bits(level > 0, xp), write_planes(xp.abs(level) >> 1, planes - 1, xp)], axis=1)
    return bits, xp.where(xp.isnan(scale), np.float32("nan"), scale)


def average_step(bits_a: ArrayLike, scale_a: ArrayLike, bits_b: ArrayLike, scale_b: ArrayLike) -> int:
    """The step, below 2**32, that `average` of a frontend takes where none is given: from what both tables hold.

    Args:
        bits_a, bits_b: uint8 [V, planes * B].
        scale_a, scale_b: float32 [V, 1].
    """

    def number(bits: ArrayLike, scale: ArrayLike) -> int:
        packed, words = np.asarray(bits).astype(np.int64), np.asarray(scale, np.float32)[:, 0].view(np.uint32).astype(np.int64)
        return int(hash_rows(packed, words, np.arange(packed.shape[1]), np.arange(packed.shape[0])))

    return int(default_step(number(bits_a, scale_a), number(bits_b, scale_b)))
