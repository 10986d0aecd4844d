"""Row gradients: the rows of a table that a step used, and no others."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._checks import check_int
from dualbin._packing import native_order
from dualbin.jax import _ops, _slots
from dualbin.jax._stack import over_members, stack_axes
from dualbin.jax._table import BinaryTable, all_rows, table_like

_LOST = (
    "the row numbers of this table's gradient are lost in arithmetic on its leaves, such as a sum with a gradient of other rows or a cast "
    "to half precision: dualbin.jax.add(a, b), or a + b, adds gradients of different rows; leave them out of casts"
)


class _Gradient(type):
    """The place of a table in a tree of gradients is a node like that of the table, and counts as the :class:`RowGrad` that it holds."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or is_place(instance)


@jax.tree_util.register_pytree_with_keys_class
class RowGrad(metaclass=_Gradient):
    """The gradient of a table: the rows that a step used, and no others.

    In a tree of gradients it stands in a node like that of the table, so that the tree fits that of the parameters. There
    `isinstance(g, RowGrad)` holds, too, and `g.ids`, `g.rows`, `g.num_rows`, `g.missed()` and `g + g` are those of the gradient.

    Its leaves are floats, `rows` and the ids in a form on which arithmetic does no harm: `jax.tree.map`, `lax.psum` and optax may scale
    gradients and add those of the same ids; in norms only `rows` count. `a + b` adds gradients of any ids, see :func:`add`. Where leaves of
    different ids were added, or cast to half precision, the ids are lost, which is an error where they are used.

    Args:
        ids: int32 or int64 `[U]`, distinct; unused slots and the last one, the sentinel, hold V.
        rows: float32 `[U, D]`: `dL/dvalue` summed over the occurrences of the row. The last one has what undeclared rows got.
        num_rows: V, if known (static); the optimizer then notices a gradient of another table.

    The gradient of a stack of tables has the axes of the stack in front of `ids` and `rows`.

    Raises:
        TypeError, ValueError: an array has the wrong dtype or shape, or they do not fit each other.
    """

    slots: Array
    rows: Array
    num_rows: int | None

    def __init__(self, ids: Array, rows: Array, num_rows: int | None = None) -> None:
        for name, value in (("ids", ids), ("rows", rows)):
            if not hasattr(value, "dtype"):
                msg = f"RowGrad.{name} must be an array, got {type(value).__name__}"
                raise TypeError(msg)
        ids, rows = (native_order(f"RowGrad.{name}", x) if isinstance(x, np.ndarray) else x for name, x in (("ids", ids), ("rows", rows)))
        check_gradient("RowGrad", ids, rows, ("float32",), "ids", "rows")
        if ids.ndim < 1:
            msg = "RowGrad.ids must have at least 1 dimension, got shape []"
            raise ValueError(msg)
        if num_rows is not None:
            check_int("num_rows", num_rows, low=1)
        self.slots, self.rows, self.num_rows = _slots.encode(jnp.asarray(ids)), rows, num_rows
        self._ids: Array | None = jnp.asarray(ids)

    @property
    def ids(self) -> Array:
        """The rows, int32 or int64 `[U]`; `num_rows`, or the largest integer, in slots whose gradient was multiplied by 0 or is not finite.

        Raises:
            ValueError: the ids are lost; under jit they are the smallest integer instead, and an update with them fails.
        """
        if self._ids is not None:
            return self._ids
        ids = self._decoded()
        if isinstance(ids, jax.core.Tracer):
            return ids
        if _has_lost(ids):
            raise ValueError(_LOST)
        self._ids = ids
        return ids

    def _decoded(self) -> Array:
        ids, gone = _slots.decode(self.slots), _slots.gone(self.slots)
        nowhere = jnp.asarray(jnp.iinfo(ids.dtype).max if self.num_rows is None else self.num_rows, ids.dtype)

        def without_gone() -> Array:
            nothing = ((self.rows == 0) | ~jnp.isfinite(self.rows)).all(-1)
            return jnp.where(gone & nothing, nowhere, ids)

        return lax.cond(gone.any(), without_gone, lambda: ids)  # rarely are rows read for it

    def missed(self) -> Array:
        """bool: some lookup used a row that was not declared, so this gradient is incomplete. Pass all ids, or a larger capacity."""
        return jnp.any(self.rows[..., -1, :] != 0) | _has_lost(self.ids)

    def __add__(self, other: Any) -> RowGrad:
        """See :func:`add`."""
        return add(self, row_grad(other)) if isinstance(other, RowGrad) else NotImplemented

    __array_ufunc__ = None  # NumPy must not try to add it element by element

    def __radd__(self, other: Any) -> Any:
        """0 + a is a, the beginning of `sum`; and what `optax.apply_updates` does with a gradient that nothing made an update of.

        A scale stays what it is where the gradient was multiplied by 0, as by `optax.set_to_zero`. Other gradients are no updates of a
        table: a TypeError, or in compiled code, which cannot raise, NaN in the scales of their rows.
        """
        if isinstance(other, int) and other == 0:
            return self
        if not hasattr(other, "dtype") or other.dtype != jnp.float32 or other.ndim != self.rows.ndim or other.shape[-1] != 1:
            return NotImplemented
        return over_members(_spoil, other.ndim - 2)(jnp.asarray(other), self)

    def __repr__(self) -> str:
        if not hasattr(self.rows, "shape") or len(self.rows.shape) < 2:
            return f"RowGrad(slots={self.slots!r}, rows={self.rows!r}, num_rows={self.num_rows!r})"
        *stack, slots, dim = self.rows.shape
        return f"RowGrad({f'stack={stack}, ' if stack else ''}slots={slots}, dim={dim}, num_rows={self.num_rows})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], int | None]:
        keys = jax.tree_util.GetAttrKey
        return ((keys("slots"), self.slots), (keys("rows"), self.rows)), self.num_rows

    def tree_flatten(self) -> tuple[tuple[Any, Any], int | None]:
        return (self.slots, self.rows), self.num_rows

    @classmethod
    def tree_unflatten(cls, num_rows: int | None, children: tuple[Any, Any]) -> RowGrad:
        grad = object.__new__(cls)
        grad.slots, grad.rows = children
        grad.num_rows, grad._ids = num_rows, None
        return grad


