"""Tables as two plain buffers, for code that loads checkpoints tensor by tensor and looks for each by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dualbin.torch._table import BinaryTable
from dualbin.torch._table_module import TableModule


class PlainTable(nn.Module):
    """What stands for `module.weight` while a module is unfolded: buffers `bits` and `scale`, which have the names of its state_dict."""

    bits: Tensor
    scale: Tensor

    def __init__(self, table: BinaryTable) -> None:
        super().__init__()
        self.table = [table]  # in a list, so that it is no parameter
        self.register_buffer("bits", table.bits)
        self.register_buffer("scale", table.scale)


def unfold(model: nn.Module) -> None:
    """Make the table of every module in `model` a module of two buffers."""
    plain: dict[int, PlainTable] = {}
    for module in model.modules():
        table = module._parameters.get("weight") if isinstance(module, TableModule) else None
        if isinstance(table, BinaryTable):
            del module._parameters["weight"]
            module.add_module("weight", plain.setdefault(id(table), PlainTable(table)))


def fold(model: nn.Module, is_loaded: Callable[[Tensor], bool]) -> list[str]:
    """The reverse of :func:`unfold`, with the tensors that are there now.

    Returns:
        The names of the tables of which a tensor is not loaded, as `is_loaded` says; they are as before.

    Raises:
        TypeError, ValueError: tensors do not fit their module. All modules are folded, those with their old table.
    """
    folded: dict[PlainTable, Any] = {}
    not_loaded, errors = [], list[Exception]()
    for name, module in model.named_modules():
        plain = module._modules.get("weight") if isinstance(module, TableModule) else None
        if not isinstance(plain, PlainTable):
            continue
        if plain not in folded:
            folded[plain] = plain.table[0]
            if is_loaded(plain.bits) and is_loaded(plain.scale):
                try:
                    folded[plain] = _made(plain)
                except (TypeError, ValueError) as error:
                    errors.append(type(error)(f"{name}.weight: {error}"))
            else:
                not_loaded.append(f"{name}.weight")
        del module._modules["weight"]
        module.weight = folded[plain]
    if errors:
        raise errors[0]
    return not_loaded


def _made(plain: PlainTable) -> Any:
    old = plain.table[0]
    if plain.bits is old.bits and plain.scale is old.scale:
        return old
    table = BinaryTable(plain.bits.contiguous(), plain.scale.contiguous(), old.shape[1], old.dtype, old.planes, old.first_row)
    if table.shape != old.shape:
        msg = f"bits must have the {old.shape[0]} rows of the module, got {table.shape[0]}"
        raise ValueError(msg)
    table.frozen = None if old.frozen is None else old.frozen.to(table.device)
    return nn.Parameter(table, requires_grad=old.requires_grad)
