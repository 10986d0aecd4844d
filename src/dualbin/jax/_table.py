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
    INDEPENDENT,
    check_initial_scale,
    check_int,
    check_padding_bits,
    check_padding_idx,
    check_spread,
    check_table_arrays,
    packed_width,
)
from dualbin._packing import pack_native
from dualbin.jax import _ops
from dualbin.jax._ids import row_dtype, to_ids
from dualbin.jax._link import Link, in_loss, leaves

_NATIVE_TYPES = ("float32", "float16", "bfloat16")

#: dtypes of looked-up values
FLOATS = tuple(jnp.dtype(x) for x in (jnp.float32, jnp.float16, jnp.bfloat16))


def check_dtype(dtype: Any, name: str = "dtype") -> jnp.dtype:
    """Return `dtype` as a dtype if values may have it, else raise TypeError."""
    result = jnp.dtype(dtype)
    if result not in FLOATS:
        msg = f"{name} must be float32, float16 or bfloat16, got {result.name}"
        raise TypeError(msg)
    return result


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class BinaryTable:
    """A table of V rows of D one-bit weights, each row with a scale: `value[v, d] = scale[v] * (+1 or -1)`.

    It is a pytree with the leaves `bits` and `scale`; the transformations of JAX and optax pass it around as they do any parameter.
    `table[ids]` looks rows up. A row whose scale is 0 is a padding row: zeros, no gradient, never updated.

    Args:
        bits: uint8 `[V, ceil(D / 8)]`; element `d` of a row is bit `d % 8` (least significant first) of byte `d // 8`; 1 is +1, 0 is -1;
            the padding bits of the last byte are 0.
        scale: float32 `[V, 1]`.
        dim: D (static).
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
    axis: str | tuple[str, ...] | None = None
    #: what the table carries beside its data while `value_and_grad` runs a loss
    _link: Link | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("bits", "scale"):
            value = getattr(self, name)
            if not (hasattr(value, "shape") and hasattr(value, "dtype")):
                msg = f"{name} must be an array, got {type(value).__name__}"
                raise TypeError(msg)
        check_table_arrays(self.bits.shape, self.bits.dtype.name, self.scale.shape, self.scale.dtype.name, self.dim)
        if _is_readable(self.bits):
            with jax.ensure_compile_time_eval():  # operations on concrete arrays may be traced where something else is
                check_padding_bits("bits", self.bits, self.dim)
        for name in ("bits", "scale"):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, name, jnp.array(value))  # asarray may share memory, and an update works in place

    @classmethod
    def create(cls, key: Array, V: int, D: int, *, scale: float = 0.3, padding_idx: int | None = None, spread: float = 0.5) -> BinaryTable:
        """A table of random signs.

        Args:
            key: a key of `jax.random`.
            V: rows, at least 1.
            D: weights in a row, at least 1.
            scale: the scale of every row, at least 1e-4.
            padding_idx: a row that is all zeros and stays so; negative counts from the end.
            spread: probability, rounded to 256ths, with which a sign differs from a pattern that all rows have in common; 0.5: rows are
                independent. With 0.1 a language model lost less to fp32 with few bits, above all with a projection (docs/quality.md).

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of range.
        """
        rows, dim = check_int("V", V, low=1), check_int("D", D, low=1)
        check_initial_scale(scale)
        bits = random_bits(key, rows, dim, check_spread(spread))
        scales = _zero_padding(jnp.full((rows, 1), scale, jnp.float32), padding_idx)
        return cls(bits=bits, scale=scales, dim=dim)

    @classmethod
    def from_float(cls, w: Any, padding_idx: int | None = None) -> BinaryTable:
        """The table that is nearest to a float one: the signs, and the mean of `abs(w)` of every row as its scale (1e-4 if it is all zero).

        Args:
            w: float32, float16 or bfloat16 `[V, D]`, a concrete array of NumPy or JAX.
            padding_idx: a row that becomes a padding row; negative counts from the end.

        Raises:
            TypeError: w has another dtype or is traced.
            ValueError: w has another shape, or holds a NaN.
        """
        if isinstance(w, jax.core.Tracer):
            msg = "w must be a concrete array: call from_float outside jit"
            raise TypeError(msg)
        w = np.asarray(w)
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
        bits, scale = pack_native(native, w, with_scale=True)
        return cls(bits=jnp.array(bits), scale=_zero_padding(jnp.array(scale), padding_idx), dim=w.shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """`(V, D)`; of a stack, with its axes in front."""
        return (*self.bits.shape[:-1], self.dim)

    def __repr__(self) -> str:
        """One line, also with something else for arrays."""
        if hasattr(self.scale, "missed"):  # the place of the table in a tree of gradients
            return repr(self.scale)
        if not (hasattr(self.bits, "shape") and len(self.bits.shape) >= 2):
            return f"BinaryTable(bits={self.bits!r}, scale={self.scale!r}, dim={self.dim})"
        *stack, rows, _ = self.bits.shape
        facts: dict[str, Any] = {"stack": stack} if stack else {}
        facts |= {"rows": rows, "dim": self.dim}
        if isinstance(self.bits, Array) and not isinstance(self.bits, jax.core.Tracer):
            facts["device"] = ", ".join(sorted(map(str, self.bits.devices())))
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in facts.items())})"

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The whole table as floats, `[V, D]`: 32 times the memory; for exports, tests and tied weights (:func:`dualbin.jax.attend`).

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
        signs = jnp.unpackbits(self.bits, axis=-1, count=self.dim, bitorder="little")
        scale = lax.stop_gradient(self.scale).astype(dtype)
        values = jnp.where(scale == 0, jnp.zeros((), dtype), jnp.where(signs == 1, scale, -scale))
        link = link_of(self)
        if link is None:
            return values
        rows, own, axes = all_rows(self), self.shape[0], shard_axes(self.axis)
        ids = jnp.arange(own, dtype=row_dtype(rows))
        first = lax.axis_index(axes).astype(ids.dtype) * jnp.asarray(own, ids.dtype) if axes else jnp.zeros((), ids.dtype)
        return _ops.linked_rows(link, values, ids + first, rows)

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
        return make_table(self.bits, self.scale + getattr(other, "scale", other), dim=self.dim, axis=self.axis)

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
        return (self.bits, self.scale, *link), (self.dim, self.axis)

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: tuple[Any, ...]) -> BinaryTable:
        return make_table(*children[:2], dim=aux[0], axis=aux[1], link=Link(*children[2:]) if children[2:] else None)


def make_table(bits: Any, scale: Any, *, dim: int, axis: Any = None, link: Link | None = None) -> BinaryTable:
    """A :class:`BinaryTable` without checks: JAX and optax put placeholders and updates where the arrays are."""
    table = object.__new__(BinaryTable)
    for name, value in {"bits": bits, "scale": scale, "dim": dim, "axis": axis, "_link": link}.items():
        object.__setattr__(table, name, value)
    return table


def link_of(table: BinaryTable) -> Link | None:
    slots = getattr(table, "slots", None)  # of an ActiveTable
    return table._link if slots is None else Link(slots, table.tap)


def with_link(table: BinaryTable, link: Link, scale: Array) -> BinaryTable:
    """The table for a loss that runs, with its scale as that loss sees it."""
    return make_table(table.bits, scale, dim=table.dim, axis=table.axis, link=link)


def lookup(table: BinaryTable, ids: Any, dtype: Any = jnp.float32) -> Array:
    """Look rows up.

    Inside a loss, take the gradient with :func:`dualbin.jax.value_and_grad`; in a table that is not active the rows are constants.

    Args:
        table: the table, V rows of D weights.
        ids: int32 or int64, any shape, values in [0, V).
        dtype: float32, float16 or bfloat16; the float32 scale is rounded to it.

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
        hint = ": dualbin.jax.from_torch makes one of it" if kind.__name__ == "BinaryTable" else ""
        msg = f"{name} must be a dualbin.jax.BinaryTable, got {kind.__module__ + '.' if hint else ''}{kind.__name__}{hint}"
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
    check_table_arrays(table.bits.shape[len(axes) :], "uint8", scale, "float32", table.dim)
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


