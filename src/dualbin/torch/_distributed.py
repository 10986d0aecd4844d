"""Tables in data-parallel training: every rank holds the whole table, and all flip the same bits.

DDP and FSDP cannot reduce row gradients, so tables are hidden from them and their gradients are exchanged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dualbin.torch import _native_call
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._step import checked_grad
from dualbin.torch._table import BinaryTable, accept_any_grad_dtype

Group = Any  #: a ProcessGroup, or None for all ranks; without torch.distributed there is no such class

_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)  # its name before torch 2.13


def prepare_ddp(module: nn.Module, process_group: Group = None) -> list[BinaryTable]:
    """Make the tables of a module equal on all ranks, and hide them from DDP. Call it once on every rank, before DDP wraps the module.

    Rank 0's bits and scales are sent to the others. Between `backward()` and unscaling, clipping or `step()`, call
    :func:`sync_row_grads`. With FSDP2 use it in the same way, and pass `ignored_params=set(tables)` to `fully_shard`. Shards
    (:class:`ShardedBinaryEmbedding`) are hidden from DDP but sent nowhere.

    Args:
        module: the module that DDP will wrap itself, not a part of it.
        process_group: the ranks that train together; None takes all.

    Returns:
        The distinct tables of the module, frozen ones and shards included, in the order of its parameters.

    Raises:
        TypeError, RuntimeError: module is no module, or torch.distributed has not been initialised.
        ValueError: the ranks have different tables; every rank raises, and nothing has changed.
    """
    if not isinstance(module, nn.Module) or isinstance(module, DistributedDataParallel):
        msg = f"module must be an nn.Module that DDP does not wrap yet, got a {type(module).__name__}"
        raise TypeError(msg)
    check_initialised("prepare_ddp")
    named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if isinstance(p, BinaryTable)]
    tables: list[BinaryTable] = list({id(table): table for _, table in named}.values())
    _check_same_tables(tables, process_group)
    for table in tables:
        if table.first_row is None:
            dist.broadcast(table.bits, group=process_group, group_src=0)
            dist.broadcast(table.scale, group=process_group, group_src=0)
            torch.autograd.graph.increment_version((table, table.bits, table.scale))
    ignored = [*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *(name for name, _ in named)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    return tables


@torch.no_grad()
def sync_row_grads(tables: Iterable[BinaryTable], group: Group = None) -> None:
    """Replace the row gradient of every table by its average over the ranks, as DDP does for other parameters.

    Call it on every rank after the last `backward()` of a step, before `GradScaler.unscale_` and clipping, so that all ranks see the same
    norms, the same infinities and the same gradients. A rank that looked nothing up takes part with no rows. Each rank sums its rows by id,
    divides by the number of ranks, and the sums are added in the order of the ranks: the result is the same bits on all of them.

    The traffic and memory of a step are `ranks * R * D` floats, R the largest number of distinct rows on a rank. On a GPU it waits for the
    device once for the numbers of rows of all tables. Frozen tables and shards, whose gradients are averaged already, are left alone.

    Args:
        tables: the same tables in the same order on every rank, as :func:`prepare_ddp` returns them.
        group: the ranks that train together; None takes all.

    Raises:
        TypeError, ValueError, IndexError: an entry is no BinaryTable, or its gradient does not fit. Nothing has changed on this rank then.
        RuntimeError: torch.distributed has not been initialised.
    """
    check_initialised("sync_row_grads")
    chosen = [_checked(index, table) for index, table in enumerate(tables)]
    chosen = [table for table in chosen if table.requires_grad and table.first_row is None]
    with torch._C.DisableTorchFunctionSubclass():
        for device in dict.fromkeys(table.device for table in chosen):
            _sync_on_device([table for table in chosen if table.device == device], device, group)


def _checked(index: int, table: object) -> BinaryTable:
    if not isinstance(table, BinaryTable):
        msg = f"tables must be BinaryTables, got a {type(table).__name__} as entry {index}"
        raise TypeError(msg)
    if table.grad is not None:
        checked_grad(f"tables[{index}]", table)
    return table


def _sync_on_device(tables: Sequence[BinaryTable], device: torch.device, group: Group) -> None:
    world = dist.get_world_size(group)
    local = [_local_rows(table, world) for table in tables]
    counts = torch.tensor([[ids.numel() for ids, _ in local]], dtype=torch.int64, device=device)
    by_rank = gather_equal(counts, world, group).tolist()
    merged: list[RowGrad | None] = []
    for index, (table, (ids, rows)) in enumerate(zip(tables, local, strict=True)):
        used = [numbers[index] for numbers in by_rank]
        if not any(used):
            merged.append(None)
            continue
        all_ids, all_rows = (_gather_ragged(array, used, group) for array in (ids, rows))
        merged.append(RowGrad._wrap(*_native_call.reduce_rows(all_ids, all_rows, table.shape[0]), table.shape))
    for table, grad in zip(tables, merged, strict=True):
        if grad is not None:
            accept_any_grad_dtype(table)
            table.grad = grad


def _local_rows(table: BinaryTable, world: int) -> tuple[Tensor, Tensor]:
    """Distinct ids and their share of the average."""
    grad = table.grad
    if not isinstance(grad, RowGrad):
        return (
            torch.empty(0, dtype=torch.int64, device=table.device),
            torch.empty(0, table.shape[1], dtype=torch.float32, device=table.device),
        )
    ids, rows = _native_call.reduce_rows(grad.ids, grad.rows, table.shape[0])
    return ids, rows / world


def place_in(group: Group) -> tuple[int, int]:
    """This rank, and how many there are. A group does not change, and asking costs as much as a kernel: keep it."""
    return dist.get_rank(group), dist.get_world_size(group)


def gather_equal(array: Tensor, world: int, group: Group) -> Tensor:
    """Arrays of one shape `[n, ...]` from all ranks as `[world * n, ...]`."""
    out = array.new_empty(world * array.shape[0], *array.shape[1:])
    gather_into(out, array.contiguous(), group)
    return out


def gather_into(out: Tensor, array: Tensor, group: Group) -> None:
    """The contiguous `array` of every rank one after the other into `out`."""
    _all_gather(out, array, group=group)


def _gather_ragged(array: Tensor, used: Sequence[int], group: Group) -> Tensor:
    """The arrays `[used[rank], ...]` of all ranks one after the other. They travel padded to the longest."""
    longest = max(used)
    padded = array.new_zeros(longest, *array.shape[1:])
    padded[: array.shape[0]] = array
    everything = gather_equal(padded, len(used), group)
    if min(used) == longest:
        return everything
    return torch.cat([everything[rank * longest : rank * longest + count] for rank, count in enumerate(used)])


def check_initialised(name: str) -> None:
    """Raise RuntimeError unless a default process group exists."""
    if not (dist.is_available() and dist.is_initialized()):
        msg = f"{name} needs torch.distributed: call torch.distributed.init_process_group first"
        raise RuntimeError(msg)


def check_same_on_all_ranks(arguments: Mapping[str, Any], group: Group) -> None:
    """Raise ValueError on every rank unless all of them were given the same arguments."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, dict(arguments), group=group)
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                msg = f"{name} must be the same on every rank, got {everyone[0][name]!r} on rank 0 and {value!r} on rank {rank}"
                raise ValueError(msg)


def _check_same_tables(tables: Sequence[BinaryTable], group: Group) -> None:
    mine = [(None if t.first_row is not None else t.shape[0], t.shape[1], t.planes, str(t.dtype)) for t in tables]
    everyone: list[list[tuple[int | None, int, int, str]] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            msg = "module must have the same tables (rows, dim, planes, dtype) on every rank, "
            msg += f"got {everyone[0]} on rank 0 and {theirs} on rank {rank}"
            raise ValueError(msg)
