"""More rows for a table that has been trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualbin._checks import INDEPENDENT, check_int, check_rows
from dualbin._schema import STATE_ARRAYS, packed_width
from dualbin.torch import _native_call
from dualbin.torch._bag import BinaryEmbeddingBag
from dualbin.torch._module import BinaryEmbedding
from dualbin.torch._optim import XOR
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_checks import clear_padding_bits
from dualbin.torch._table_module import fill_magnitudes, fill_random


@torch.no_grad()
def grow(
    module: BinaryEmbedding | BinaryEmbeddingBag,
    num_embeddings: int,
    *,
    optimizer: XOR | None = None,
    values: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Give a module more rows, in place, while everything that was learned stays.

    The rows that are there keep their bits, scales, gradients and, in the optimizer, counters, counts, moments and their part of an open
    window of `every=K`. New rows are random, with the mean magnitude of the other rows' scales (padding rows aside), and have no state yet.
    The parameter stays the same object, so optimizers and modules that share it see the new rows. A captured CUDA graph must be captured
    again, and a DDP wrapper need not be made again.

    With transformers grow the table first, `dbt.grow(model.get_input_embeddings(), n, optimizer=xor)`, and call
    `model.resize_token_embeddings(n)` for the rest of the model.

    Args:
        module: a :class:`BinaryEmbedding` or :class:`BinaryEmbeddingBag`.
        num_embeddings: the number of rows from now on, more than there are.
        optimizer: the :class:`XOR` that trains the table, if it has taken a step; its state grows with the table.
        values: float32, float16 or bfloat16 `[num_embeddings - V, D]`, what to pack into the new rows; None for random ones.
        generator: source of the random bits, on the table's device; None takes torch's own.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. Nothing has changed then.
    """
    if not isinstance(module, (BinaryEmbedding, BinaryEmbeddingBag)) or "weight" not in module._parameters:
        kind = f"a parametrized {type(module).__name__}" if isinstance(module, BinaryEmbedding) else f"a {type(module).__name__}"
        msg = f"module of grow must be a BinaryEmbedding or BinaryEmbeddingBag, got {kind}"
        raise TypeError(msg)
    table: Any = module.weight
    rows, dim = table.shape
    added = check_rows("num_embeddings", check_int("num_embeddings", num_embeddings, low=rows + 1), dim) - rows
    if generator is not None and not isinstance(generator, torch.Generator):
        msg = f"generator must be a torch.Generator or None, got a {type(generator).__name__}"
        raise TypeError(msg)
    if table.is_meta:
        msg = "module of grow must not be on the meta device: load its table first"
        raise ValueError(msg)
    state = _grown_state(optimizer, table, added)
    bits, scale = _new_rows(module, added, generator) if values is None else _packed(values, added, table)
    larger = BinaryTable._wrap(torch.cat([table.bits, bits]), torch.cat([table.scale, scale]), dim, table.dtype)
    if table.frozen is not None:
        larger.frozen = torch.cat([table.frozen, table.frozen.new_zeros(added)])
    grad, table.grad = table.grad, None
    table.data = larger
    module.num_embeddings = rows + added
    if isinstance(grad, RowGrad):
        table.grad = RowGrad._wrap(grad.ids, grad.rows, table.shape)
    if optimizer is not None and state is not None:
        optimizer.state[table] = state


def _new_rows(module: Any, added: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Random rows like those of a new module."""
    table = module.weight
    dim, spread = table.shape[1], module._spread
    bits = torch.empty(added, table.bits.shape[1], dtype=torch.uint8, device=table.device)
    fill_random(bits[:, : packed_width(dim)], None if spread == INDEPENDENT else _common_bits(table), spread, generator)
    fill_magnitudes(bits, dim, generator)
    clear_padding_bits(bits, dim)
    used = table.scale[table.scale != 0].abs().double()
    mean = used.mean() if used.numel() else torch.tensor(module._initial_scale)
    return bits, mean.float().expand(added, 1).to(table.device)


def _common_bits(table: BinaryTable) -> Tensor:
    """[1, B]: the pattern near which the rows of a module with `spread` started, as the majority of them shows it."""
    rows, dim = table.shape
    majority = torch.empty(1, dim, dtype=torch.float32, device=table.device)
    ids, offsets = torch.arange(rows, device=table.device), torch.tensor([0, rows], device=table.device)
    signs = table.bits[:, : packed_width(dim)].contiguous()
    _native_call.lookup_bag(signs, table.scale, dim, ids, offsets, "majority", None, majority)
    return BinaryTable.from_float(majority).bits


def _packed(values: Tensor, added: int, table: BinaryTable) -> tuple[Tensor, Tensor]:
    try:
        packed = BinaryTable.from_float(values, planes=table.planes)
    except (TypeError, ValueError) as error:
        msg = f"values of grow: {error}"
        raise type(error)(msg) from None
    if packed.shape != (added, table.shape[1]) or packed.device != table.device:
        msg = f"values must have shape [{added}, {table.shape[1]}] on {table.device}, got {list(packed.shape)} on {packed.device}"
        raise ValueError(msg)
    return packed.bits, packed.scale


def _grown_state(optimizer: XOR | None, table: BinaryTable, added: int) -> dict[str, Any] | None:
    """The table's state with fresh entries for the new rows; None if there is none."""
    if optimizer is None:
        return None
    if not isinstance(optimizer, XOR):
        msg = f"optimizer must be the XOR that trains the table, got a {type(optimizer).__name__}"
        raise TypeError(msg)
    if optimizer._replicas is not None:
        msg = "optimizer of grow must have its whole state here, got one with shard_state: go on with a new one after "
        msg += "export_state, grow of an optimizer without shard_state, and import_state"
        raise NotImplementedError(msg)
    groups = [group for _, group, mine in optimizer._tables() if mine is table]
    if not groups:
        msg = "optimizer must be the XOR that trains the table, got one that does not"
        raise ValueError(msg)
    if table not in optimizer.state:
        return None
    state = dict(optimizer.state[table])
    for name in state.keys() & STATE_ARRAYS.keys():
        array = state[name]
        state[name] = torch.cat([array, array.new_zeros(added, *array.shape[1:])])
    return state
