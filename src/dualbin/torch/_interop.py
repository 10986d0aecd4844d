"""Tables from other frameworks, through DLPack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_bool
from dualbin.torch._table import BinaryTable


def from_jax(table: Any, copy: bool = False) -> BinaryTable:
    """A BinaryTable from a table of `dualbin.jax`, or from any object with `bits`, `scale` and `dim` whose arrays speak DLPack.

    Without a copy both frameworks use the same memory, and the source is dead after the call: JAX takes its arrays for immutable, but an
    :class:`XOR` step changes these in place, and what compiled JAX code then reads is undefined. Use `copy=True` to keep the source.

    Args:
        table: bits uint8 `[V, planes * ceil(dim/8)]`, scale float32 `[V, 1]`, dim an int, and planes unless it is 1.
        copy: give the new table memory of its own.

    Raises:
        TypeError: table lacks one of these attributes, or they have other dtypes.
        ValueError: shapes do not fit, or an array is not contiguous.
    """
    check_bool("copy", copy)
    arrays = []
    for name in ("bits", "scale"):
        array = getattr(table, name, None)
        if not hasattr(array, "__dlpack__"):
            msg = f"table must have .{name}, an array that speaks DLPack, got a {type(table).__name__} with {name} {type(array).__name__}"
            raise TypeError(msg)
        tensor = array if isinstance(array, Tensor) else torch.from_dlpack(array)
        arrays.append(tensor.clone(memory_format=torch.contiguous_format) if copy else tensor)
    dim: Any = getattr(table, "dim", None)
    return BinaryTable(arrays[0], arrays[1], dim, planes=getattr(table, "planes", 1))