def _spoil(scale: Array, grad: RowGrad) -> Array:
    """`scale` with NaN in the rows of the gradient."""
    rows = scale.shape[0]
    ids = grad.ids
    places = jnp.where((ids < 0) | (ids >= rows) | _slots.gone(grad.slots), jnp.asarray(rows, ids.dtype), ids)
    if not isinstance(places, jax.core.Tracer) and (places < rows).any():
        msg = (
            "a gradient of a table is no update of it: dualbin.jax.xor makes one, for the label 'table' of optax.partition(..., "
            "dualbin.jax.param_labels), and optax.set_to_zero() leaves a table as it is"
        )
        raise TypeError(msg)
    return jnp.where(_has_lost(ids), jnp.float32(jnp.nan), scale.at[places].set(jnp.nan, mode="drop"))


class _Telling(type):
    """JAX shows the types of nodes where two trees do not fit: then the optimizer of dense parameters has met the gradient of a table."""

    def __repr__(cls) -> str:
        return (
            "<the gradient of a packed table, which takes dualbin.jax.xor: "
            "optax.partition({'table': dualbin.jax.xor(...), 'dense': ...}, dualbin.jax.param_labels)>"
        )


@jax.tree_util.register_pytree_node_class
class _NoFlips(metaclass=_Telling):
    """What is beside a :class:`RowGrad` in the place of the bits: they have no gradient of their own, and adding it changes nothing."""

    __array_ufunc__ = None

    def __radd__(self, bits: Any) -> Any:
        return bits

    def __rmul__(self, _factor: Any) -> Any:
        """What arithmetic over the leaves of the parameters and of their gradients comes to, as that of `optax.contrib.sam`."""
        msg = (
            "a gradient of a table has no numbers for its packed bits, so nothing can be made of both: leave what calculates with "
            "parameters and gradients, such as optax.contrib.sam, to the label 'dense' of optax.partition(..., dualbin.jax.param_labels)"
        )
        raise TypeError(msg)

    __mul__ = __rmul__

    def __repr__(self) -> str:
        return "no flips"

    def tree_flatten(self) -> tuple[tuple[()], None]:
        return (), None

    @classmethod
    def tree_unflatten(cls, _aux: None, _children: tuple[()]) -> _NoFlips:
        return cls()


def in_place_of(table: BinaryTable, grad: RowGrad) -> BinaryTable:
    """The gradient as it is in a tree, in a node like that of the table: so trees of parameters, gradients and updates fit each other."""
    return table_like(table, _NoFlips(), grad)


def is_place(x: object) -> bool:
    """Whether x is the node of a table with a :class:`RowGrad` in it."""
    return isinstance(x, BinaryTable) and type(x.scale) is RowGrad


def row_grad(x: Any) -> Any:
    """The :class:`RowGrad` of a gradient as it is in a tree; anything else as it is."""
    return x.scale if is_place(x) else x


