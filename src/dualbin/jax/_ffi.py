"""The native library as JAX functions: one per XLA FFI target, plus the registration of the targets.

This is the only module that knows the targets. Every function checks nothing: shapes and dtypes are the callers' business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap, sequential_vmap

from dualbin._backends import load_native
from dualbin._checks import BAG_MODES, packed_width
from dualbin.rules import Rule

#: names of JAX's backends by the platform names under which FFI targets are registered
_BACKEND_NAMES = {"cpu": "cpu", "CUDA": "gpu"}

#: of a workspace, in bytes
_ALIGNMENT = 256

State = Mapping[str, Array | None]
_STATE_TYPES = {"counter": np.uint8, "ema": np.float32, "count": np.int32, "scale_m": np.float32, "scale_v": np.float32}


# ---- registration ------------------------------------------------------------------------------------------------------------------------


def check_versions(native: Any, header: str) -> None:
    """Raise ImportError if the library was built with newer FFI headers than the running jaxlib understands.

    Such a handler would make every call fail, jax's own included. It must be found before anything is registered.

    Args:
        native: the module `dualbin._native`.
        header: the text of the running jaxlib's `xla/ffi/api/c_api.h`.
    """
    built = native.xla_ffi_api_version
    if callable(built):
        built = built()
    if built is None:
        msg = "dualbin was built without XLA FFI handlers; install jaxlib before building dualbin, then build it again"
        raise ImportError(msg)
    numbers = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    if None in numbers:
        msg = f"dualbin cannot read the XLA FFI version of jaxlib {_jaxlib_version()}; install another jaxlib"
        raise ImportError(msg)
    running = tuple(int(number[1]) for number in numbers if number is not None)
    if tuple(built) > running:
        msg = (
            f"dualbin was built for XLA FFI {built[0]}.{built[1]}, but jaxlib {_jaxlib_version()} speaks {running[0]}.{running[1]}: "
            "install a newer jaxlib, or build dualbin with the jaxlib that is installed"
        )
        raise ImportError(msg)


def _jaxlib_version() -> str:
    import jaxlib  # noqa: PLC0415  (only for error messages)

    return str(jaxlib.__version__)


@cache
def register() -> tuple[str, ...]:
    """Register the targets with XLA once.

    Returns:
        The platforms that have handlers: "cpu" and, in a build with CUDA, "CUDA".

    Raises:
        ImportError: the native library is missing or does not fit the running jaxlib.
    """
    native, reason = load_native()
    if native is None:
        msg = f"dualbin.jax needs the native library dualbin._native, which cannot be loaded: {reason}"
        raise ImportError(msg)
    check_versions(native, Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text())
    platforms = native.registrations()
    for platform, targets in platforms.items():
        for name, capsule in targets.items():
            jax.ffi.register_ffi_target(name, capsule, platform=platform)
    return tuple(platforms)


@cache
def _make_error_blocks() -> None:
    """Allocate the blocks in which lookups on GPUs count bad ids: a call that XLA is recording must not."""
    native, _ = load_native()
    assert native is not None  # register() saw to it
    for device in jax.local_devices():
        if device.platform == "gpu":
            native.error_block(device.local_hardware_id)


def _require_handlers() -> None:
    served = {_BACKEND_NAMES[platform] for platform in register()}
    platform = jax.default_backend()
    if platform not in served:
        msg = f"dualbin has no native handlers for the platform {platform!r}, only for {sorted(served)}; set jax_platforms to one of these"
        raise NotImplementedError(msg)
    _make_error_blocks()


def varying(x: Any) -> frozenset[str]:
    """Mesh axes over which a value varies inside `shard_map` (empty elsewhere)."""
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())


def _workspace(op: str, count: int, rows: int, dim: int) -> jax.ShapeDtypeStruct:
    """The workspace of an operation on `count` ids, as a result that nobody reads. CPU handlers bring their own."""
    size = 0
    if jax.default_backend() == "gpu":
        size = load_native()[0].workspace_bytes(op, 0, 0, count, rows, dim) + _ALIGNMENT
    return jax.ShapeDtypeStruct((size,), jnp.uint8)


def _call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Array, aliases: dict[int, int] | None = None, **attrs: Any
) -> Any:
    _require_handlers()
    axes = frozenset[str]().union(*map(varying, operands))
    # a call does not hand the "varying" type of its operands on; a later psum would then count the gradient once per device
    outputs = jax.ffi.ffi_call(target, tuple(results), input_output_aliases=aliases)(*operands, **attrs)
    return [lax.pcast(x, tuple(missing), to="varying") if (missing := axes - varying(x)) else x for x in outputs]


# ---- lookup ------------------------------------------------------------------------------------------------------------------------------


def lookup(bits: Array, scale: Array, ids: Array, dim: int, dtype: Any) -> Array:
    """Rows `ids` of the table: `dtype` `ids.shape + (dim,)`. On the CPU an id outside [0, V) is a runtime error."""

    @custom_vmap
    def call(bits: Array, scale: Array, ids: Array) -> Array:
        result = jax.ShapeDtypeStruct((*ids.shape, dim), dtype)
        return _call("dualbin_lookup", [result], bits, scale, ids, dim=np.int64(dim), bad_ids=np.int32(0))[0]

    @call.def_vmap
    def rule(axis_size: int, batched: list[bool], bits: Array, scale: Array, ids: Array) -> tuple[Array, bool]:
        if not (batched[0] or batched[1]):
            return lookup(bits, scale, ids, dim, dtype), batched[2]
        operands = (bits, scale, ids)
        return _map_batched(lambda b, s, i: lookup(b, s, i, dim, dtype), batched, operands, axis_size), True

    return call(bits, scale, ids)


def _map_batched(function: Callable[..., Array], batched: Sequence[bool], operands: Sequence[Array], size: int) -> Array:
    """`function` over the batch one after the other; operands without a batch axis are passed as they are."""

    def one(index: Array) -> Array:
        picked = [lax.dynamic_index_in_dim(x, index, keepdims=False) if b else x for x, b in zip(operands, batched, strict=True)]
        return function(*picked)

    return lax.map(one, jnp.arange(size))


def lookup_bag(
    bits: Array, scale: Array, ids: Array, offsets: Array, weights: Array | None, dim: int, mode: str, dtype: Any, *, bad_ids: int = 0
) -> Array:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of the table, combined: `dtype` `[G, dim]`.

    Args:
        ids: `[N]`; those before the first and after the last offset are not read.
        offsets: `[G + 1]`, ascending within [0, N].
        weights: None, or with mode "sum" float32 `[N]`.
        mode: "sum", "mean" or "majority".
        bad_ids: ids outside [0, V) are 0: an error on the CPU and NaN on a GPU; 1: padding.
    """
    attrs = {"dim": np.int64(dim), "mode": np.int32(BAG_MODES.index(mode)), "bad_ids": np.int32(bad_ids)}

    @sequential_vmap
    def call(bits: Array, scale: Array, ids: Array, offsets: Array, weights: Array) -> Array:
        result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, dim), dtype)
        return _call("dualbin_lookup_bag", [result], bits, scale, ids, offsets, weights, **attrs)[0]

    return call(bits, scale, ids, offsets, jnp.zeros((0,), jnp.float32) if weights is None else weights)


