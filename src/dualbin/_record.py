"""The record of a row of an optimizer state: four numbers side by side in memory, four arrays by name wherever a state is read or written.

Both frontends hold the record; files, exported states and :mod:`dualbin.reference` have the names. The functions take arrays of NumPy,
PyTorch and JAX alike: what differs, how an array's bits are read as another type, is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dualbin._schema import RECORD


def split_record(state: Mapping[str, Any], read_as: Callable[[Any, str], Any]) -> dict[str, Any]:
    """The arrays of a state by the names they have outside; arrays that are in no record stay as they are.

    Args:
        state: arrays as they lie in memory, `record` int32 `[V, 4]` among them or not.
        read_as: the same bits of an int32 array `[V]` as an array of the dtype that is named.
    """
    outside = {name: array for name, array in state.items() if name != "record"}
    if "record" in state:
        outside |= {name: read_as(state["record"][:, i], dtype) for i, (name, dtype) in enumerate(RECORD.items())}
    return outside


def join_record(outside: Mapping[str, Any], read_as: Callable[[Any, str], Any], stack: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """The inverse of :func:`split_record` for a state that has numbers of a record.

    Args:
        outside: arrays by name; numbers of a record that are not there are zeros.
        read_as: the same bits of an array `[V]` as int32.
        stack: int32 arrays `[V]` as the columns of one array `[V, 4]`.
    """
    numbers = {name: read_as(outside[name], "int32") for name in RECORD if name in outside}
    zeros = next(iter(numbers.values())) * 0
    record = stack([numbers.get(name, zeros) for name in RECORD])
    return {name: array for name, array in outside.items() if name not in RECORD} | {"record": record}


def read_numpy_as(array: np.ndarray, dtype: str) -> np.ndarray:
    """The `read_as` of NumPy."""
    return np.ascontiguousarray(array).view(dtype)


def stack_numpy(columns: list[np.ndarray]) -> np.ndarray:
    """The `stack` of NumPy."""
    return np.stack(columns, axis=1)
