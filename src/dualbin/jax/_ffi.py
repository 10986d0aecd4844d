"""The native library in JAX: whether it fits the running jaxlib, and the registration of its XLA FFI targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import jax

from dualbin._backends import NO_HANDLERS, load_native

#: names of JAX's backends by the platform names under which FFI targets are registered
PLATFORMS = {"cpu": "cpu", "CUDA": "gpu"}


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
        raise ImportError(NO_HANDLERS)
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


def check_has_handlers() -> None:
    """Raise ImportError where the native library is there and has none: that shows when the frontend is imported, not in its first call."""
    native, _ = load_native()
    if native is not None and native.build_info()["xla_ffi"] is None:
        raise ImportError(NO_HANDLERS)


@cache
def register() -> tuple[str, ...]:
    """Register the targets with XLA once.

    Returns:
        The platforms that have handlers: "cpu" and, in a build with CUDA, "CUDA".

    Raises:
        ImportError: the native library is missing or does not fit the running jaxlib.
    """
    native = library()
    check_versions(native, Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text())
    platforms = native.registrations()
    for platform, targets in platforms.items():
        for name, capsule in targets.items():
            jax.ffi.register_ffi_target(name, capsule, platform=platform)
    return tuple(platforms)


def library() -> Any:
    """The module `dualbin._native`.

    Raises:
        ImportError: it is missing.
    """
    native, reason = load_native()
    if native is None:
        msg = f"dualbin.jax needs the native library dualbin._native, which cannot be loaded: {reason}"
        raise ImportError(msg)
    return native


@cache
def make_error_blocks() -> None:
    """Allocate the blocks in which lookups on GPUs count bad ids: a call that XLA is recording must not."""
    for device in jax.local_devices():
        if device.platform == "gpu":
            library().make_error_block(device.local_hardware_id)


def is_native() -> bool:
    """Whether the default platform has handlers.

    Raises:
        ImportError: the native library is missing or does not fit the running jaxlib.
    """
    return jax.default_backend() in {PLATFORMS[platform] for platform in register()}


_lowering: ContextVar[str | None] = ContextVar("_lowering", default=None)


@contextmanager
def lowering(platform: str) -> Iterator[None]:
    """While calls are lowered for a platform."""
    token = _lowering.set(platform)
    try:
        yield
    finally:
        _lowering.reset(token)


def lowers_for(platform: str) -> bool:
    return _lowering.get() == platform
