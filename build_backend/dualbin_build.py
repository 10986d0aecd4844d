"""scikit-build-core, which asks for jaxlib only where the XLA handlers are wanted.

`pip install . -C cmake.define.DUALBIN_XLA=OFF` builds without them, for PyTorch alone: then nothing of JAX is downloaded.
"""

from __future__ import annotations

from typing import Any

from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
)
from scikit_build_core.build import get_requires_for_build_editable as _for_editable
from scikit_build_core.build import get_requires_for_build_wheel as _for_wheel

#: The XLA FFI headers come from jaxlib. Headers newer than the jaxlib at run time make every call fail, older ones are fine: hence the
#: oldest jaxlib that is supported, not the newest.
HEADERS = "jaxlib==0.10.2"

_SETTING = "cmake.define.DUALBIN_XLA"
_OFF = {"OFF", "0", "FALSE", "NO", "N"}  # as CMake reads it


def wants_xla(config_settings: dict[str, Any] | None) -> bool:
    """Whether a build with these settings has the handlers: unless it is told not to."""
    value = (config_settings or {}).get(_SETTING, "ON")
    return str(value[-1] if isinstance(value, list) else value).upper() not in _OFF


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_for_wheel(config_settings), *([HEADERS] if wants_xla(config_settings) else [])]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_for_editable(config_settings), *([HEADERS] if wants_xla(config_settings) else [])]


__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]
