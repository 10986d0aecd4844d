"""Row gradients, and the updates that `optax.apply_updates` adds to a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualbin.jax import _ops
from dualbin.jax._table import BinaryTable, all_rows, shard_axes


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class RowGrad:
    """The gradient of a table: the rows that a step used, and no others.

    Args:
        ids: int32 or int64 `[U]`, distinct; unused slots and the last one, the sentinel, hold V.
        rows: float32 `[U, D]`: `dL/dvalue` summed over the occurrences of the row. The last one has what undeclared rows got.
        num_rows: V, if known (static); the optimizer then notices a gradient of another table.

    Raises:
        TypeError, ValueError: an array has the wrong dtype or shape, or they do not fit each other.
    """

    ids: Array
    rows: Array
    num_rows: int | None = None

    def __post_init__(self) -> None:
        check_row_grad(self, "RowGrad")

    def missed(self) -> Array:
        """bool: some lookup used a row that was not declared, so this gradient is incomplete. Pass all ids, or a larger capacity."""
        return jnp.any(self.rows[-1] != 0)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], int | None]:
        keys = jax.tree_util.GetAttrKey
        return ((keys("ids"), self.ids), (keys("rows"), self.rows)), self.num_rows

    def tree_flatten(self) -> tuple[tuple[Any, Any], int | None]:
        return (self.ids, self.rows), self.num_rows

    @classmethod
    def tree_unflatten(cls, num_rows: int | None, children: tuple[Any, Any]) -> RowGrad:
        grad = object.__new__(cls)
        for name, value in (("ids", children[0]), ("rows", children[1]), ("num_rows", num_rows)):
            object.__setattr__(grad, name, value)
        return grad


def check_row_grad(grad: object, name: str, table: BinaryTable | None = None) -> RowGrad:
    """Return `grad` if it is a RowGrad that fits `table`, else raise TypeError or ValueError."""
    if not isinstance(grad, RowGrad):
        msg = f"{name} must be a dualbin.jax.RowGrad (see dualbin.jax.value_and_grad), got {type(grad).__name__}"
        raise TypeError(msg)
    for field in ("ids", "rows"):
        if not hasattr(getattr(grad, field), "dtype"):
            msg = f"{name}.{field} must be an array, got {type(getattr(grad, field)).__name__}"
            raise TypeError(msg)
    check_gradient(name, grad.ids, grad.rows, ("float32",), "ids", "rows")
    if grad.ids.ndim != 1:
        msg = f"{name}.ids must have 1 dimension, got shape {list(grad.ids.shape)}"
        raise ValueError(msg)
    if table is None:
        return grad
    rows, dim = all_rows(table), table.dim
    if grad.rows.shape[1] != dim:
        msg = f"{name} belongs to another table: its rows have {grad.rows.shape[1]} columns, the table has {dim}"
        raise ValueError(msg)
    if grad.num_rows is not None and grad.num_rows != rows:
        msg = f"{name} belongs to another table: one of {grad.num_rows} rows, this table has {rows}"
        raise ValueError(msg)
    return grad


def check_gradient(name: str, ids: Any, dy: Any, floats: tuple[str, ...], ids_name: str, dy_name: str) -> None:
    """Check ids `[...]` and their gradient `[..., D]`."""
    if ids.dtype.name not in {"int32", "int64"}:
        msg = f"{name}.{ids_name} must be int32 or int64, got {ids.dtype.name}"
        raise TypeError(msg)
    if dy.dtype.name not in floats:
        msg = f"{name}.{dy_name} must be {' or '.join(floats)}, got {dy.dtype.name}"
        raise TypeError(msg)
    if dy.ndim < 1 or dy.shape[:-1] != ids.shape or dy.shape[-1] < 1:
        msg = f"{name}.{dy_name} must have shape {[*ids.shape, 'D']} to fit {ids_name}, got {list(dy.shape)}"
        raise ValueError(msg)


class _Update:
    """Something that an array is added to. NumPy must not try to do it element by element."""

    __array_ufunc__ = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RowFlips(_Update):
    """An update of packed bits: `bits + RowFlips` is `bits ^ mask` at the rows `ids`, in place under jit with donation.

    Args:
        ids: int32 or int64 `[U]`, distinct; ids outside [0, V) are skipped.
        mask: uint8 `[U, B]`; a bit is 1 where the weight flips.
        axis: that of the table (static).
    """

    ids: Array
    mask: Array
    axis: Any = dataclasses.field(default=None, metadata={"static": True})

    def __radd__(self, bits: Any) -> Array:
        if not hasattr(bits, "dtype") or bits.dtype != jnp.uint8 or bits.ndim != 2:
            msg = f"RowFlips can be added to bits uint8 [V, B], got {_describe(bits)}"
            raise TypeError(msg)
        if self.mask.shape != (self.ids.shape[0], bits.shape[1]):
            msg = f"RowFlips with a mask {list(self.mask.shape)} belongs to another table than bits {list(bits.shape)}"
            raise ValueError(msg)
        return _ops.xor_rows(jnp.asarray(bits), self.ids, self.mask, shard_axes(self.axis))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RowSet(_Update):
    """An update of scales: `scale + RowSet` holds exactly `values` at the rows `ids`, and `scale` elsewhere.

    Args:
        ids: int32 or int64 `[U]`, distinct; ids outside [0, V) are skipped.
        values: float32 `[U, 1]`.
        axis: that of the table (static).
    """

    ids: Array
    values: Array
    axis: Any = dataclasses.field(default=None, metadata={"static": True})

    def __radd__(self, scale: Any) -> Array:
        if not hasattr(scale, "dtype") or scale.dtype != jnp.float32 or scale.ndim != 2:
            msg = f"RowSet can be added to a scale float32 [V, 1], got {_describe(scale)}"
            raise TypeError(msg)
        if self.values.shape != (self.ids.shape[0], scale.shape[1]):
            msg = f"RowSet with values {list(self.values.shape)} belongs to another table than a scale {list(scale.shape)}"
            raise ValueError(msg)
        return _ops.set_rows(jnp.asarray(scale), self.ids, self.values, shard_axes(self.axis))


def _describe(x: Any) -> str:
    return f"{x.dtype.name} {list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else type(x).__name__


def param_labels(tree: Any) -> Any:
    """Labels for `optax.partition`: "table" for every :class:`BinaryTable` and :class:`RowGrad`, "dense" for every other leaf."""

    def is_leaf(x: Any) -> bool:
        return isinstance(x, BinaryTable | RowGrad)

    return jax.tree.map(lambda x: "table" if is_leaf(x) else "dense", tree, is_leaf=is_leaf)
