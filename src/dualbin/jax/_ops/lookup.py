"""The operation `lookup`: rows of a table, and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.extend.core import take_current_trace

from dualbin import _reference_planes
from dualbin.jax._link import Link, is_declared, is_marks, is_whole, record, row_ids
from dualbin.jax._ops.operation import (
    Axes,
    Operation,
    Plan,
    Spec,
    explicit_mesh,
    native_call,
    own_ids,
    replicate,
    sum_over_devices,
    varying,
)
from dualbin.jax._ops.sums import row_sums
from dualbin.jax._ops.unsummed import remember


def lookup(bits: Array, scale: Array, ids: Array, dim: int, dtype: Any, axes: Axes = ()) -> Array:
    """Rows `ids` of the table: `dtype` `ids.shape + (dim,)`.

    An id outside [0, V) is a runtime error on the CPU; on a GPU, and where the rows are sharded, its row is NaN.
    """
    if ids.ndim == 0:
        return lookup(bits, scale, ids[None], dim, dtype, axes)[0]
    if ids.size == 0:
        return jnp.zeros((*ids.shape, dim), dtype)
    return Lookup(dim, jnp.dtype(dtype))(bits, scale, ids, axes=axes)[0]


@dataclass(frozen=True)
class Lookup(Operation):
    """(bits, scale, ids) -> values.

    An id outside [0, V) is a runtime error on the CPU; on a GPU it gives NaN and an entry in the error block.

    A table may be sharded by rows. Its shards keep their rows: ids travel to them, packed rows with their scales come back.
    """

    dim: int
    dtype: Any

    def native(self, bits: Array, scale: Array, ids: Array) -> list[Array]:
        result = jax.ShapeDtypeStruct((*ids.shape, self.dim), self.dtype)
        return native_call("dualbin_lookup", [result], bits, scale, ids, dim=np.int64(self.dim), bad_ids=np.int32(False))

    def fallback(self, bits: Array, scale: Array, ids: Array) -> list[Array]:
        rows = bits.shape[0]
        inside = (ids >= 0) & (ids < rows)
        known = jnp.where(inside, ids, 0)
        values = row_values(bits[known], scale[known], dim=self.dim, dtype=self.dtype)
        return [jnp.where(inside[..., None], values, jnp.array(jnp.nan, self.dtype))]

    def sharding_rule(self, *operands: Array) -> str:
        names = " ".join(f"i{k}" for k in range(operands[2].ndim))
        return f"v b, v o, {names} -> {names} d"

    def plan(self, specs: list[Spec]) -> Plan:
        axes, spec = specs[0][0], specs[2]
        return Plan([(axes, ()), (axes, ()), spec], [(*spec, ())], partial(self.shard, axes=axes, spec=spec))

    def shard(self, bits: Array, scale: Array, ids: Array, *, axes: Axes, spec: Spec | None = None) -> list[Array]:
        """`spec` is the sharding of ids; without it they are spread over those of the axes over which their type varies."""
        if not axes:
            return self.on_device(bits, scale, ids)
        rows = bits.shape[0]
        if spec is None:
            split = axes
            if varying(bits):  # types tell; without them ids may differ from device to device
                split = tuple(axis for axis in axes if axis in varying(ids))
            flat = self.shard(bits, scale, ids.reshape(-1), axes=axes, spec=(split,))[0]
            return [flat.reshape(*ids.shape, self.dim)]
        wanted = own_ids(_gather(ids, spec, axes), rows, axes, other=-1)
        # one device has the row: in the sum the bytes are what they are there, and so are words of them
        packed = _in_bytes(_add_and_scatter(_in_words(_packed_rows(bits, scale, wanted)), (*spec, ()), axes))
        inside = (ids >= 0) & (ids < rows * lax.axis_size(axes))
        found = self.on_device(*_unpacked_rows(packed.reshape(-1, packed.shape[-1])), jnp.arange(ids.size, dtype=ids.dtype))[0]
        return [jnp.where(inside[..., None], found.reshape(*ids.shape, self.dim), jnp.array(jnp.nan, self.dtype))]

    def batch(self, size: int, batched: Sequence[bool], operands: Sequence[Array], axes: Axes) -> tuple[list[Array], list[bool]]:
        if not (batched[0] or batched[1]):  # the batch axis is one more of ids
            return self(*operands, axes=axes), [batched[2]]
        bits, scale, ids = operands
        rows = bits.shape[-2]
        largest = np.iinfo(ids.dtype).max
        if axes or explicit_mesh(operands) is not None or not (batched[0] and batched[1]) or size * rows > largest:
            return super().batch(size, batched, operands, axes)
        # One table of all members' rows, so that none is copied. Ids outside a member's table stay outside this one.
        ids = ids if batched[2] else jnp.broadcast_to(ids, (size, *ids.shape))
        member = jnp.arange(size, dtype=ids.dtype).reshape(size, *[1] * (ids.ndim - 1))
        member = jnp.where(ids < 0, jnp.zeros_like(member), jnp.where(ids < rows, member, jnp.asarray(size - 1, ids.dtype)))
        whole = bits.reshape(size * rows, -1), scale.reshape(size * rows, 1)
        return self(*whole, ids + member * jnp.asarray(rows, ids.dtype)), [True]


@partial(jax.jit, static_argnames=("dim", "dtype"), inline=True)
def row_values(bits: Array, scale: Array, *, dim: int, dtype: Any) -> Array:
    """The values `[..., dim]` of packed rows with their scales `[..., 1]`; zeros where the scale is 0."""
    return _reference_planes.row_values(bits, scale, dim, dtype, jnp)


def _packed_rows(bits: Array, scale: Array, ids: Array) -> Array:
    """The packed rows `ids` with the bytes of their scales behind them, uint8 `[..., planes * B + 4]`; zeros where an id is below 0."""
    known = jnp.where(ids < 0, 0, ids)
    of_scale = lax.bitcast_convert_type(scale[known, 0], jnp.uint8)
    return jnp.where((ids < 0)[..., None], np.uint8(0), jnp.concatenate([bits[known], of_scale], axis=-1))


def _in_words(packed: Array) -> Array:
    """Bytes `[..., n]` as uint32 `[..., n/4]`, which are added faster, if n allows."""
    if packed.shape[-1] % 4:
        return packed
    return lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], -1, 4), jnp.uint32)


def _in_bytes(words: Array) -> Array:
    if words.dtype == jnp.uint8:
        return words
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1)


def _unpacked_rows(packed: Array) -> tuple[Array, Array]:
    """Bits and scale of the table `[N]` of what :func:`_packed_rows` made."""
    return packed[:, :-4], lax.bitcast_convert_type(packed[:, -4:], jnp.float32)[:, None]


def _gather(x: Array, spec: Spec, axes: Axes) -> Array:
    """All parts of `x` over those of its own axes that are in `axes`."""
    for dimension, own in enumerate(spec):
        if common := tuple(axis for axis in own if axis in axes):
            x = lax.all_gather(x, common, axis=dimension, tiled=True)
    return x


def _add_and_scatter(x: Array, spec: Spec, axes: Axes) -> Array:
    """The sum of `x` over `axes`, and of it the part that is this device's: the inverse of :func:`_gather`."""
    taken = {axis for own in spec for axis in own}
    if rest := tuple(axis for axis in axes if axis not in taken):
        x = lax.psum(x, rest)
    for dimension, own in enumerate(spec):
        if common := tuple(axis for axis in own if axis in axes):
            x = lax.psum_scatter(x, common, scatter_dimension=dimension, tiled=True)
    return x