def add(a: Any, b: Any) -> Any:
    """The sum of two gradients of one table, of any rows.

    Args:
        a: with U1 slots.
        b: with U2 slots.

    Returns:
        A gradient with ascending ids and at most `U1 + U2 - 1` slots. A row that both have is that of `a` plus that of `b`, in float32; so
        `((g1 + g2) + g3) + ...` adds steps in their order.

    Raises:
        TypeError: an argument is no gradient of a table.
        ValueError: they are not of one table, `num_rows` is not known, or ids are lost.
    """
    if is_place(a):
        return in_place_of(a, add(row_grad(a), b))
    b = row_grad(b)
    for name, grad in (("a", a), ("b", b)):
        if not isinstance(grad, RowGrad):
            msg = f"{name} must be a dualbin.jax.RowGrad, got {type(grad).__name__}"
            raise TypeError(msg)
    rows = a.num_rows if a.num_rows is not None else b.num_rows
    if rows is None:
        msg = "one of the gradients must have num_rows: RowGrad(ids, rows, num_rows=V)"
        raise ValueError(msg)
    if rows != (rows if b.num_rows is None else b.num_rows) or _without_slots(a) != _without_slots(b):
        msg = f"a and b must be gradients of one table, got [{a.num_rows}, {a.rows.shape[-1]}] and [{b.num_rows}, {b.rows.shape[-1]}]"
        raise ValueError(msg)
    return over_members(partial(_sum, rows=rows), a.rows.ndim - 2)(a, b)


def _sum(a: RowGrad, b: RowGrad, rows: int) -> RowGrad:
    kind = jnp.promote_types(a.ids.dtype, b.ids.dtype)
    ids = jnp.concatenate([a.ids[:-1].astype(kind), b.ids[:-1].astype(kind)])
    sums = jnp.concatenate([a.rows[:-1], b.rows[:-1]])
    lost = _has_lost(a.ids) | _has_lost(b.ids)
    merged_ids, merged = ids, sums
    if ids.size:
        merged_ids, merged, _ = _ops.reduce_rows(ids, sums, rows, min(ids.size, rows))
    last = jnp.where(lost, _slots.lost_id(kind), jnp.asarray(rows, kind))[None]
    return RowGrad(jnp.concatenate([merged_ids, last]), jnp.concatenate([merged, a.rows[-1:] + b.rows[-1:]]), rows)


def _without_slots(grad: RowGrad) -> tuple[int, ...]:
    return (*grad.rows.shape[:-2], grad.rows.shape[-1])


def _has_lost(ids: Array) -> Array:
    return (ids == _slots.lost_id(ids.dtype)).any()


def update_ids(grad: RowGrad) -> Array:
    """The ids for an update. Lost ones are a ValueError; under jit a runtime error on the CPU, and one of `check_errors` on a GPU."""
    ids = grad.ids
    if not isinstance(ids, jax.core.Tracer):
        return ids
    # a lookup is what can fail in compiled code: in a table of one row, of that row or of one that no table has
    lost = _has_lost(ids)
    asked = jnp.where(lost, _slots.lost_id(ids.dtype), jnp.zeros((), ids.dtype))
    found = _ops.lookup(jnp.zeros((1, 1), jnp.uint8), jnp.ones((1, 1), jnp.float32), asked, 1, jnp.dtype(jnp.float32))
    return jnp.where(lost & jnp.isnan(found[0]), _slots.lost_id(ids.dtype), ids)


def check_row_grad(grad: object, name: str, table: BinaryTable) -> RowGrad:
    """Return the RowGrad of `grad` if it has one that fits `table`, else raise TypeError or ValueError."""
    grad = row_grad(grad)
    if not isinstance(grad, RowGrad):
        msg = f"{name} must be a dualbin.jax.RowGrad (see dualbin.jax.value_and_grad), got {type(grad).__name__}"
        if isinstance(grad, BinaryTable):
            msg += (
                ": jax.grad, or what an optimizer keeps for every parameter, such as the sums of optax.MultiSteps, makes that; "
                "dualbin.jax.accumulate sums gradients, and rules have every=K"
            )
        raise TypeError(msg)
    for field in ("slots", "rows"):
        value = getattr(grad, field)
        given = f"{value.dtype.name} {list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
        if not hasattr(value, "dtype") or value.dtype != jnp.float32:
            msg = f"{name}.{field} must be float32, as value_and_grad makes it: leave gradients of tables out of casts, got {given}"
            raise TypeError(msg)
        slots = grad.rows.shape[-2:-1]
        if value.ndim < 2 or value.shape[:-1] != (*stack_axes(table), *slots):
            msg = f"{name}.{field} must have shape {[*stack_axes(table), *slots, 'k']} for this table, got {given}"
            raise ValueError(msg)
    rows, dim = all_rows(table), table.dim
    if grad.rows.shape[-1] != dim:
        msg = f"{name} belongs to another table: its rows have {grad.rows.shape[-1]} columns, the table has {dim}"
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
