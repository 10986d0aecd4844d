"""Ids as users give them: arrays, NumPy, lists."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualbin._packing import native_order


def to_ids(ids: Any, rows: int, name: str = "ids", low: int = 0) -> Array:
    """Return `ids` as an int32 or int64 array, checked against [low, rows) where that waits for no device.

    Raises:
        TypeError: ids are no integers.
        IndexError: an id is outside [low, rows).
    """
    array = _as_array(ids, name)
    values = _visible(array)
    if values is not None and values.size:
        bad = (values < low) | (values >= rows)
        if bad.any():
            msg = f"{name} must be in [{low}, {rows}), got {int(values[bad].flat[0])}"
            raise IndexError(msg)
    return jnp.asarray(_signed(array))


def to_index(ids: Any, name: str) -> Array:
    """Return `ids` as an int32 or int64 array of any values.

    Raises:
        TypeError: as for :func:`to_ids`.
    """
    return jnp.asarray(_signed(_as_array(ids, name)))


def to_declared_ids(ids: Any, rows: int, name: str = "ids") -> Array:
    """Return `ids` as a flat array of :func:`row_dtype`, with `rows` in place of ids outside [0, rows).

    Raises:
        TypeError: as for :func:`to_ids`.
    """
    array = _signed(_as_array(ids, name))
    library = np if isinstance(array, np.ndarray | np.generic) else jnp  # in NumPy a wide id does not become int32 on the way
    inside = library.where((array >= 0) & (array < rows), array, rows)
    return jnp.asarray(inside.astype(row_dtype(rows))).reshape(-1)


def to_array(name: str, value: Any) -> Array:
    """Return `value` as an array of JAX.

    Raises:
        TypeError: it is none, or a masked one of NumPy.
    """
    value = native_order(name, value) if isinstance(value, np.ndarray) else value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        msg = f"{name} must be an array, got {type(value).__name__}"
        raise TypeError(msg) from None


def row_dtype(rows: int) -> jnp.dtype:
    """The dtype of row ids, which has to hold V itself: int32 where it can.

    Raises:
        ValueError: the table needs int64 and jax_enable_x64 is off.
    """
    if rows <= np.iinfo(np.int32).max:
        return jnp.dtype(jnp.int32)
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]  # made at run time
        msg = f"a table of {rows} rows needs int64 ids: set jax_enable_x64"
        raise ValueError(msg)
    return jnp.dtype(jnp.int64)


def _as_array(ids: Any, name: str) -> Any:
    if isinstance(ids, np.ndarray):
        ids = native_order(name, ids)
    if not hasattr(ids, "dtype"):
        ids = np.asarray(ids)
        if ids.size == 0:
            ids = ids.astype(np.int32)
    extended = jax.dtypes.issubdtype(ids.dtype, jax.dtypes.extended)
    if extended or not jnp.issubdtype(ids.dtype, jnp.integer):
        msg = f"{name} must be integers, got {ids.dtype}"
        raise TypeError(msg)
    return ids


def _signed(ids: Any) -> Any:
    """The same ids in int32 or int64. Unsigned ones that a signed type of their size does not hold become its largest: no row has it."""
    kind = jnp.dtype(ids.dtype)
    if kind.itemsize < np.dtype(np.int32).itemsize:
        return ids.astype(np.int32)
    if not jnp.issubdtype(kind, jnp.unsignedinteger):
        return ids
    signed = np.dtype(f"int{8 * kind.itemsize}")
    library = np if isinstance(ids, np.ndarray | np.generic) else jnp
    return library.minimum(ids, kind.type(np.iinfo(signed).max)).astype(signed)


def _visible(ids: Any) -> np.ndarray | None:
    """The values, if they are in this process's own memory; else None."""
    if isinstance(ids, np.ndarray | np.generic):
        return np.asarray(ids)
    if isinstance(ids, jax.core.Tracer) or not isinstance(ids, Array):
        return None
    on_cpu = ids.is_fully_addressable and all(device.platform == "cpu" for device in ids.devices())
    return np.asarray(ids) if on_cpu else None
