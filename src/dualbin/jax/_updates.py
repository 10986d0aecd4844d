"""The updates that `optax.apply_updates` adds to a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualbin.jax import _ops
from dualbin.jax._rowgrad import RowGrad
from dualbin.jax._stack import over_members
from dualbin.jax._table import BinaryTable, shard_axes


class _Told(type):
    """JAX prints the class, where a branch of `lax.cond` gives an update and the other does not, as in `optax.apply_if_finite`."""

    def __repr__(cls) -> str:
        return (
            f"<an update of a packed table, {cls.__qualname__}: a transformation that gives an update or a gradient, such as "
            "optax.apply_if_finite, belongs into the label 'dense' of optax.partition(..., dualbin.jax.param_labels); "
            "dualbin.jax.xor skips rows that are not finite>"
        )


class _Update(metaclass=_Told):
    """Something that an array is added to. NumPy must not try to do it element by element."""

    __array_ufunc__ = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RowFlips(_Update):
    """An update of packed bits: `bits + RowFlips` is `bits ^ mask` at the rows `ids`, in place under jit with donation.

    Args:
        ids: int32 or int64 `[U]`, distinct; ids outside [0, V) are skipped.
        mask: uint8 `[U, planes * B]`; a bit is 1 where that of the table changes.
        axis: that of the table (static).
    """

    ids: Array
    mask: Array
    axis: Any = dataclasses.field(default=None, metadata={"static": True})

    def __radd__(self, bits: Any) -> Array:
        if not hasattr(bits, "dtype") or bits.dtype != jnp.uint8 or bits.ndim < 2:
            msg = f"RowFlips can be added to bits uint8 [V, planes * B], got {_describe(bits)}"
            raise TypeError(msg)
        if self.ids.shape[:-1] != bits.shape[:-2] or self.mask.shape != (*self.ids.shape, bits.shape[-1]):
            msg = f"RowFlips with a mask {list(self.mask.shape)} belongs to another table than bits {list(bits.shape)}"
            raise ValueError(msg)
        _check_as_made(self.ids, self.mask, jnp.uint8, "mask")
        return _change(_ops.xor_rows, bits, self.ids, self.mask, self.axis)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RowSet(_Update):
    """An update of scales: `scale + RowSet` holds exactly `values` at the rows `ids`, and `scale` elsewhere.

    Args:
        ids: int32 or int64 `[U]`, distinct; ids outside [0, V) are skipped.
        values: float32 `[U, 1]`. Where one is 0 the scale stays: no update makes a padding row, and `optax.set_to_zero` means no update.
        axis: that of the table (static).
    """

    ids: Array
    values: Array
    axis: Any = dataclasses.field(default=None, metadata={"static": True})

    def __radd__(self, scale: Any) -> Array:
        if not hasattr(scale, "dtype") or scale.dtype != jnp.float32 or scale.ndim < 2:
            msg = f"RowSet can be added to a scale float32 [V, 1], got {_describe(scale)}"
            raise TypeError(msg)
        if self.ids.shape[:-1] != scale.shape[:-2] or self.values.shape != (*self.ids.shape, scale.shape[-1]):
            msg = f"RowSet with values {list(self.values.shape)} belongs to another table than a scale {list(scale.shape)}"
            raise ValueError(msg)
        _check_as_made(self.ids, self.values, jnp.float32, "values")
        nobody = jnp.asarray(jnp.iinfo(self.ids.dtype).max, self.ids.dtype)
        ids = jnp.where(self.values[..., 0] == 0, nobody, self.ids)
        return _change(_ops.set_rows, scale, ids, self.values, self.axis)


def _check_as_made(ids: Any, values: Any, kind: Any, name: str) -> None:
    """Raise if something was done to the update after :func:`xor` made it. To zero it is fine: nothing changes then."""
    if not jnp.issubdtype(ids.dtype, jnp.integer) or values.dtype != kind:
        msg = (
            f"the update of a table must have integer ids and {jnp.dtype(kind).name} {name}, got {ids.dtype.name} and {values.dtype.name}: "
            "it cannot be scaled or cast; put what scales updates into the group of the dense parameters"
        )
        raise TypeError(msg)


def _change(operation: Callable[..., Array], array: Any, ids: Array, values: Array, axis: Any) -> Array:
    """The operation on a table's array or on every member of a stack's."""
    return over_members(partial(operation, axes=shard_axes(axis)), ids.ndim - 1)(jnp.asarray(array), ids, values)


def _describe(x: Any) -> str:
    return f"{x.dtype.name} {list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__


def param_labels(tree: Any) -> Any:
    """Labels for `optax.partition`: "table" for every :class:`BinaryTable` and :class:`RowGrad`, "dense" for every other leaf."""

    def is_leaf(x: Any) -> bool:
        return isinstance(x, BinaryTable | RowGrad)

    return jax.tree.map(lambda x: "table" if is_leaf(x) else "dense", tree, is_leaf=is_leaf)