# ---- gradient ----------------------------------------------------------------------------------------------------------------------------


def linked_lookup(link: Link | None, bits: Array, scale: Array, ids: Array, dim: int, dtype: Any, rows: int, axes: Axes = ()) -> Array:
    """`lookup`, whose cotangent goes to the tap of the link. The scale is a constant."""
    _check_vmap(bits)
    record(link, (bits.shape[0], dim), ids)
    values = lookup(bits, lax.stop_gradient(scale), ids, dim, dtype, axes)
    if link is not None and is_declared(link):
        return _fold_vmap(partial(_attach_rows, rows, is_whole(link, ids)), (link.tap, row_ids(link)), values, ids)
    if link is not None and is_marks(link):
        return _fold_vmap(partial(_attach_marks, rows), (link.tap,), values, ids)
    return values


def linked_rows(link: Link, values: Array, ids: Array, rows: int) -> Array:
    """`values` `[N, D]`, the rows `ids` of a table that uses all of its rows at once; their cotangent goes to the tap of the link.

    Where fewer rows are declared than there are, that is an error. Where enough are that may not be all, only the program that runs knows:
    its gradient is then NaN.

    Raises:
        ValueError: fewer rows are declared.
    """
    record(link, (values.shape[0], values.shape[1]), ids)
    if not is_declared(link):
        return _attach_marks(rows, (link.tap,), values, ids) if is_marks(link) else values
    declared = link.tap.shape[-2] - 1
    if jax.core.max_dim(declared, rows) != declared:
        msg = (
            f"this loss uses all {rows} rows of a table at once (dequantize, attend), of which at most {declared} are declared: declare "
            f"them all, with value_and_grad(..., ids=lambda params, *args: {{path: jnp.arange({rows})}})"
        )
        raise ValueError(msg)
    places = row_ids(link)
    return _spoil(_attach_rows(rows, False, (link.tap, places), values, ids), places[rows - 1] == rows - 1)