# ---- row sums ----------------------------------------------------------------------------------------------------------------------------


def segment_sum(slots: Array, dy: Array, segments: int) -> Array:
    """Sum of the rows of dy `[N, D]` by slot `[N]`: float32 `[segments, D]`. Slots outside [0, segments) are dropped."""

    @custom_vmap
    def call(slots: Array, dy: Array) -> Array:
        result = jax.ShapeDtypeStruct((segments, dy.shape[-1]), jnp.float32)
        workspace = _workspace("segment_sum", slots.shape[0], segments, dy.shape[-1])
        return _call("dualbin_segment_sum", [result, workspace], slots, dy)[0]

    @call.def_vmap
    def rule(axis_size: int, batched: list[bool], slots: Array, dy: Array) -> tuple[Array, bool]:
        slots = slots if batched[0] else jnp.broadcast_to(slots, (axis_size, *slots.shape))
        dy = dy if batched[1] else jnp.broadcast_to(dy, (axis_size, *dy.shape))
        # one call for the whole batch: each member gets its own range of slots
        first = jnp.arange(axis_size, dtype=slots.dtype)[:, None] * segments
        inside = (slots >= 0) & (slots < segments)
        shifted = jnp.where(inside, slots + first, axis_size * segments)
        total = segment_sum(shifted.reshape(-1), dy.reshape(-1, dy.shape[-1]), axis_size * segments)
        return total.reshape(axis_size, segments, dy.shape[-1]), True

    return call(slots, dy)


