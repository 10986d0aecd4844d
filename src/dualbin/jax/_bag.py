"""`lookup_bag`: rows combined group by group, without the rows themselves in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dualbin._checks import check_int, check_padding_idx
from dualbin._schema import BAG_MODES
from dualbin.jax import _ops
from dualbin.jax._ids import to_array, to_ids, to_index
from dualbin.jax._link import is_declared, is_marks, record, row_ids
from dualbin.jax._ops import replicate, sum_over_devices
from dualbin.jax._table import BinaryTable, all_rows, check_dtype, check_table, link_of, shard_axes


def lookup_bag(
    table: BinaryTable,
    ids: Any,
    segment_ids: Any,
    num_segments: int,
    mode: str = "sum",
    weights: Any = None,
    dtype: Any = jnp.float32,
    *,
    padding_idx: int | None = None,
) -> Array:
    """Rows of a table, combined by segment, as `jax.ops.segment_sum(table[ids], segment_ids, num_segments)` would.

    Padding rows (scale 0, and the row `padding_idx`) contribute nothing and are not counted. A segment without any other row is zeros.

    Args:
        table: the table, V rows of D weights; active or not, as for :func:`dualbin.jax.lookup`.
        ids: int32 or int64 `[N]`, values in [0, V).
        segment_ids: int32 or int64 `[N]`, in any order. Ids of segments outside [0, num_segments) are left out.
        num_segments: G, at least 1 (static).
        mode: "sum"; "mean", over the rows of the segment; or "majority", of a table of one plane: the sign of the sum of the +1/-1 alone, a
            tie counting as +1, whose gradient is that of "sum".
        weights: None, or with mode "sum" float factors of the rows, `[N]`; they get a gradient.
        dtype: float32, float16 or bfloat16, to which the float32 result is rounded.
        padding_idx: a row that is left out and gets no gradient, whatever its scale; negative counts from the end.

    Returns:
        `dtype` `[G, D]`. Bad ids are treated as in :func:`dualbin.jax.lookup`; where NaN is the answer, it is for the whole segment.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
        IndexError: an id outside [0, V), where ids are concrete and in host memory.
    """
    check_table(table)
    kind, segments = check_dtype(dtype), check_int("num_segments", check_int("num_segments", num_segments, low=1), high=2**31 - 2)
    rows, axes = all_rows(table), shard_axes(table.axis)
    array, owners = to_ids(ids, rows), to_index(segment_ids, "segment_ids")
    if array.ndim != 1 or owners.shape != array.shape:
        msg = f"ids and segment_ids must both have shape [N], got {list(array.shape)} and {list(owners.shape)}"
        raise ValueError(msg)
    weights = _check_weights(mode, weights, array)
    if mode == "majority" and table.planes > 1:
        msg = f"mode 'majority' is defined for tables of one plane, got a table of {table.planes} planes: use 'sum' or 'mean'"
        raise ValueError(msg)
    link = link_of(table)
    record(link, table.shape, array)
    padding = check_padding_idx(padding_idx, rows)
    static = (table.dim, mode, kind, rows, -1 if padding is None else padding, axes)
    # sorted by segment, a segment is a range
    owners = replicate(owners)
    order = jnp.argsort(owners, stable=True)
    array = replicate(array)[order]
    offsets = jnp.searchsorted(owners[order], jnp.arange(segments + 1, dtype=owners.dtype)).astype(jnp.int32)
    weights = None if weights is None else replicate(weights)[order]
    scale = lax.stop_gradient(table.scale)
    tap, declared, marks = None, None, link is not None and is_marks(link)
    if link is not None and (marks or is_declared(link)):
        tap, declared = link.tap, None if marks else row_ids(link)
    return _bag(static, marks, tap, declared, weights, table.bits, scale, array, offsets)


def _check_weights(mode: str, weights: Any, ids: Array) -> Array | None:
    if not isinstance(mode, str) or mode not in BAG_MODES:
        msg = f"mode must be one of {', '.join(map(repr, BAG_MODES))}, got {mode!r}"
        raise ValueError(msg)
    if weights is None:
        return None
    if mode != "sum":
        msg = f"weights must be None with mode {mode!r}: only mode 'sum' is weighted"
        raise ValueError(msg)
    weights = to_array("weights", weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating) or weights.shape != ids.shape:
        msg = f"weights must be floats of shape {list(ids.shape)}, one for every id, got {weights.dtype.name} {list(weights.shape)}"
        raise ValueError(msg)
    return weights.astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _bag(
    static: tuple[Any, ...],
    _marks: bool,
    _tap: Array | None,
    _row_ids: Array | None,
    weights: Array | None,
    bits: Array,
    scale: Array,
    ids: Array,
    offsets: Array,
) -> Array:
    dim, mode, dtype, _, padding_idx, axes = static
    return _ops.lookup_bag(bits, scale, ids, offsets, weights, dim=dim, mode=mode, dtype=dtype, padding_idx=padding_idx, axes=axes)


def _bag_fwd(static: tuple[Any, ...], marks: bool, tap: Any, row_ids: Any, weights: Any, *table: Array) -> tuple[Array, Any]:
    kept = None if tap is None else tap[:0]
    return _bag(static, marks, tap, row_ids, weights, *table), (kept, row_ids, weights, table)


def _bag_bwd(static: tuple[Any, ...], marks: bool, residuals: Any, dy: Array) -> tuple[Any, ...]:
    _, mode, _, rows, padding_idx, axes = static
    tap, row_ids, weights, (bits, scale, ids, offsets) = residuals
    slopes = None
    if weights is not None:
        slopes = _ops.bag_weight_gradient(bits, scale, ids, offsets, dy, padding_idx=padding_idx, axes=axes)
    positions = jnp.arange(ids.shape[0], dtype=offsets.dtype)
    read = (positions >= offsets[0]) & (positions < offsets[-1]) & (ids != padding_idx)
    used = jnp.where(read, ids, jnp.asarray(-1, ids.dtype))
    if marks:
        found = jnp.zeros((rows,), jnp.float32).at[jnp.where(used < 0, rows, used)].set(1.0, mode="drop")
        return sum_over_devices(found, tap), None, slopes, None, None, None, None
    if tap is None:
        return None, None, slopes, None, None, None, None
    counts = _ops.bag_counts(scale, ids, offsets, padding_idx, axes) if mode == "mean" else None
    gradient = _ops.bag_gradient(ids, offsets, dy, mode=mode, counts=counts, weights=weights, padding_idx=padding_idx)
    return sum_over_devices(_ops.row_sums(row_ids, used, gradient, rows), tap), None, slopes, None, None, None, None


_bag.defvjp(_bag_fwd, _bag_bwd)