def random_bits(key: Array, rows: int, dim: int, spread: int, pattern: Array | None = None) -> Array:
    """Random packed rows; with a spread below INDEPENDENT every bit differs with probability `spread` / 256 from the pattern `[1, B]`.

    Without a pattern, from one that is random too.
    """
    shape = rows, packed_width(dim)
    bits = jax.random.bits(key, shape, jnp.uint8) if spread == INDEPENDENT else _near(key, shape, spread, pattern)
    return bits.at[:, -1].set(bits[:, -1] & np.uint8((1 << dim % 8) - 1)) if dim % 8 else bits


def _near(key: Array, shape: tuple[int, int], spread: int, pattern: Array | None) -> Array:
    # One binary digit of the probability after the other, the last first: with a fair bit, "or" takes p to (1 + p) / 2, "and" to p / 2.
    different = jnp.zeros(shape, jnp.uint8)
    pattern_key, *keys = jax.random.split(key, 9)
    for digit, digit_key in enumerate(keys):
        fair = jax.random.bits(digit_key, shape, jnp.uint8)
        different = different | fair if spread >> digit & 1 else different & fair
    return different ^ (jax.random.bits(pattern_key, (1, shape[1]), jnp.uint8) if pattern is None else pattern)


def _zero_padding(scale: Array, padding_idx: int | None) -> Array:
    if padding_idx is None:
        return scale
    rows = scale.shape[0]
    return scale.at[check_padding_idx(padding_idx, rows)].set(0.0)
