"""`dualbin.pack` and `dualbin.unpack`: NumPy in, NumPy out."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from dualbin._backends import cpu_threads, load_native
from dualbin._checks import check_int
from dualbin._schema import packed_width

#: dtypes that the native library reads; float64 goes through the reference (a rounding to float32 could turn a tiny negative into -0.0)
_NATIVE_TYPES = ("float32", "float16", "bfloat16")


def pack(w: np.ndarray) -> np.ndarray:
    """Pack the signs of a float table, eight to a byte.

    Element `d` of a row becomes bit `d % 8` (least significant first) of byte `d // 8`: 1 iff `w >= 0`. Padding bits are 0.

    Args:
        w: float32, float16, bfloat16 (of ml_dtypes) or float64 `[V, D]`, V and D at least 1; strides and byte order may be any.

    Returns:
        uint8 `[V, ceil(D / 8)]`.

    Raises:
        TypeError: w is no NumPy array of these dtypes.
        ValueError: w has another shape, or holds a NaN.
    """
    if not isinstance(w, np.ndarray):
        msg = f"w must be a NumPy array, got {type(w).__name__}"
        raise TypeError(msg)
    if w.dtype.name not in _NATIVE_TYPES and w.dtype != np.float64:
        msg = f"w must be float32, float16, bfloat16 or float64, got {w.dtype.name}"
        raise TypeError(msg)
    if w.ndim != 2 or w.size == 0:
        msg = f"w must have shape [V, D] with V and D at least 1, got {list(w.shape)}"
        raise ValueError(msg)
    native, _ = load_native()
    if native is None or w.dtype == np.float64:
        from dualbin import reference  # noqa: PLC0415  (only where the native library does not do it)

        return reference.pack(w)
    return pack_native(native, w)[0]


def unpack(bits: np.ndarray, dim: int) -> np.ndarray:
    """The inverse of :func:`pack`.

    Args:
        bits: uint8 `[V, ceil(dim / 8)]`.
        dim: D, the number of weights in a row.

    Returns:
        int8 `[V, dim]` of +1 and -1.

    Raises:
        TypeError: bits is no NumPy array of uint8, or dim no integer.
        ValueError: bits has another shape, or dim is below 1.
    """
    dim = check_int("dim", dim, low=1)
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8:
        got = bits.dtype.name if isinstance(bits, np.ndarray) else type(bits).__name__
        msg = f"bits must be a NumPy array of uint8, got {got}"
        raise TypeError(msg)
    if bits.ndim != 2 or bits.shape[0] < 1 or bits.shape[1] != packed_width(dim):
        msg = f"bits must have shape [V, {packed_width(dim)}] with V >= 1 for dim {dim}, got {list(bits.shape)}"
        raise ValueError(msg)
    native, _ = load_native()
    if native is None:
        from dualbin import reference  # noqa: PLC0415  (only where the native library is missing)

        return reference.unpack(bits, dim)
    out = np.empty((bits.shape[0], dim), np.int8)
    native.unpack(_plain(bits), dim, out, cpu_threads())
    return out


def pack_native(native: ModuleType, w: np.ndarray, *, with_scale: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Bits uint8 `[V, B]` of w `[V, D]`, and on request the mean magnitudes float32 `[V, 1]`; w as the native library takes it."""
    rows, dim = w.shape
    bits = np.empty((rows, packed_width(dim)), np.uint8)
    scale = np.empty((rows, 1), np.float32) if with_scale else None
    native.pack(_plain(w), bits, scale, cpu_threads())
    return bits, scale


def _plain(array: np.ndarray) -> np.ndarray:
    """The same values as the native library reads them: contiguous, aligned, in the byte order of this machine, of no subclass."""
    return np.require(np.asarray(array), array.dtype.newbyteorder("="), ["C", "A"])
