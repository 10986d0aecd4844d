"""One-bit embedding tables for PyTorch and JAX, trained in their packed form.

The frontends are `dualbin.torch` and `dualbin.jax`; this package imports neither framework.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from dualbin._backends import backends
from dualbin._ngrams import NGrams
from dualbin._packing import pack, row_scale, unpack
from dualbin._version import __version__

_MODULES = ("io", "reference", "rules")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"dualbin.{name}")
    msg = f"module 'dualbin' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = ["NGrams", "__version__", "backends", "io", "pack", "reference", "row_scale", "rules", "unpack"]
