"""Tables as plain NumPy arrays: what files hold, and how they are made of a table of either frontend, which is not imported for that."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dualbin._checks import check_finite_scale, check_padding_bits, check_table_arrays
from dualbin._packing import native_order

_MAX_COUNT = 2**63 - 1  #: integers of a state are int64


class Table(NamedTuple):
    """A packed table in NumPy: bits uint8 `[V, planes * ceil(dim/8)]`, scale float32 `[V, 1]`, dim, and planes."""

    bits: np.ndarray
    scale: np.ndarray
    dim: int
    planes: int = 1


def checked_path(path: Any, name: str = "path") -> Path:
    """Return `path` as a Path, or raise TypeError that names the argument."""
    if not isinstance(path, str) and not (isinstance(path, os.PathLike) and isinstance(os.fspath(path), str)):
        msg = f"{name} must be a str or an os.PathLike of one, got {path!r} of type {type(path).__name__}"
        raise TypeError(msg)
    return Path(path)


def table_of(where: str, name: object, source: Any) -> Table:
    """The arrays of anything with `.bits`, `.scale`, `.dim` and perhaps `.planes`, checked."""
    if not isinstance(name, str) or not name:
        msg = f"{where}: the name of a table must be a non-empty str, got {name!r}"
        raise TypeError(msg)
    missing = [attribute for attribute in ("bits", "scale", "dim") if not hasattr(source, attribute)]
    if missing:
        msg = f"{where} must have .bits, .scale and .dim, got a {type(source).__name__} without {', '.join(missing)}"
        raise TypeError(msg)
    sizes = {"dim": source.dim, "planes": getattr(source, "planes", 1)}
    for field, value in sizes.items():
        try:
            sizes[field] = operator.index(value)
        except TypeError:
            msg = f"{where}.{field} must be an integer, got {value!r}"
            raise TypeError(msg) from None
    return checked_table(where, to_numpy(source.bits, f"{where}.bits"), to_numpy(source.scale, f"{where}.scale"), **sizes)


def checked_table(where: str, bits: np.ndarray, scale: np.ndarray, dim: int, planes: int = 1) -> Table:
    """A table of these arrays, or a ValueError that says where they are."""
    try:
        check_table_arrays(bits.shape, bits.dtype.name, scale.shape, scale.dtype.name, dim, planes)
        check_padding_bits("bits", bits, dim)
        check_finite_scale(scale)
    except (TypeError, ValueError) as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from None
    return Table(bits, scale, dim, planes)


def to_numpy(value: Any, where: str) -> np.ndarray:
    """An array of either framework, or of NumPy, as one of NumPy in C order; integers without dimensions become int64."""
    if hasattr(value, "detach"):  # a torch tensor, recognised without importing torch
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        value = native_order(where, value)
    array = np.asarray(value, order="C")
    if array.ndim != 0 or array.dtype.kind not in "iu":
        return array
    if int(array) > _MAX_COUNT:
        msg = f"{where} must be at most {_MAX_COUNT}, got {int(array)}"
        raise ValueError(msg)
    return array.astype(np.int64)
