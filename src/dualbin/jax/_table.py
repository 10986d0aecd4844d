"""The packed table as a JAX pytree, and `lookup`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._backends import load_native
from dualbin._checks import (
    check_bool,
    check_dim,
    check_fewer,
    check_initial_scale,
    check_padding_bits,
    check_padding_idx,
    check_planes,
    check_rows,
    check_spread,
    check_table_arrays,
)
from dualbin._packing import native_order, pack_native
from dualbin._schema import packed_width
from dualbin.jax import _ops
from dualbin.jax._ids import row_dtype, to_ids
from dualbin.jax._link import Link, in_loss, is_active, leaves
from dualbin.jax._random import random_bits

_NATIVE_TYPES = ("float32", "float16", "bfloat16")

#: dtypes of looked-up values
FLOATS = tuple(jnp.dtype(x) for x in (jnp.float32, jnp.float16, jnp.bfloat16))


def check_dtype(dtype: Any, name: str = "dtype") -> jnp.dtype:
    """Return `dtype` as a dtype if values may have it, else raise TypeError."""
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        msg = f"{name} must be float32, float16 or bfloat16, got {dtype!r}"
        raise TypeError(msg) from None
    if result not in FLOATS:
        msg = f"{name} must be float32, float16 or bfloat16, got {result.name}"
        raise TypeError(msg)
    return result


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class BinaryTable:
    """A table of V rows of D weights, each row with a scale, kept as one bit a weight, +scale or -scale, or as `planes` bits.

    A weight of k planes is `scale * s * (2m + 1) / 2**(k-1)`: s, +1 or -1, is plane 0, the other planes are the integer m.

    It is a pytree with the leaves `bits` and `scale`; the transformations of JAX and optax pass it around as they do any parameter.
    `table[ids]` looks rows up. A row whose scale is 0 is a padding row: zeros, no gradient, never updated.

    Args:
        bits: uint8 `[V, planes * ceil(D / 8)]`; in a plane, element `d` of a row is bit `d % 8` (least significant first) of byte `d // 8`;
            in plane 0 1 is +1 and 0 is -1; the planes of m follow, most significant first. The padding bits of a plane's last byte are 0.
        scale: float32 `[V, 1]`.
        dim: D (static).
        planes: 1 to 8, bits of a weight (static).
        axis: the mesh axis, or several, over which the rows are sharded, for lookups and updates inside `shard_map`: bits and scale are a
            shard there, ids those of the whole table. Everywhere else it says nothing.

    NumPy arrays are copied.

    Raises:
        TypeError, ValueError: an array has the wrong dtype or shape, or they do not fit each other; or padding bits are set, where bits
            are not traced and all on this host.
    """

    bits: Array
    scale: Array
    dim: int
    planes: int = 1
    axis: str | tuple[str, ...] | None = None
    #: what the table carries beside its data while `value_and_grad` runs a loss
    _link: Link | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("bits", "scale"):
            value = getattr(self, name)
            if not (hasattr(value, "shape") and hasattr(getattr(value, "dtype", None), "name")):
                hint = ": dualbin.jax.from_torch takes a table of PyTorch" if hasattr(value, "detach") else ""
                msg = f"{name} must be an array, got {type(value).__name__}{hint}"
                raise TypeError(msg)
        check_table_arrays(self.bits.shape, self.bits.dtype.name, self.scale.shape, self.scale.dtype.name, self.dim, self.planes)
        if _is_readable(self.bits):
            with jax.ensure_compile_time_eval():  # operations on concrete arrays may be traced where something else is
                check_padding_bits("bits", self.bits, self.dim)
        for name in ("bits", "scale"):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = native_order(name, value)
                object.__setattr__(self, name, jnp.array(value))  # asarray may share memory, and an update works in place

    @classmethod
    def create(
        cls, key: Array, V: int, D: int, *, scale: float = 0.3, padding_idx: int | None = None, spread: float = 0.5, planes: int = 1
    ) -> BinaryTable:
        """A table of random signs; with more planes, of random magnitudes below half of their range.

        Args:
            key: a key of `jax.random`.
            V: rows, at least 1.
            D: weights in a row, at least 1.
            scale: the scale of every row, at least 1e-4.
            padding_idx: a row that is all zeros and stays so; negative counts from the end.
            spread: probability, rounded to 256ths, with which a sign differs from a pattern that all rows have in common; 0.5: rows are
                independent. With 0.1 a language model lost less to fp32 with few bits, above all with a projection (docs/quality.md).
            planes: 1 to 8, bits of a weight.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of range.
        """
        dim = check_dim("D", D)
        rows = check_rows("V", V, dim)
        scale = check_initial_scale(scale)
        bits = random_bits(key, rows, dim, check_spread(spread), planes=check_planes(planes))
        scales = _zero_padding(jnp.full((rows, 1), scale, jnp.float32), padding_idx)
        return cls(bits=bits, scale=scales, dim=dim, planes=planes)

    @classmethod
    def from_float(cls, w: Any, padding_idx: int | None = None, planes: int = 1) -> BinaryTable:
        """The table that is nearest to a float one: signs and nearest levels, with the scale that :func:`dualbin.row_scale` gives a row.

        That is the mean magnitude for one plane, and the scale of least squared error for more (1e-4 for a row of zeros).

        Args:
            w: float32, float16 or bfloat16 `[V, D]`, a concrete array of NumPy or JAX.
            padding_idx: a row that becomes a padding row; negative counts from the end.
            planes: 1 to 8, bits of a weight.

        Raises:
            TypeError: w has another dtype or is traced.
            ValueError: w has another shape, or holds a NaN (with more than one plane, an infinity), or planes is out of range.
        """
        if isinstance(w, jax.core.Tracer):
            msg = "w must be a concrete array: call from_float outside jit"
            raise TypeError(msg)
        w = native_order("w", w) if isinstance(w, np.ndarray) else np.asarray(w)
        if w.dtype.name not in _NATIVE_TYPES:
            msg = f"w must be float32, float16 or bfloat16, got {w.dtype.name}"
            raise TypeError(msg)
        if w.ndim != 2 or w.size == 0:
            msg = f"w must have shape [V, D] with V and D at least 1, got {list(w.shape)}"
            raise ValueError(msg)
        native, reason = load_native()
        if native is None:
            msg = f"from_float needs the native library dualbin._native, which cannot be loaded: {reason}"
            raise ImportError(msg)
        bits, scale = pack_native(native, w, check_planes(planes))
        return cls(bits=jnp.array(bits), scale=_zero_padding(jnp.array(scale), padding_idx), dim=w.shape[1], planes=planes)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(V, D)`; of a stack, with its axes in front."""
        return (*self.bits.shape[:-1], self.dim)

    def __repr__(self) -> str:
        """One line, also with something else for arrays."""
        if hasattr(self.scale, "missed"):  # the place of the table in a tree of gradients
            return repr(self.scale)
        if not (hasattr(self.bits, "shape") and len(self.bits.shape) >= 2):
            planes = "" if self.planes == 1 else f", planes={self.planes}"
            return f"BinaryTable(bits={self.bits!r}, scale={self.scale!r}, dim={self.dim}{planes})"
        *stack, rows, _ = self.bits.shape
        facts: dict[str, Any] = {"stack": stack} if stack else {}
        facts |= {"rows": rows, "dim": self.dim} | ({} if self.planes == 1 else {"planes": self.planes})
        if isinstance(self.bits, Array) and not isinstance(self.bits, jax.core.Tracer):
            facts["device"] = ", ".join(sorted(map(str, self.bits.devices())))
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in facts.items())})"

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The whole table as floats, `[V, D]`, which is 32 / planes times the memory.

        It is for exports, tests and tied weights (:func:`dualbin.jax.attend`).

        In a loss under :func:`dualbin.jax.value_and_grad` it has a gradient if all rows are declared. A table that does not train is a
        constant.

        Raises:
            TypeError: dtype is none that values may have.
            ValueError: fewer rows are declared.
        """
        dtype = check_dtype(dtype)
        check_table(self, stack=True)
        if self.bits.ndim > 2:
            return jax.vmap(lambda table: table.dequantize(dtype))(self)
        values = _ops.row_values(self.bits, lax.stop_gradient(self.scale), dim=self.dim, dtype=dtype)
        link = link_of(self)
        if link is None:
            return values
        rows, own, axes = all_rows(self), self.shape[0], shard_axes(self.axis)
        ids = jnp.arange(own, dtype=row_dtype(rows))
        first = lax.axis_index(axes).astype(ids.dtype) * jnp.asarray(own, ids.dtype) if axes else jnp.zeros((), ids.dtype)
        return _ops.linked_rows(link, values, ids + first, rows)

    def with_planes(self, planes: int, *, rescale: bool = True) -> BinaryTable:
        """A new table of the top planes of this one, or of every member of a stack: what is left of a trained table where fewer are served.

        Args:
            planes: 1 to the planes of this table (static).
            rescale: give every row the scale of least squared error against this table's values; else it keeps its scale.

        Raises:
            TypeError: planes is no int, or this is the gradient of a table.
            ValueError: planes is out of range, or the table is one that trains, in its loss: the new table would have no gradient.
        """
        check_table(self, stack=True)
        check_fewer(planes, self.planes)
        check_bool("rescale", rescale)
        if is_active(link_of(self)):
            msg = (
                "with_planes makes a new table, which has no gradient in this loss: call it outside, or on a constant, "
                "BinaryTable(table.bits, table.scale, table.dim, table.planes)"
            )
            raise ValueError(msg)
        kept = self.bits[..., : planes * packed_width(self.dim)]
        scale = _ops.fewer_scale(self.bits, self.scale, dim=self.dim, planes=planes) if rescale and planes < self.planes else self.scale
        bits, scale = (jnp.array(x, copy=True) for x in (kept, scale))  # memory of its own: an update works in place
        return make_table(bits, scale, dim=self.dim, planes=planes, axis=self.axis)

    def __getitem__(self, ids: Any) -> Array:
        """The same as :func:`dualbin.jax.lookup` in float32."""
        return lookup(self, ids)

    def __getattr__(self, name: str) -> Any:
        """In a tree of gradients, what the :class:`dualbin.jax.RowGrad` has that is in the place of the scale there."""
        grad = self.__dict__.get("scale")
        if name in {"ids", "rows", "num_rows", "missed"} and hasattr(grad, "missed"):
            return getattr(grad, name)
        hint = ": dbj.attend(table, query) is query @ table.dequantize().T" if name == "T" else ""
        msg = f"{type(self).__name__!r} object has no attribute {name!r}{hint}"
        raise AttributeError(msg)

    def __add__(self, other: Any) -> Any:
        """The sum of two gradients, see :func:`dualbin.jax.add`; tables cannot be added."""
        if not hasattr(self.scale, "missed"):
            return NotImplemented
        return table_like(self, self.bits, self.scale + getattr(other, "scale", other))

    def __radd__(self, other: Any) -> Any:
        return self if hasattr(self.scale, "missed") and isinstance(other, int) and other == 0 else NotImplemented

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        msg = "a packed table is no array: table[ids] gives rows, table.dequantize() all of them as floats"
        raise TypeError(msg)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, aux = self.tree_flatten()
        names = ("bits", "scale", "slots", "tap")[: len(children)]
        return tuple(zip(map(jax.tree_util.GetAttrKey, names), children, strict=True)), aux

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        link = leaves(self._link, self.bits, self.scale, self.dim) if in_loss() else ()
        return (self.bits, self.scale, *link), (self.dim, self.planes, self.axis)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> BinaryTable:
        dim, planes, axis = aux
        return make_table(*children[:2], dim=dim, planes=planes, axis=axis, link=Link(*children[2:]) if children[2:] else None)


def make_table(bits: Any, scale: Any, *, dim: int, planes: int, axis: Any = None, link: Link | None = None) -> BinaryTable:
    """A :class:`BinaryTable` without checks: JAX and optax put placeholders and updates where the arrays are."""
    table = object.__new__(BinaryTable)
    for name, value in {"bits": bits, "scale": scale, "dim": dim, "planes": planes, "axis": axis, "_link": link}.items():
        object.__setattr__(table, name, value)
    return table


def table_like(table: BinaryTable, bits: Any, scale: Any, link: Link | None = None) -> BinaryTable:
    """:func:`make_table` with what is static of `table`."""
    return make_table(bits, scale, dim=table.dim, planes=table.planes, axis=table.axis, link=link)


def link_of(table: BinaryTable) -> Link | None:
    slots = getattr(table, "slots", None)  # of an ActiveTable
    return table._link if slots is None else Link(slots, table.tap)


def with_link(table: BinaryTable, link: Link, scale: Array) -> BinaryTable:
    """The table for a loss that runs, with its scale as that loss sees it."""
    return table_like(table, table.bits, scale, link)


def lookup(table: BinaryTable, ids: Any, dtype: Any = jnp.float32) -> Array:
    """Look rows up.

    Inside a loss, take the gradient with :func:`dualbin.jax.value_and_grad`; in a table that is not active the rows are constants.

    Args:
        table: the table, V rows of D weights.
        ids: int32 or int64, any shape, values in [0, V).
        dtype: float32, float16 or bfloat16, to which the float32 values are rounded.

    Returns:
        `ids.shape + (D,)` of `dtype`; zeros for padding rows. On a GPU the row of an id outside [0, V) is NaN.

    Raises:
        TypeError, ValueError: wrong dtype of ids or values, or a malformed table.
        ValueError: under a `vmap` over the Explicit mesh axis that shards the rows.
        IndexError: an id outside [0, V), where ids are concrete and in host memory. Under jit on the CPU the compiled call fails with
            `jax.errors.JaxRuntimeError`, which names the id.
    """
    check_table(table)
    kind, rows = check_dtype(dtype), all_rows(table)
    array = to_ids(ids, rows)
    return _ops.linked_lookup(link_of(table), table.bits, table.scale, array, table.dim, kind, rows, shard_axes(table.axis))


_LEAF_BY_LEAF = {
    "bits": "packed bits cannot be cast or averaged as floats are; the average of two tables is dualbin.jax.average",
    "scale": "leave tables out of casts of the parameters; dbj.lookup(table, ids, dtype) gives values of another dtype",
}


def check_table(table: object, name: str = "table", *, stack: bool = False) -> BinaryTable:
    """Return `table` if it is a well-formed BinaryTable, or with `stack` perhaps a stack of them, else raise TypeError or ValueError."""
    if not isinstance(table, BinaryTable):
        kind = type(table)
        of_torch = kind.__name__ == "BinaryTable"
        hint = ": dualbin.jax.from_torch makes one of it" if of_torch else ": give its table[...]" if kind.__name__ == "BinaryEmbed" else ""
        msg = f"{name} must be a dualbin.jax.BinaryTable, got {kind.__module__ + '.' if of_torch else ''}{kind.__name__}{hint}"
        raise TypeError(msg)
    for field, kind in (("bits", jnp.uint8), ("scale", jnp.float32)):
        value = getattr(table, field)
        if hasattr(table.scale, "missed"):
            msg = f"{name} is the gradient of a table, a dualbin.jax.RowGrad, and no table: g.ids and g.rows are what it holds"
            raise TypeError(msg)
        if not hasattr(value, "dtype"):
            msg = f"{name}.{field} must be an array, got {type(value).__name__}"
            raise TypeError(msg)
        if value.dtype != kind:
            msg = f"{name}.{field} must be {jnp.dtype(kind).name}, got {value.dtype.name}: {_LEAF_BY_LEAF[field]}"
            raise TypeError(msg)
    axes, scale = tuple(table.bits.shape[:-2]), tuple(table.scale.shape)
    if axes and not stack:
        msg = (
            f"{name} is a stack of {math.prod(axes)} tables, with bits {list(table.bits.shape)}, and its members are used one by one: "
            "lax.scan or vmap over the stack, or jax.tree.map(lambda x: x[0], table)"
        )
        raise ValueError(msg)
    if scale[: len(axes)] == axes:
        scale = scale[len(axes) :]
    check_table_arrays(table.bits.shape[len(axes) :], "uint8", scale, "float32", table.dim, table.planes)
    return table


def shard_axes(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of :attr:`BinaryTable.axis` inside a `shard_map` over them, else ()."""
    axes = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    return axes if set(axes) <= set(jax.sharding.get_abstract_mesh().manual_axes) else ()


def all_rows(table: BinaryTable) -> int:
    """V of the whole table, also where `table` is a shard of it."""
    axes = shard_axes(table.axis)
    return table.bits.shape[-2] * (lax.axis_size(axes) if axes else 1)


def _is_readable(x: Any) -> bool:
    return isinstance(x, np.ndarray) or (isinstance(x, Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable)


def is_table(x: object) -> bool:
    return isinstance(x, BinaryTable)


def _zero_padding(scale: Array, padding_idx: int | None) -> Array:
    if padding_idx is None:
        return scale
    rows = scale.shape[0]
    return scale.at[check_padding_idx(padding_idx, rows)].set(0.0)