@jax.custom_vjp
def _spoil(values: Array, _right: Array) -> Array:
    """`values`, whose cotangent is NaN where this is not right."""
    return values


_spoil.defvjp(lambda values, right: (values, right), lambda right, dy: (jnp.where(right, dy, jnp.asarray(jnp.nan, dy.dtype)), None))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach_rows(_rows: int, _whole: bool, _operands: tuple[Array, Array], values: Array, _ids: Array) -> Array:
    return values


def _attach_rows_fwd(_rows: int, _whole: bool, operands: tuple[Array, Array], values: Array, ids: Array) -> tuple[Array, Any]:
    tap, row_ids = operands
    return values, (tap[:0], row_ids, ids)  # no bytes of the tap are kept, only its type: where it varies


def _attach_rows_bwd(rows: int, whole: bool, residuals: Any, dy: Array) -> tuple[Any, Array, None]:
    tap, row_ids, ids = residuals
    if not whole:
        return (sum_over_devices(row_sums(row_ids, ids, dy, rows), tap), None), dy, None
    flat_ids, flat_dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
    sums = row_sums(row_ids, flat_ids, flat_dy, rows)
    remember(sums, flat_ids, flat_dy)
    return (sum_over_devices(sums, tap), None), dy, None


_attach_rows.defvjp(_attach_rows_fwd, _attach_rows_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attach_marks(_rows: int, _operands: tuple[Array], values: Array, _ids: Array) -> Array:
    return values


def _attach_marks_fwd(_rows: int, operands: tuple[Array], values: Array, ids: Array) -> tuple[Array, Any]:
    return values, (operands[0][:0], ids)


def _attach_marks_bwd(rows: int, residuals: Any, dy: Array) -> tuple[Any, Array, None]:
    marks, ids = residuals
    flat = replicate(ids).reshape(-1)
    places = jnp.where(flat < 0, rows, flat)  # a negative index would count from the end
    used = jnp.zeros((rows,), jnp.float32).at[places].set(1.0, mode="drop")
    return (sum_over_devices(used, marks),), dy, None


_attach_marks.defvjp(_attach_marks_fwd, _attach_marks_bwd)


def _check_vmap(bits: Array) -> None:
    """Raise if this is a `vmap` over the Explicit mesh axis that shards the table's rows: JAX lets no member use that axis."""
    with take_current_trace() as trace:
        mapped = getattr(getattr(trace, "axis_data", None), "explicit_mesh_axis", None)
    spec = jax.typeof(bits).sharding.spec
    over, of_rows = ((x,) if isinstance(x, str) else tuple(x or ()) for x in (mapped, spec[0] if spec else None))
    if set(over) & set(of_rows):
        msg = (
            f"the rows of this table are sharded over the Explicit mesh axis {', '.join(of_rows)}, over which this vmap maps: "
            "look all ids up before the vmap (ids may have any shape), or shard the batch over another axis"
        )
        raise ValueError(msg)


def _fold_vmap(attach: Callable[..., Array], operands: tuple[Array, ...], values: Array, ids: Array) -> Array:
    """`attach(operands, values, ids)`; directly under `vmap` over ids alone, one call with the batch axis as a part of ids.

    Without this, the batched gradient would be `[batch, U, D]` before JAX adds it up. `custom_vmap` cannot be differentiated in reverse,
    so it may only be used where vmap is the innermost transformation, which removes it at once. Inside a jit, scan or checkpoint that is
    itself under vmap the result is the same and the memory is larger.
    """
    with take_current_trace() as trace:
        under_vmap = type(trace).__name__ == "BatchTrace"
    if not under_vmap:
        return attach(operands, values, ids)

    @custom_vmap
    def call(operands: tuple[Array, ...], values: Array, ids: Array) -> Array:
        return attach(operands, values, ids)

    @call.def_vmap
    def rule(size: int, batched: Any, operands: tuple[Array, ...], values: Array, ids: Array) -> tuple[Array, bool]:
        if any(batched[0]):
            axes = tuple(0 if b else None for b in batched[0])
            return jax.vmap(attach, in_axes=(axes, *(0 if b else None for b in batched[1:])))(operands, values, ids), True
        values, ids = (x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip((values, ids), batched[1:], strict=True))
        return _fold_vmap(attach, operands, values, ids), True

    return call(operands, values, ids)
