"""What all operations on tables share: the native call or its replacement, sharded operands, `vmap`.

XLA runs a native call as a whole on every device, with all of every operand. So each operation says by a :class:`Plan` what a device does
with its own part. Two ways lead there: with Explicit axes the types tell the shardings while tracing, and `shard_map` runs the plan; with
Auto axes only the compiler knows them, and `custom_partitioning` asks for the plan then. Inside a `shard_map` of the user there is nothing
to do: the arrays are the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualbin.jax import _ffi

#: mesh axes over which one dimension is sharded, and those of all dimensions of an array
Axes = tuple[str, ...]
Spec = tuple[Axes, ...]

#: jit that leaves no trace inside another one; outside of any it compiles an operation once for each shape and sharding
compiled = partial(partial, jax.jit, inline=True)


@dataclass(frozen=True)
class Plan:
    """Shardings of operands and results, and what a device does with its parts (it returns a list)."""

    operands: Sequence[Spec]
    results: Sequence[Spec]
    local: Callable[..., list[Array]]


class Operation:
    """One operation on tables with all that it needs under the transformations of JAX. Call it with its operands.

    A subclass is a frozen dataclass; its fields are static. All functions take the operands and return the list of results.
    """

    #: False where operands are whole on every device: then there is neither a sharding rule nor a plan
    partitioned: ClassVar[bool] = True

    def native(self, *operands: Any, **_: Any) -> list[Array]:
        """On one device, by the native library."""
        raise NotImplementedError

    def fallback(self, *operands: Any, **_: Any) -> list[Array]:
        """On one device, in jax.numpy."""
        raise NotImplementedError

    def sharding_rule(self, *operands: Any) -> str:
        """How shardings propagate from operands to results, for `custom_partitioning`."""
        raise NotImplementedError

    def plan(self, specs: list[Spec]) -> Plan:
        """From the shardings of the operands to what each device does."""
        raise NotImplementedError

    def changes(self) -> Mapping[int, int]:
        """Results, by number, that are an operand after a change: they stay where that is."""
        return {}

    def shard(self, *operands: Any, **_: Any) -> list[Array]:
        """What a device does inside a `shard_map`; the argument `axes` has the mesh axes that shard the table's rows."""
        raise NotImplementedError

    def on_device(self, *operands: Array) -> list[Array]:
        """On one device, by the native library where the program runs on a platform that it serves."""
        _ffi.register()
        _ffi.make_error_blocks()
        axes = frozenset[str]().union(*map(varying, operands))
        # the primitive does not hand the "varying" type of its operands on; a later psum would then count the gradient once per device
        results = _on_device.bind(*operands, operation=self)
        return [lax.pcast(x, tuple(missing), to="varying") if (missing := axes - varying(x)) else x for x in results]

    def batch(self, size: int, batched: Sequence[bool], operands: Sequence[Array], axes: Axes) -> tuple[list[Array], list[bool]]:
        """The rule for `vmap`: by default one member after the other; operands without a batch axis are passed as they are."""

        def one(index: Array) -> list[Array]:
            picked = [lax.dynamic_index_in_dim(x, index, keepdims=False) if b else x for x, b in zip(operands, batched, strict=True)]
            return self(*picked, axes=axes)

        results = lax.map(one, jnp.arange(size))
        return results, [True] * len(results)

    def __call__(self, *operands: Array, axes: Axes = ()) -> list[Array]:
        """The operation under every transformation.

        Args:
            operands: the arrays.
            axes: inside a `shard_map`, the mesh axes over which the table's rows are sharded there. Ids are those of the whole table.
        """
        return _call(*operands, operation=self, axes=axes)


@compiled(static_argnames=("operation", "axes"))
def _call(*operands: Array, operation: Operation, axes: Axes) -> list[Array]:
    @custom_vmap
    def call(*operands: Array) -> list[Array]:
        return operation.shard(*operands, axes=axes) if axes or not operation.partitioned else _by_parts(operation, operands)

    @call.def_vmap
    def rule(size: int, batched: Sequence[bool], *operands: Array) -> tuple[list[Array], list[bool]]:
        return operation.batch(size, batched, operands, axes)

    return call(*operands)


# ---- one device --------------------------------------------------------------------------------------------------------------------------


#: An operation on one device. A primitive, so that lowering chooses between native and fallback: only then is the platform known, which
#: with `jax.export` need not be that of this process, and only then is the fallback traced, which takes long.
_on_device = Primitive("dualbin")
_on_device.multiple_results = True


