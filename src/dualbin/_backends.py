"""What runs where: the native module, the frontends that are loaded, and every fallback in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from dualbin import _schema, rules
from dualbin._version import __version__

_FRONTENDS = ("torch", "jax")

NO_HANDLERS = (
    "dualbin was built without XLA handlers (DUALBIN_XLA=OFF, or AUTO without jaxlib), so dualbin.jax cannot run: build it again, from its "
    "sources with pip install '.[jax]', or install a wheel, which has them"
)

_frontends: dict[str, Callable[[], dict[str, Any]]] = {}


def register_frontend(name: str, info: Callable[[], dict[str, Any]]) -> None:
    """Let a frontend report itself in :func:`backends`; it does so when it is imported.

    Args:
        name: "torch" or "jax".
        info: returns the frontend's entry. Its key "fallbacks", a list of str, is added to the list of all fallbacks.
    """
    if name not in _FRONTENDS:
        msg = f"name must be one of {_FRONTENDS}, got {name!r}"
        raise ValueError(msg)
    _frontends[name] = info


@cache
def load_native() -> tuple[ModuleType | None, str]:
    """The module `dualbin._native`, or None and the reason why it cannot be loaded.

    Raises:
        ValueError: if DUALBIN_SIMD asks for an instruction set that there is not.
    """
    try:
        from dualbin import _native  # noqa: PLC0415  (it may be absent: reported, not raised)
    except ImportError as error:
        if str(error).startswith("DUALBIN_SIMD"):  # to go on without the library is not what was asked for
            raise ValueError(str(error)) from error
        return None, str(error)
    native: Any = _native
    if not hasattr(native, "schema") or native.schema() != _schema.native_form() | {"rule_numbers": tuple(rules.NUMBERS)}:
        return None, "it was built from other sources than these Python files: build dualbin again"
    return native, ""


def cpu_threads() -> int:
    """Threads for a call that has no framework to ask: the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def backends() -> dict[str, Any]:
    """What this installation is made of.

    Returns:
        A dict: "version"; "native", the build options of the native library, or None; "simd", the instruction set in use on the CPU
        (the best of those that the processor has, or what the environment variable DUALBIN_SIMD says when the library is loaded);
        "cuda": {"built", "architectures", "devices"}; "frontends": name -> the frontend's own entry (for JAX the handlers by platform),
        "not imported", or why it cannot be; "fallbacks": one sentence for each slower or different path in use (empty: none).
    """
    native, reason = load_native()
    build = native.build_info() if native else {}
    fallbacks = [] if native else [f"dualbin._native cannot be loaded ({reason}): pack and unpack run in NumPy, the frontends need it"]
    frontends: dict[str, Any] = dict.fromkeys(_FRONTENDS, "not imported")
    if native and build["xla_ffi"] is None:
        frontends["jax"] = NO_HANDLERS
    for name, info in _frontends.items():
        entry = dict(info())
        fallbacks += [f"{name}: {text}" for text in entry.pop("fallbacks", [])]
        frontends[name] = entry
    return {
        "version": __version__,
        "native": build if native else None,
        "simd": native.simd() if native else None,
        "cuda": {
            "built": bool(build.get("cuda")),
            "architectures": build.get("cuda_architectures", ""),
            "devices": native.cuda_device_count() if native else 0,
        },
        "frontends": frontends,
        "fallbacks": fallbacks,
    }
