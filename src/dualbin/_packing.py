"""`dualbin.pack`, `dualbin.row_scale` and `dualbin.unpack`: NumPy in, NumPy out."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from dualbin._backends import cpu_threads, load_native
from dualbin._checks import check_dim, check_planes
from dualbin._schema import packed_width

#: dtypes that the native library reads; float64 goes through the reference (a rounding to float32 could turn a tiny negative into -0.0)
_NATIVE_TYPES = ("float32", "float16", "bfloat16")


def pack(w: np.ndarray, planes: int = 1) -> np.ndarray:
    """Pack a float table, a bit-plane at a time.

    Element `d` of a row is bit `d % 8` (least significant first) of byte `d // 8` of every plane. Plane 0 is the sign, 1 where `w >= 0`.
    The other `planes - 1` are the nearest level `m = floor(|w| * 2**(planes-2) / scale)`, most significant plane first, with the scale
    that :func:`row_scale` gives a row. Padding bits are 0.

    Args:
        w: float32, float16, bfloat16 (of ml_dtypes) or float64 `[V, D]`, V and D at least 1; strides and byte order may be any.
        planes: 1 to 8, bits of a weight.

    Returns:
        uint8 `[V, planes * ceil(D / 8)]`.

    Raises:
        TypeError: w is no NumPy array of these dtypes, or a masked one.
        ValueError: w has another shape, or holds a NaN (with more than one plane, an infinity), or planes is out of range.
    """
    return _pack(w, planes)[0]


def row_scale(w: np.ndarray, planes: int = 1) -> np.ndarray:
    """The scale of every row of a float table, with which :func:`pack` quantises it.

    One plane: the mean magnitude. More: the scale of least squared error that a search in integers finds (Lloyd 1982,
    doi:10.1109/TIT.1982.1056489; `dualbin.reference.row_scale` has the steps). Never below 1e-4, since 0 marks a padding row.

    Args: as of :func:`pack`.

    Returns:
        float32 `[V, 1]`.

    Raises: as :func:`pack`.
    """
    return _pack(w, planes)[1]


def _pack(w: np.ndarray, planes: int) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(w, np.ndarray):
        msg = f"w must be a NumPy array, got {type(w).__name__}"
        raise TypeError(msg)
    w = native_order("w", w)
    if w.dtype.name not in _NATIVE_TYPES and w.dtype != np.float64:
        msg = f"w must be float32, float16, bfloat16 or float64, got {w.dtype.name}"
        raise TypeError(msg)
    if w.ndim != 2 or w.size == 0:
        msg = f"w must have shape [V, D] with V and D at least 1, got {list(w.shape)}"
        raise ValueError(msg)
    check_planes(planes)
    native, _ = load_native()
    if native is None or w.dtype == np.float64:
        from dualbin import reference  # noqa: PLC0415  (only where the native library does not do it)

        return reference.pack(w, planes), reference.row_scale(w, planes)
    return pack_native(native, w, planes)


def unpack(bits: np.ndarray, dim: int, planes: int = 1) -> np.ndarray:
    """The inverse of :func:`pack`, but for the scales.

    Args:
        bits: uint8 `[V, planes * ceil(dim / 8)]`.
        dim: D, the number of weights in a row.
        planes: 1 to 8.

    Returns:
        int8 `[V, dim]` of +1 and -1 for one plane, else int16 of `s * (2m + 1)`: what the scale of a row over `2**(planes-1)` is
        multiplied with.

    Raises:
        TypeError: bits is no NumPy array of uint8, or a masked one, or dim or planes no integer.
        ValueError: bits has another shape, or dim or planes is out of range.
    """
    dim = check_dim("dim", dim)
    width = check_planes(planes) * packed_width(dim)
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8:
        got = bits.dtype.name if isinstance(bits, np.ndarray) else type(bits).__name__
        msg = f"bits must be a NumPy array of uint8, got {got}"
        raise TypeError(msg)
    bits = native_order("bits", bits)
    if bits.ndim != 2 or bits.shape[0] < 1 or bits.shape[1] != width:
        several = f" and {planes} planes" if planes > 1 else ""
        msg = f"bits must have shape [V, {width}] with V >= 1 for dim {dim}{several}, got {list(bits.shape)}"
        raise ValueError(msg)
    native, _ = load_native()
    if native is None:
        from dualbin import reference  # noqa: PLC0415  (only where the native library is missing)

        return reference.unpack(bits, dim, planes)
    out = np.empty((bits.shape[0], dim), np.int8 if planes == 1 else np.int16)
    native.unpack(_plain(bits), dim, out, cpu_threads())
    return out


def native_order(name: str, array: np.ndarray) -> np.ndarray:
    """The same values in the byte order of this machine.

    Raises:
        TypeError: it is a masked array: nothing here would see the mask.
    """
    if isinstance(array, np.ma.MaskedArray):
        msg = f"{name} must not be a masked array, whose mask would be lost: give {name}.filled(value)"
        raise TypeError(msg)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def pack_native(native: ModuleType, w: np.ndarray, planes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Bits uint8 `[V, planes * B]` of w `[V, D]` and its scales float32 `[V, 1]`; w as the native library takes it."""
    rows, dim = w.shape
    bits = np.empty((rows, planes * packed_width(dim)), np.uint8)
    scale = np.empty((rows, 1), np.float32)
    native.pack(_plain(w), bits, scale, cpu_threads())
    return bits, scale


def fewer_planes(bits: np.ndarray, scale: np.ndarray, dim: int, planes: int, fewer: int, *, rescale: bool) -> tuple[np.ndarray, np.ndarray]:
    """The top planes of a table in NumPy: see `dualbin.reference.with_planes`."""
    native, _ = load_native()
    if native is None:
        from dualbin import reference  # noqa: PLC0415  (only where the native library is missing)

        return reference.with_planes(bits, scale, dim, planes, fewer, rescale=rescale)
    kept, new = np.empty((bits.shape[0], fewer * packed_width(dim)), np.uint8), np.array(scale, np.float32, order="C")
    native.fewer_planes(_plain(bits), _plain(scale), dim, kept, new if rescale else None, cpu_threads())
    return kept, new


def _plain(array: np.ndarray) -> np.ndarray:
    """The same values as the native library reads them: contiguous, aligned, in the byte order of this machine, of no subclass."""
    return np.require(np.asarray(array), array.dtype.newbyteorder("="), ["C", "A"])