@_on_device.def_abstract_eval
def _shapes(*operands: Any, operation: Operation) -> list[Any]:
    results = jax.eval_shape(operation.native, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in results]


@_on_device.def_impl
def _compiled(*operands: Array, operation: Operation) -> list[Array]:
    return list(jax.jit(lambda *operands: _on_device.bind(*operands, operation=operation))(*operands))


def _lower(platform: str | None) -> Any:
    """The lowering rule for a platform of the native library, by its XLA name, or for all others."""

    def run(*operands: Array, operation: Operation) -> list[Array]:
        if platform is None or platform not in _ffi.register():
            return operation.fallback(*operands)
        with _ffi.lowering(platform):
            return operation.native(*operands)

    return mlir.lower_fun(run, multiple_results=True)


mlir.register_lowering(_on_device, _lower(None))
for _platform in _ffi.PLATFORMS:
    mlir.register_lowering(_on_device, _lower(_platform), platform=_platform.lower())


def native_call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Array, aliases: dict[int, int] | None = None, **attrs: Any
) -> list[Array]:
    """Call an XLA target of the native library. It checks nothing: shapes and dtypes are the callers' business."""
    return list(jax.ffi.ffi_call(target, tuple(results), input_output_aliases=aliases)(*operands, **attrs))


def varying(x: Any) -> frozenset[str]:
    """Mesh axes over which a value varies inside `shard_map` (empty elsewhere)."""
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())


# ---- partitioning ------------------------------------------------------------------------------------------------------------------------

_NO_MESH = jax.sharding.AbstractMesh((), ())


def _by_parts(operation: Operation, operands: Sequence[Array]) -> list[Array]:
    """The operation, by parts where the operands are sharded."""
    mesh = explicit_mesh(operands)
    if mesh is not None:
        return _explicit(mesh, operation, operands)
    if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return operation.shard(*operands, axes=())
    return _auto(operation, operands)


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


def _explicit(mesh: Any, operation: Operation, operands: Sequence[Array]) -> list[Array]:
    steps = operation.plan([_spec(jax.typeof(x).sharding, x.ndim) for x in operands])
    placed = [jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(operands, steps.operands, strict=True)]
    inputs, outputs = ([PartitionSpec(*spec) for spec in specs] for specs in (steps.operands, steps.results))
    results = list(jax.shard_map(steps.local, mesh=mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False)(*placed))
    for result, operand in operation.changes().items():
        results[result] = jax.sharding.reshard(results[result], jax.typeof(operands[operand]).sharding)
    return results


def _auto(operation: Operation, operands: Sequence[Array]) -> list[Array]:
    def partition(mesh: Any, operands: Any, _results: Any) -> Any:
        steps = operation.plan([_spec(x.sharding, len(x.shape)) for x in operands])
        inputs, outputs = ([NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs] for specs in (steps.operands, steps.results))

        def local(*parts: Array) -> list[Array]:
            # Explicit axes that the program has around this would put shardings into what one device does, where nobody takes them out
            with jax.sharding.use_abstract_mesh(_NO_MESH):
                return steps.local(*parts)

        return mesh, local, outputs, tuple(inputs)

    def positional(*operands: Array) -> list[Array]:
        return operation.shard(*operands, axes=())

    call = custom_partitioning(positional)
    call.def_partition(partition, sharding_rule=operation.sharding_rule(*operands))
    return call(*operands)


def _spec(sharding: Any, ndim: int) -> Spec:
    entries = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    axes = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]
    return (*axes, *[()] * (ndim - len(axes)))


# ---- shards of the rows ------------------------------------------------------------------------------------------------------------------


def own_ids(ids: Array, rows: int, axes: Axes, other: int) -> Array:
    """Ids of the whole table as ids of this device's shard of `rows` rows, `other` for rows of other shards."""
    if not axes:
        return ids
    first = lax.axis_index(axes).astype(ids.dtype) * jnp.asarray(rows, ids.dtype)
    return jnp.where((ids >= first) & (ids - first < rows), ids - first, jnp.asarray(other, ids.dtype))


def sum_over_devices(sums: Array, like: Array) -> Array:
    """Inside `shard_map`, add the sums of the devices that share `like`."""
    shared = tuple(varying(sums) - varying(like))
    return lax.psum(sums, shared) if shared else sums
