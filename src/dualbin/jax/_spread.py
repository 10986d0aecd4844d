"""Operations on sharded arrays: which device does which part.

XLA runs a native call as a whole on every device, with all of every operand. So each operation says by a :class:`Plan` what a device does
with its own part. Two ways lead there: with Explicit axes the types tell the shardings while tracing, and `shard_map` runs the plan; with
Auto axes only the compiler knows them, and `custom_partitioning` asks for the plan then. Inside a `shard_map` of the user there is nothing
to do: the arrays are the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

#: mesh axes over which one dimension is sharded, and those of all dimensions of an array
Axes = tuple[str, ...]
Spec = tuple[Axes, ...]


@dataclass(frozen=True)
class Plan:
    """Shardings of operands and results, and what a device does with its parts (it returns a list)."""

    operands: Sequence[Spec]
    results: Sequence[Spec]
    local: Callable[..., list[Array]]


def spread(whole: Callable[..., list[Array]], plan: Callable[[list[Spec]], Plan], rule: str, operands: Sequence[Array]) -> list[Array]:
    """`whole(*operands)`, by parts where the operands are sharded.

    Args:
        whole: the operation on one device.
        plan: from the shardings of the operands to what each device does.
        rule: how shardings propagate from operands to results, for :func:`custom_partitioning`.
        operands: the arrays.
    """
    mesh = explicit_mesh(operands)
    if mesh is not None:
        return _explicit(mesh, plan, operands)
    if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return whole(*operands)
    return _auto(whole, plan, rule)(*operands)


def explicit_mesh(operands: Sequence[Any]) -> Any:
    """The mesh whose Explicit axes shard one of the operands, or None."""
    for x in operands:
        sharding = jax.typeof(x).sharding
        if any(axes is not None for axes in sharding.spec) and AxisType.Explicit in sharding.mesh.axis_types:
            return sharding.mesh
    return None


def replicate(x: Array) -> Array:
    """`x` with all of it on every device, where its type tells that it is not so."""
    mesh = explicit_mesh([x])
    return x if mesh is None else jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def _explicit(mesh: Any, plan: Callable[[list[Spec]], Plan], operands: Sequence[Array]) -> list[Array]:
    steps = plan([_spec(jax.typeof(x).sharding, x.ndim) for x in operands])
    placed = [jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(operands, steps.operands, strict=True)]
    inputs, outputs = ([PartitionSpec(*spec) for spec in specs] for specs in (steps.operands, steps.results))
    return jax.shard_map(steps.local, mesh=mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False)(*placed)


def _auto(whole: Callable[..., list[Array]], plan: Callable[[list[Spec]], Plan], rule: str) -> Callable[..., list[Array]]:
    def partition(mesh: Any, operands: Any, _results: Any) -> Any:
        steps = plan([_spec(x.sharding, len(x.shape)) for x in operands])
        inputs, outputs = ([NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs] for specs in (steps.operands, steps.results))
        return mesh, steps.local, outputs, tuple(inputs)

    def positional(*operands: Array) -> list[Array]:
        return whole(*operands)

    call = custom_partitioning(positional)
    call.def_partition(partition, sharding_rule=rule)
    return call


def _spec(sharding: Any, ndim: int) -> Spec:
    entries = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    axes = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]
    return (*axes, *[()] * (ndim - len(axes)))


# ---- shards of the rows ------------------------------------------------------------------------------------------------------------------


def own_ids(ids: Array, rows: int, axes: Axes, other: int) -> Array:
    """Ids of the whole table as ids of this device's shard of `rows` rows, `other` for rows of other shards."""
    if not axes:
        return ids
    first = lax.axis_index(axes) * jnp.asarray(rows, ids.dtype)
    return jnp.where((ids >= first) & (ids - first < rows), ids - first, other)


def gather(x: Array, spec: Spec, axes: Axes) -> Array:
    """All parts of `x` over those of its own axes that are in `axes`."""
    for dimension, own in enumerate(spec):
        if common := tuple(axis for axis in own if axis in axes):
            x = lax.all_gather(x, common, axis=dimension, tiled=True)
    return x


def add_and_scatter(x: Array, spec: Spec, axes: Axes) -> Array:
    """The sum of `x` over `axes`, and of it the part that is this device's: the inverse of :func:`gather`."""
    taken = {axis for own in spec for axis in own}
    if rest := tuple(axis for axis in axes if axis not in taken):
        x = lax.psum(x, rest)
    for dimension, own in enumerate(spec):
        if common := tuple(axis for axis in own if axis in axes):
            x = lax.psum_scatter(x, common, scatter_dimension=dimension, tiled=True)
    return x


def add_stats(stats: Array, axes: Axes) -> Array:
    """The sum over `axes` of four uint64, each two uint32 words."""
    if not axes:
        return stats
    parts = lax.psum(jnp.stack([stats & 0xFFFF, stats >> 16]), axes)  # 16 bits at a time: no carry is lost
    halves = jnp.stack([parts[0, 0::2], parts[1, 0::2], parts[0, 1::2], parts[1, 1::2]])
    carry = jnp.zeros_like(halves[0])
    digits = []
    for half in halves:
        total = half + carry
        digits.append(total & 0xFFFF)
        carry = total >> 16
    low, high = digits[0] | digits[1] << 16, digits[2] | digits[3] << 16
    return jnp.stack([low, high], axis=1).reshape(8)


def own_context(context: Array, rows: int, axes: Axes) -> Array:
    """The step context of the whole table as that of this device's shard of `rows` rows: with the row at which it starts."""
    if not axes:
        return context
    index = lax.axis_index(axes).astype(jnp.uint32)
    low, middle, high = (index * np.uint32(word) for word in (rows & 0xFFFF, rows >> 16 & 0xFFFF, rows >> 32))  # fewer than 2**16 devices
    total = low + (middle << 16)
    first_row = jnp.stack([total, high + (middle >> 16) + (total < low)])
    return jnp.concatenate([context[:4], first_row, context[6:]])