def reduce_rows(ids: Array, dy: Array, rows: int, capacity: int) -> tuple[Array, Array, Array]:
    """Sorted distinct ids and the sums of their rows.

    Args:
        ids: `[N]`; ids outside [0, rows) are dropped.
        dy: `[N, D]`.
        rows: V.
        capacity: C, slots of the result. Slots past the count hold id V and zeros.

    Returns:
        ids `[C]`, float32 `[C, D]`, and the number of distinct rows as int32 `[1]`, also where it exceeds C.
    """

    @sequential_vmap
    def call(ids: Array, dy: Array) -> list[Array]:
        results = [
            jax.ShapeDtypeStruct((capacity,), ids.dtype),
            jax.ShapeDtypeStruct((capacity, dy.shape[-1]), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            _workspace("reduce_rows", ids.shape[0], rows, dy.shape[-1]),
        ]
        return _call("dualbin_reduce_rows", results, ids, dy, rows=np.int64(rows))[:3]

    out_ids, out_rows, count = call(ids, dy)
    return out_ids, out_rows, count


# ---- update ------------------------------------------------------------------------------------------------------------------------------


def update(bits: Array, scale: Array, state: State, clock: Array, ids: Array, dy: Array, *, dim: int, rule: Rule) -> tuple[Any, ...]:
    """The fused update.

    Returns:
        bits, scale, the state arrays by name (None where absent) and stats uint32 `[8]`; all but stats reuse the operands' memory.
    """
    table = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (bits, scale)]
    return _update("dualbin_update", table, {0: 0, 1: 1}, bits, scale, state, clock, ids, dy, dim, rule)


def masks(bits: Array, scale: Array, state: State, clock: Array, ids: Array, dy: Array, *, dim: int, rule: Rule) -> tuple[Any, ...]:
    """The update without its effect on the table.

    Returns:
        mask uint8 `[N, B]` (zero except at a row's first occurrence), new scale float32 `[N, 1]`, the state arrays by name (None where
        absent; they reuse the operands' memory) and stats uint32 `[8]`.
    """
    count = ids.shape[0]
    table = [jax.ShapeDtypeStruct((count, packed_width(dim)), jnp.uint8), jax.ShapeDtypeStruct((count, 1), jnp.float32)]
    return _update("dualbin_masks", table, {}, bits, scale, state, clock, ids, dy, dim, rule)


def _update(
    target: str,
    table: list[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    bits: Array,
    scale: Array,
    state: State,
    clock: Array,
    ids: Array,
    dy: Array,
    dim: int,
    rule: Rule,
) -> tuple[Any, ...]:
    arrays = [jnp.zeros((0,), kind) if (x := state[name]) is None else x for name, kind in _STATE_TYPES.items()]
    results = [*table, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays), jax.ShapeDtypeStruct((8,), jnp.uint32)]
    results.append(_workspace("update", ids.shape[0], bits.shape[0], dim))
    aliases = aliases | {2 + i: 2 + i for i, x in enumerate(arrays) if x.size}
    attrs = _rule_attrs(rule, dim)
    call = sequential_vmap(partial(_call, target, results, aliases=aliases, **attrs))
    first, second, *rest, stats, _ = call(bits, scale, *arrays, clock, ids, dy)
    new_state = {name: None if state[name] is None else x for name, x in zip(_STATE_TYPES, rest, strict=True)}
    return first, second, new_state, stats


def _rule_attrs(rule: Rule, dim: int) -> dict[str, np.generic]:
    native = rule.native()
    return {
        "dim": np.int64(dim),
        "kind": np.int32(native["kind"]),
        "rule_bits": np.int32(native["bits"]),
        "eta": np.float32(native["eta"]),
        "dead_zone_q8": np.int32(native["dead_zone_q8"]),
        "gamma": np.float32(native["gamma"]),
        "tau": np.float32(native["tau"]),
    }


# ---- xor ---------------------------------------------------------------------------------------------------------------------------------


def xor_rows(bits: Array, ids: Array, mask: Array) -> Array:
    """`bits[ids[n]] ^= mask[n]`, in place where XLA may reuse bits. Ids are distinct; those outside [0, V) are skipped."""

    @sequential_vmap
    def call(bits: Array, ids: Array, mask: Array) -> Array:
        return _call("dualbin_xor_rows", [jax.ShapeDtypeStruct(bits.shape, bits.dtype)], bits, ids, mask, aliases={0: 0})[0]

    return call(bits, ids, mask)
