"""`average`: the mean of two tables, for weights that follow those in training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._average_step import default_step, hash_rows
from dualbin._checks import check_float, check_same_planes
from dualbin.jax import _ops
from dualbin.jax._stack import over_members, stack_axes
from dualbin.jax._state import check_rate, check_seed, make_context
from dualbin.jax._table import BinaryTable, check_table, is_table, shard_axes, table_like


def average(a: Any, b: Any, weight: Any, *, step: Any = None, seed: int | Array = 0) -> Any:
    """`(1 - weight) * a + weight * b` for tables, in expectation, and for trees of parameters with tables in them.

    A packed weight cannot be between two levels. Where those of a and b differ, it goes the share `weight` of the way from one to the
    other, rounded up or down to a level at random such that the expected value is the average; a scale is the average of magnitudes. So an
    average of many small steps follows its tables, and a weight on which all agree stays. For an exponential average of parameters::

        ema = dbj.average(ema, params, 0.001, step=step)

    Args:
        a: a table, or a tree of parameters.
        b: the same, of the same shape and, for tables, the same number of planes.
        weight: of b, in [0, 1].
        step: at most 64 bits, an int or an integer array; chooses the random numbers, so averages that follow each other need different
            ones. None: from what both tables hold, for one more pass over them; so an average of the same tables is the same again. A
            shard inside `shard_map` needs a step.
        seed: at most 64 bits, likewise.

    Returns:
        A table like a, or a tree of the structure of a: other floating leaves are averaged in their dtype, leaves of other dtypes are those
        of b.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value, or a and b have different structures.
    """
    if not hasattr(weight, "dtype"):
        check_float("weight", weight, low=0.0, high=1.0)
    check_rate("weight", weight)
    check_seed(seed)
    if step is not None:
        check_seed(step, "step")
    if not is_table(a):
        return jax.tree.map(lambda x, y: _leaf(x, y, weight, step, seed), a, b, is_leaf=is_table)
    for name, table in (("a", a), ("b", b)):
        check_table(table, name, stack=True)
    check_same_planes("a and b", a.planes, b.planes)
    if a.shape != b.shape:
        msg = f"a and b must have the same shape, got {list(a.shape)} and {list(b.shape)}"
        raise ValueError(msg)
    axes = shard_axes(a.axis)
    if step is None and axes:
        msg = "step must be given for a shard of a table: its shards have to agree on the random numbers"
        raise ValueError(msg)

    def one(a: BinaryTable, b: BinaryTable) -> BinaryTable:
        context = make_context(seed, _contents(a, b) if step is None else step, weight, 0.0)
        bits, scale = _ops.average(a.bits, a.scale, b.bits, b.scale, context, dim=a.dim, axes=axes)
        return table_like(a, bits, scale)

    return over_members(one, len(stack_axes(a)))(a, b)


def _leaf(x: Any, y: Any, weight: Any, step: Any, seed: Any) -> Any:
    if is_table(x):
        return average(x, y, weight, step=step, seed=seed)
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape != y.shape or x.dtype != y.dtype:
        msg = f"leaves of a and b must have the same shape and dtype, got {x.dtype.name} {list(x.shape)} and {y.dtype.name} {list(y.shape)}"
        raise ValueError(msg)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return y
    share = jnp.asarray(weight, x.dtype)
    return (1 - share) * x + share * y


def _contents(a: BinaryTable, b: BinaryTable) -> Array:
    """uint32: the step where none is given, :func:`dualbin.reference.average_step`."""

    def number(table: BinaryTable) -> Array:
        rows, columns = (jnp.arange(size, dtype=jnp.uint32) for size in table.bits.shape)
        scale = lax.bitcast_convert_type(table.scale[:, 0], jnp.uint32)
        return jnp.asarray(hash_rows(table.bits.astype(jnp.uint32), scale, columns, rows, np.uint32))

    return jnp.asarray(default_step(number(a), number(b), np.uint32))
