"""Tables in `flax.serialization`. flax is not imported here: a table is registered when the program imports it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from dualbin.jax._table import BinaryTable, table_like

_MODULE = "flax.serialization"
_KEYS = ("bits", "scale", "dim")


def register_serialization() -> None:
    """Let `flax.serialization` know tables, now or once it is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Waits for the first import of `flax.serialization`."""

    def find_spec(self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            loader.exec_module = exec_module
        return spec


def _register(serialization: Any) -> None:
    if not serialization.is_serializable(BinaryTable):  # it is after importlib.reload
        serialization.register_serialization_state(BinaryTable, _to_state_dict, _from_state_dict)


def _to_state_dict(table: BinaryTable) -> dict[str, Any]:
    """`bits`, `scale`, and `dim` and `planes` as int32 arrays, so that every leaf is one."""
    return {"bits": table.bits, "scale": table.scale, "dim": np.int32(table.dim), "planes": np.int32(table.planes)}


def _from_state_dict(target: BinaryTable, state: Any) -> BinaryTable:
    """A table like `target`, whose arrays give shapes and dtypes only.

    Raises:
        ValueError: the state is no table or one of another size.
    """
    if not isinstance(state, Mapping) or set(state) not in ({*_KEYS}, {*_KEYS, "planes"}):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        msg = f"the state of a dualbin.jax.BinaryTable must have bits, scale, dim and planes, got {got}"
        raise ValueError(msg)
    for name, value in (("dim", state["dim"]), ("planes", state.get("planes", 1))):  # without planes it is of a time when all had one
        if int(value) != getattr(target, name):
            msg = f"{name} must be {getattr(target, name)}, that of the target, got {int(value)}"
            raise ValueError(msg)
    arrays = {}
    for name in ("bits", "scale"):
        value, like = state[name], getattr(target, name)
        given, wanted = (f"{np.dtype(x.dtype).name} {list(x.shape)}" for x in (value, like))
        if given != wanted:
            msg = f"{name} must be {wanted}, as in the target, got {given}"
            raise ValueError(msg)
        arrays[name] = jnp.array(value)  # a copy: what flax reads is a view of the bytes it was given
    return table_like(target, arrays["bits"], arrays["scale"])
