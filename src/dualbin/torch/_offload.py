"""Tables that accelerate has offloaded.

Its hook takes a module's parameters out of a map, by name, before each forward pass. The map is what `state_dict()` gave, in which a table
is two tensors. A hook of a module that has tables deeper inside (`preload_module_classes`) is met when it moves them to the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dualbin.torch._state_bits import plain
from dualbin.torch._table import BinaryTable


def give_tables(hook: Any, table: BinaryTable, name: str = "weight") -> None:
    """Let an offloading hook of accelerate, or one in a sequence of hooks, find `table` in its map.

    Args:
        hook: any object; only those that have what such a hook has are changed.
        table: the parameter as it is now, on the meta device if it is offloaded.
        name: that of the parameter in the module of the hook.
    """
    for part in getattr(hook, "hooks", (hook,)):
        tensors = getattr(part, "weights_map", None)
        if getattr(part, "offload", False) and isinstance(tensors, Mapping):
            if not isinstance(tensors, _WithTables):
                part.weights_map = tensors = _WithTables(tensors)
            tensors.tables.setdefault(name, table)


def give_tables_inside(table: BinaryTable) -> None:
    """The same for a hook that has just moved `table` to the meta device, with all that is in its module; nothing if none is at it."""
    if "accelerate.hooks" not in sys.modules:
        return
    frame = sys._getframe(1)
    while frame is not None:
        here = frame.f_locals
        if frame.f_code.co_name == "init_hook" and getattr(here.get("self"), "place_submodules", False):
            old = here["module"].get_parameter(here["name"])
            for name, parameter in here["module"].named_parameters(remove_duplicate=False):
                if parameter is old:  # under each of its names: accelerate moves it by one, and asks for all of them
                    give_tables(here["self"], table, name)
            return
        frame = frame.f_back  # type: ignore[assignment]


class _WithTables(Mapping[str, Tensor]):
    """A map of a module's tensors, with its `tables`, of which `tensors` has `NAME.bits` and `NAME.scale`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.tables: dict[str, BinaryTable] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tables:
            return self._tensors[name]
        try:
            return self._tensors[name]
        except KeyError:
            pass
        try:
            bits, scale = (plain(self._tensors[f"{name}.{array}"]) for array in ("bits", "scale"))
        except KeyError as error:
            msg = (
                f"the state_dict that accelerate offloads to must hold bits and scale of every table, got none for {error}: leave it out, "
            )
            msg += "or give state_dict=dualbin.torch.hf.offload_map(model)"
            raise KeyError(msg) from None
        old = self.tables[name]
        table = BinaryTable(bits.contiguous(), scale.contiguous(), old.shape[1], old.dtype, old.planes, old.first_row)
        table.frozen = None if old.frozen is None else old.frozen.to(bits.device)
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
