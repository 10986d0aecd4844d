"""Argument checks shared by the reference and both frontends: name the argument, what was given and what is allowed."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from dualbin._float32 import nearest_float32
from dualbin._schema import MAX_DIM, MAX_PLANES, packed_width

#: the least scale of a row that is not padding: training lowers none below it
MIN_SCALE = 1e-4

#: the largest float32, which scales and rates are
MAX_FLOAT = float(np.finfo(np.float32).max)

#: rates below it are taken for those of a dense optimizer
SMALL_RATE = 0.05

#: row numbers are int64
MAX_ROWS = 2**63 - 1


def check_int(name: str, value: object, *, low: int | None = None, high: int | None = None) -> int:
    """Return `value` as an int within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        msg = f"{name} must be an integer, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        msg = f"{name} must be {_range(low, high)}, got {number}"
        raise ValueError(msg)
    return number


def check_float(name: str, value: object, *, low: float | None = None, high: float | None = None) -> float:
    """Return `value` as a finite float within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        msg = f"{name} must be a number, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
        msg = f"{name} must be finite and {_range(low, high)}, got {number}"
        raise ValueError(msg)
    return number


INDEPENDENT = 128  #: the spread, in 256ths, of bits that have nothing in common


def check_spread(value: object) -> int:
    """Return `spread`, a probability of at most one half, in 256ths."""
    return round(256 * check_float("spread", value, low=0.0, high=0.5))


def check_padding_idx(padding_idx: object, rows: int) -> int | None:
    """Return `padding_idx` as a row in [0, rows), or None; negative ones count from the end, as in nn.Embedding."""
    if padding_idx is None:
        return None
    index = check_int("padding_idx", padding_idx, low=-rows, high=rows - 1)
    return index + rows if index < 0 else index


def check_bool(name: str, value: object) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    return value


def check_projection(value: object, dim: int) -> int | None:
    """Return the output width of a projection behind rows of `dim` weights, or None if there is none: `dim` for True, None for False."""
    if isinstance(value, bool):
        return dim if value else None
    if not isinstance(value, numbers.Integral):
        msg = f"projection must be True, False or an output width, got {value!r} of type {type(value).__name__}"
        raise TypeError(msg)
    if value < 1:
        msg = f"projection must be True, False or an output width of at least 1, got {value}"
        raise ValueError(msg)
    return check_dim("projection", value)


def check_dim(name: str, value: object) -> int:
    """Return the weights in a row as an int, as many as the native library takes."""
    return check_int(name, check_int(name, value, low=1), high=MAX_DIM)


def check_rows(name: str, value: object, dim: int) -> int:
    """Return the rows of a table of `dim` columns as an int.

    There are addresses for eight bytes a weight and a scale: where an array of a table has more bytes than an int64 can count, JAX ends
    the process.
    """
    return check_int(name, check_int(name, value, low=1), high=MAX_ROWS // (8 * (dim + 8)))


def check_rate(name: str, value: object) -> float:
    """Return a rate, at least 0, as the float32 that updates read."""
    return nearest_float32(check_float(name, check_float(name, value, low=0.0), high=MAX_FLOAT))


def warn_small_rate(call: str, value: float, stacklevel: int = 3) -> None:
    """Warn of a rate that is one of a dense optimizer. `call` says where it was given, with a place for it."""
    if 0 < value < SMALL_RATE:
        msg = f"{call % value}: 1 is the tuned step of every rule, for schedules to multiply; a table hardly learns at rates of Adam"
        warnings.warn(msg, UserWarning, stacklevel)


def check_mapping(name: str, value: object, what: str) -> None:
    """Raise TypeError unless `value` is a mapping; `what` says of what to what."""
    if not isinstance(value, Mapping):
        msg = f"{name} must be a dict of {what}, got a {type(value).__name__}"
        raise TypeError(msg)


def check_planes(value: object) -> int:
    """Return `planes`, the number of bit-planes of a table, 1 to 8."""
    return check_int("planes", value, low=1, high=MAX_PLANES)


def check_fewer(value: object, planes: int) -> int:
    """Return `planes` of a table that keeps the top ones of `planes`."""
    return check_int("planes", value, low=1, high=planes)


def check_same_planes(names: str, one: int, other: int) -> None:
    """Raise ValueError unless two tables, which the message calls `names`, have the same number of planes."""
    if one != other:
        msg = f"{names} must have the same planes, got {one} and {other}: with_planes gives a table of fewer"
        raise ValueError(msg)


def check_table_arrays(
    bits_shape: tuple[int, ...], bits_dtype: str, scale_shape: tuple[int, ...], scale_dtype: str, dim: int, planes: int = 1
) -> None:
    """Check the arrays of one table: bits uint8 [V, planes * ceil(dim/8)], scale float32 [V, 1], V and dim at least 1."""
    check_dim("dim", dim)
    width = check_planes(planes) * packed_width(dim)
    if bits_dtype != "uint8":
        msg = f"bits must be uint8, got {bits_dtype}"
        raise TypeError(msg)
    if len(bits_shape) != 2 or bits_shape[0] < 1 or bits_shape[1] != width:
        several = f" and {planes} planes" if planes > 1 else ""
        msg = f"bits must have shape [V, {width}] with V >= 1 for dim {dim}{several}, got {list(bits_shape)}"
        raise ValueError(msg)
    if scale_dtype != "float32":
        msg = f"scale must be float32, got {scale_dtype}"
        raise TypeError(msg)
    if tuple(scale_shape) != (bits_shape[0], 1):
        msg = f"scale must have shape [{bits_shape[0]}, 1], got {list(scale_shape)}"
        raise ValueError(msg)


def check_padding_bits(name: str, bits: Any, dim: int) -> None:
    """Check that the bits beyond the last column are 0, of packed planes [V, planes * ceil(dim/8)] of NumPy or a framework.

    Reads the values: of an array that is traced, or on another host, there are none.
    """
    width = packed_width(dim)
    if dim % 8 and bool((bits[:, width - 1 :: width] >> dim % 8).any()):
        msg = f"{name} has bits set beyond column {dim - 1}, which must be 0: it belongs to a table with another dim than {dim}"
        raise ValueError(msg)


def check_finite_scale(scale: np.ndarray) -> None:
    """Check that the scales of a file, NumPy, are finite: no update makes one that is not, and rows that have one are never trained."""
    bad = np.flatnonzero(~np.isfinite(scale))
    if bad.size:
        msg = f"scale must be finite, got {bad.size} rows that are not, the first of them {int(bad[0])}"
        raise ValueError(msg)


def check_initial_scale(value: object) -> float:
    """Return `scale` of new rows, at least MIN_SCALE and a float32."""
    return nearest_float32(check_float("scale", check_float("scale", value, low=MIN_SCALE), high=MAX_FLOAT))


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high}" if high is not None else "any value"
    return f"at least {low}" if high is None else f"between {low} and {high}"
