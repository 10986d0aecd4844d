"""The native library as JAX functions: one per XLA FFI target, plus the registration of the targets.

This is the only module that knows the targets. Every function checks nothing: shapes and dtypes are the callers' business. They work on
the arrays of one device and know no `vmap`: both are added by `_ops`. `_pure` has the same functions in jax.numpy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._backends import load_native
from dualbin._checks import BAG_MODES, packed_width
from dualbin.rules import Rule

#: names of JAX's backends by the platform names under which FFI targets are registered
_BACKEND_NAMES = {"cpu": "cpu", "CUDA": "gpu"}


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
            native.make_error_block(device.local_hardware_id)


def is_native() -> bool:
    """Whether the default platform has handlers.

    Raises:
        ImportError: the native library is missing or does not fit the running jaxlib.
    """
    return jax.default_backend() in {_BACKEND_NAMES[platform] for platform in register()}


def varying(x: Any) -> frozenset[str]:
    """Mesh axes over which a value varies inside `shard_map` (empty elsewhere)."""
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())


def _workspace(op: str, count: int, rows: int, dim: int) -> jax.ShapeDtypeStruct:
    """The workspace of an operation on `count` ids, as a result that nobody reads. CPU handlers bring their own."""
    size = 0
    if jax.default_backend() == "gpu":
        native: Any = load_native()[0]
        size = native.workspace_bytes(op, 0, 0, count, rows, dim)
    return jax.ShapeDtypeStruct((size,), jnp.uint8)


def _call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Array, aliases: dict[int, int] | None = None, **attrs: Any
) -> Any:
    _make_error_blocks()
    axes = frozenset[str]().union(*map(varying, operands))
    # a call does not hand the "varying" type of its operands on; a later psum would then count the gradient once per device
    outputs = jax.ffi.ffi_call(target, tuple(results), input_output_aliases=aliases)(*operands, **attrs)
    return [lax.pcast(x, tuple(missing), to="varying") if (missing := axes - varying(x)) else x for x in outputs]


# ---- the targets -------------------------------------------------------------------------------------------------------------------------


def lookup(bits: Array, scale: Array, ids: Array, *, dim: int, dtype: Any, zeros: bool = False) -> Array:
    """Rows `ids` of the table: `dtype` `ids.shape + (dim,)`.

    An id outside [0, V) gives zeros with `zeros`; else a runtime error on the CPU, and NaN and an entry in the error block on a GPU.
    """
    result = jax.ShapeDtypeStruct((*ids.shape, dim), dtype)
    return _call("dualbin_lookup", [result], bits, scale, ids, dim=np.int64(dim), bad_ids=np.int32(zeros))[0]


def lookup_bag(
    bits: Array, scale: Array, ids: Array, offsets: Array, weights: Array | None, dim: int, mode: str, dtype: Any, *, zeros: bool = False
) -> Array:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of the table, combined: `dtype` `[G, dim]`.

    Args:
        ids: `[N]`; those before the first and after the last offset are not read.
        offsets: `[G + 1]`, ascending within [0, N].
        weights: None, or with mode "sum" float32 `[N]`.
        mode: "sum", "mean" or "majority".
        zeros: ids outside [0, V) are padding; else an error on the CPU and NaN on a GPU.
    """
    attrs: dict[str, Any] = {"dim": np.int64(dim), "mode": np.int32(BAG_MODES.index(mode)), "bad_ids": np.int32(zeros)}
    result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, dim), dtype)
    weights = jnp.zeros((0,), jnp.float32) if weights is None else weights
    return _call("dualbin_lookup_bag", [result], bits, scale, ids, offsets, weights, **attrs)[0]


def segment_sum(slots: Array, dy: Array, segments: int) -> Array:
    """Sum of the rows of dy `[N, D]` by slot `[N]`: float32 `[segments, D]`. Slots outside [0, segments) are dropped."""
    result = jax.ShapeDtypeStruct((segments, dy.shape[-1]), jnp.float32)
    workspace = _workspace("segment_sum", slots.shape[0], segments, dy.shape[-1])
    return _call("dualbin_segment_sum", [result, workspace], slots, dy)[0]


def reduce_rows(ids: Array, dy: Array, rows: int, capacity: int) -> list[Array]:
    """Sorted distinct ids `[capacity]`, the sums of their rows `[capacity, D]` and their number `[1]`."""
    results = [
        jax.ShapeDtypeStruct((capacity,), ids.dtype),
        jax.ShapeDtypeStruct((capacity, dy.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        _workspace("reduce_rows", ids.shape[0], rows, dy.shape[-1]),
    ]
    return _call("dualbin_reduce_rows", results, ids, dy, rows=np.int64(rows))[:3]


def update(bits: Array, scale: Array, *rest: Array, dim: int, rule: Rule) -> list[Array]:
    """The fused update. `rest` is the five state arrays (size 0: absent), the step context, ids and dy.

    Returns:
        bits, scale, the state arrays and stats uint32 `[8]`; all but stats reuse the operands' memory.
    """
    table = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (bits, scale)]
    return _update("dualbin_update", table, {0: 0, 1: 1}, (bits, scale, *rest), dim, rule)


def masks(bits: Array, scale: Array, *rest: Array, dim: int, rule: Rule) -> list[Array]:
    """The same without its effect on the table: mask uint8 `[N, B]` and new scale float32 `[N, 1]` in place of bits and scale."""
    count = rest[-2].shape[0]
    table = [jax.ShapeDtypeStruct((count, packed_width(dim)), jnp.uint8), jax.ShapeDtypeStruct((count, 1), jnp.float32)]
    return _update("dualbin_masks", table, {}, (bits, scale, *rest), dim, rule)


def _update(
    target: str, table: list[jax.ShapeDtypeStruct], aliases: dict[int, int], operands: Sequence[Array], dim: int, rule: Rule
) -> list[Array]:
    state, ids = operands[2:7], operands[-2]
    results = [*table, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state), jax.ShapeDtypeStruct((8,), jnp.uint32)]
    results.append(_workspace("update", ids.shape[0], operands[0].shape[0], dim))
    aliases = aliases | {2 + i: 2 + i for i, x in enumerate(state) if x.size}
    return _call(target, results, *operands, aliases=aliases, **_rule_attrs(rule, dim))[:-1]


def _rule_attrs(rule: Rule, dim: int) -> dict[str, np.generic]:
    native = rule.native()
    return {
        "dim": np.int64(dim),
        "kind": np.int32(native["kind"]),
        "rule_bits": np.int32(native["bits"]),
        "eta": np.float32(native["eta"]),
        "dead_zone_q8": np.int32(native["dead_zone_q8"]),
        "anneal_q8": np.int32(native["anneal_q8"]),
        "center": np.int32(native["center"]),
        "gamma": np.float32(native["gamma"]),
        "tau": np.float32(native["tau"]),
    }


def xor_rows(bits: Array, ids: Array, mask: Array) -> Array:
    """`bits[ids[n]] ^= mask[n]`, in place where XLA may reuse bits. Ids are distinct; those outside [0, V) are skipped."""
    return _call("dualbin_xor_rows", [jax.ShapeDtypeStruct(bits.shape, bits.dtype)], bits, ids, mask, aliases={0: 0})[0]
