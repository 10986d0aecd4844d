"""Tables that accelerate has offloaded.

Its hook takes a module's parameters out of a map, by name, before each forward pass. The map is what `state_dict()` gave, in which a table
is two tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dualbin.torch._state_bits import plain
from dualbin.torch._table import BinaryTable


def give_tables(hook: Any, table: BinaryTable) -> None:
    """Let an offloading hook of accelerate, or one in a sequence of hooks, find `table` in its map.

    Args:
        hook: any object; only those that have what such a hook has are changed.
        table: the module's parameter as it is now, on the meta device if it is offloaded.
    """
    for part in getattr(hook, "hooks", (hook,)):
        tensors = getattr(part, "weights_map", None)
        if getattr(part, "offload", False) and isinstance(tensors, Mapping) and not isinstance(tensors, _WithTable):
            part.weights_map = _WithTable(tensors, table)


class _WithTable(Mapping[str, Tensor]):
    """A map of a module's tensors, with the table `weight` that `weight.bits` and `weight.scale` make."""

    def __init__(self, tensors: Mapping[str, Tensor], table: BinaryTable) -> None:
        self._tensors, self._table = tensors, table

    def __getitem__(self, name: str) -> Tensor:
        if name != "weight":
            return self._tensors[name]
        try:
            return self._tensors[name]
        except KeyError:
            pass
        try:
            bits, scale = (plain(self._tensors[f"weight.{array}"]) for array in ("bits", "scale"))
        except KeyError as error:
            msg = (
                f"the state_dict that accelerate offloads to must hold bits and scale of every table, got none for {error}: leave it out, "
            )
            msg += "or give state_dict=dualbin.torch.hf.offload_map(model)"
            raise KeyError(msg) from None
        old = self._table
        table = BinaryTable(bits.contiguous(), scale.contiguous(), old.shape[1], old.dtype, old.planes, old.first_row)
        table.frozen = None if old.frozen is None else old.frozen.to(bits.device)
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
