"""What updates do to rows, for platforms without native handlers: the functions of the reference, with jax.numpy.

They need 64-bit types, which are switched on for them alone. What is here is around them: which rows there are, and what of a state lies
where. The bits are those of the native library except where XLA adds the occurrences of a row in another order, contracts multiply-adds
(the moving average of `Bop`, Adam of the scale), or flushes subnormal moments to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin import _reference_rules
from dualbin._record import join_record, split_record
from dualbin._reference_hash import column_bits, row_keys
from dualbin._reference_planes import pack_bits
from dualbin._schema import packed_width
from dualbin.jax._ops.sums import add_by_slot
from dualbin.rules import Rule


def wide(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return call


@wide
def update_rows(
    bits: Array, scale: Array, state: Mapping[str, Array], context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule
) -> tuple[Array, Array, dict[str, Array], Array]:
    """Mask uint8 `[N, planes * B]` and new scale float32 `[N, 1]`, zero except at a row's first occurrence; the new state and the stats.

    `state` has the arrays as they lie in memory; the rule is resolved for the planes of the table.
    """
    rows = bits.shape[0]
    first = first_occurrence(ids, rows)
    known = jnp.where(first, ids, 0)
    g = _sums_at_first(ids, dy, rows)
    old, old_scale = bits[known], scale[known, 0]
    finite = jnp.isfinite(g).all(1) & jnp.isfinite(old_scale)
    candidate = first & (old_scale != 0)
    keep, skipped = candidate & finite, candidate & ~finite
    lr, scale_lr = (lax.bitcast_convert_type(context[k], jnp.float32) for k in (6, 7))
    uniform = column_bits(context_keys(context, known), dim, jnp)
    per_row = split_record({name: array[known] for name, array in state.items()}, read_as)
    step = _reference_rules.step_rows(rule, old, old_scale, per_row, jnp.where(keep[:, None], g, 0), lr, scale_lr, uniform, jnp)

    places = jnp.where(keep, ids, rows)
    changed = join_record(step.state, read_as, stack_columns) if "record" in state else step.state
    new_state = {name: array.at[places].set(changed[name], mode="drop") for name, array in state.items()}
    flips = step.flips & keep[:, None]
    served = jnp.where(keep[:, None], old[:, packed_width(dim) :] ^ step.served, np.uint8(0))
    mask = jnp.concatenate([pack_bits(flips, jnp), served], axis=1)
    new_scale = jnp.where(first, jnp.where(keep, step.scale, old_scale), 0).astype(jnp.float32)[:, None]
    stats = _stats(flips.sum(), keep.sum(), skipped.sum(), (step.clipped & keep[:, None]).sum())
    return mask, new_scale, new_state, stats


def context_keys(context: Array, ids: Array, *more: int) -> tuple[Array, Array]:
    """Two keys for every row of a shard, from the step context; the row is that of the whole table."""
    start = context[4].astype(jnp.uint64) | context[5].astype(jnp.uint64) << 32
    return row_keys(list(context[:4]), ids.astype(jnp.uint64) + start, *more, xp=jnp)


def read_as(array: Array, dtype: str) -> Array:
    """The bits of an array as another type of the same size, for `dualbin._record`."""
    return lax.bitcast_convert_type(array, jnp.dtype(dtype))


def stack_columns(columns: list[Array]) -> Array:
    """Arrays `[V]` as the columns of one, for `dualbin._record`."""
    return jnp.stack(columns, axis=-1)


def first_occurrence(ids: Array, rows: int) -> Array:
    """bool `[N]`: the id is in the table, and none before it is the same."""
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    new = jnp.concatenate([jnp.ones((min(1, ids.shape[0]),), bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(ids.shape, bool).at[order].set(new) & (ids >= 0) & (ids < rows)


def _sums_at_first(ids: Array, dy: Array, rows: int) -> Array:
    """float32 `[N, D]`: the sum of a row where its id occurs first."""
    order = jnp.argsort(ids, stable=True)
    ordered = ids[order]
    start = jnp.searchsorted(ordered, ids)
    return add_by_slot(jnp.where((ids >= 0) & (ids < rows), order[start], ids.shape[0]), dy, ids.shape[0])


def _stats(*counts: Array) -> Array:
    wide = jnp.stack([x.astype(jnp.uint64) for x in counts])
    return jnp.stack([wide.astype(jnp.uint32), (wide >> 32).astype(jnp.uint32)], axis=1).reshape(8)
