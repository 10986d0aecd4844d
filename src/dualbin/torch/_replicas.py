"""Replicas of a table whose optimizer state is divided by the ranks: each updates its part of the rows and sends what has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualbin._schema import STATE_ARRAYS
from dualbin.torch import _native_call
from dualbin.torch._distributed import Group, check_initialised, gather_equal, place_in
from dualbin.torch._exchange import exchange
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._sharded import as_dtensor, shard_range
from dualbin.torch._step import Step, Where, checked_grad
from dualbin.torch._table import BinaryTable

#: what one table brings to a step: its name in messages, its param group, the table
Entry = tuple[Where, dict[str, Any], BinaryTable]


@dataclass(frozen=True)
class _Arrived:
    """The gradient of a part, and how many occurrences the parts of all ranks have."""

    grad: RowGrad
    counts: list[int]


@dataclass(frozen=True)
class _Sums:
    """A gradient, summed by row and divided by the number of ranks, as :func:`dualbin.reference.route` puts it."""

    local: Tensor  #: [C], distinct rows in ascending order, counted from the first row of their rank
    rows: Tensor  #: float32 [C, D]
    numbers: Tensor  #: int64 [world + 1]: how many rows lie before the end of each rank; _FAILED in the last place if there is an error


#: no position of an id, and not the -1 that stands for none
_FAILED = -2


class Replicas:
    """The parts of the tables of one optimizer, and their exchange.

    Args:
        group: the ranks that have the same tables; True takes all.
    """

    def __init__(self, group: Group) -> None:
        check_initialised("XOR(shard_state=...)")
        if not (group is True or isinstance(group, dist.ProcessGroup)):
            msg = f"shard_state must be a process group, True for that of all ranks, or False, got {group!r}"
            raise TypeError(msg)
        self.group = None if group is True else group
        self._parts: dict[Tensor, tuple[tuple[Any, ...], BinaryTable]] = {}
        self._arrived: dict[Tensor, _Arrived] = {}

    @cached_property
    def place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return place_in(self.group)

    def check(self, table: BinaryTable, *, capturable: bool) -> None:
        """Raise unless a table can be divided."""
        rows, world = table.shape[0], self.place[1]
        if capturable:
            msg = "capturable must be False with shard_state: the host reads how many rows travel"
            raise ValueError(msg)
        if table.first_row is not None:
            msg = "shard_state is for tables that every rank has whole, got a shard: its rank has the state of its rows only, as it is"
            raise ValueError(msg)
        if -(-rows // world) * (world - 1) >= rows:
            msg = f"shard_state must give each of {world} ranks a row, got a table of {rows} rows: give it to another XOR, and call "
            msg += "sync_row_grads for it"
            raise ValueError(msg)

    def part(self, table: BinaryTable) -> BinaryTable:
        """The rows of a table that this rank updates, as a shard in the memory of the table."""
        made_from = (table.bits, table.scale, table.frozen, table.dtype)
        known = self._parts.get(table)
        if known is not None and all(mine is now for mine, now in zip(known[0], made_from, strict=True)):
            return known[1]
        first, last = shard_range(table.shape[0], *self.place)
        part = BinaryTable._wrap(table.bits[first:last], table.scale[first:last], table.shape[1], table.dtype, first)
        part.frozen = None if table.frozen is None else table.frozen[first:last]
        self._parts[table] = made_from, part
        return part

    def gather(self, entries: Iterable[Entry], check: Callable[[dict[str, Any]], None]) -> list[tuple[Entry, RowGrad]]:
        """Send the row sums of all gradients to the ranks that update the rows; a collective call.

        Args:
            entries: the same tables in the same order on every rank.
            check: raises if the options of a param group are bad.

        Returns:
            Of every table that has a gradient on any rank: its entry, and the gradient of its part.

        Raises:
            TypeError, ValueError, IndexError: a gradient or option is bad, here; ValueError: on another rank. Nothing has changed then.
        """
        work = [entry for entry in entries if entry[2].requires_grad]
        arrived: list[tuple[Entry, RowGrad]] = []
        for device in dict.fromkeys(table.device for _, _, table in work):
            arrived += self._gather_on([entry for entry in work if entry[2].device == device], check)
        return arrived

    def _gather_on(self, work: list[Entry], check: Callable[[dict[str, Any]], None]) -> list[tuple[Entry, RowGrad]]:
        rank, world = self.place
        error: Exception | None = None
        sums: list[_Sums] = []
        try:
            for where, options, table in work:
                check(options)
                sums.append(self._sums(where, table))
        except (TypeError, ValueError, IndexError) as bad:
            error, sums = bad, [self._nothing(table, _FAILED) for _, _, table in work]
        numbers = sums[0].numbers if len(sums) == 1 else torch.cat([each.numbers for each in sums])
        by_rank = gather_equal(numbers.unsqueeze(0), world, self.group).tolist()
        if error is not None:
            raise error
        if any(numbers[-1] == _FAILED for numbers in by_rank):
            other = next(r for r, numbers in enumerate(by_rank) if numbers[-1] == _FAILED)
            msg = f"the step of rank {other} has raised, so no rank makes it: what that rank says is the reason"
            raise ValueError(msg)
        arrived = []
        for index, (entry, mine) in enumerate(zip(work, sums, strict=True)):
            table, begin = entry[2], index * (world + 1)
            ends = [numbers[begin : begin + world] for numbers in by_rank]
            counts = [[end - begin for begin, end in zip([0, *row], row, strict=False)] for row in ends]
            if not any(map(any, counts)):  # no rank has rows: not a step
                continue
            sent, received, used = counts[rank], [row[rank] for row in counts], ends[rank][-1]
            part_ids = mine.local.new_empty(sum(received))
            part_rows = mine.rows.new_empty(part_ids.shape[0], mine.rows.shape[1])
            exchange(part_ids, mine.local[:used], received, sent, self.group)
            exchange(part_rows, mine.rows[:used], received, sent, self.group)
            grad = RowGrad._wrap(part_ids, part_rows, self.part(table).shape)
            self._arrived[table] = _Arrived(grad, [sum(row[r] for row in counts) for r in range(world)])
            arrived.append((entry, grad))
        return arrived

    def _sums(self, where: Where, table: BinaryTable) -> _Sums:
        if table.grad is None:
            return self._nothing(table, -1)
        grad, (rows, world) = checked_grad(where(), table), (table.shape[0], self.place[1])
        local, slots, numbers = _native_call.route(grad.ids.contiguous(), rows, -(-rows // world), world)
        return _Sums(local, _native_call.slot_means(slots, grad.rows, local.shape[0], world, torch.float32), numbers)

    def _nothing(self, table: BinaryTable, last: int) -> _Sums:
        world = self.place[1]
        local = torch.empty(0, dtype=_native_call.local_dtype(-(-table.shape[0] // world)), device=table.device)
        numbers = torch.zeros(world + 1, dtype=torch.int64, device=table.device)
        numbers[-1:].fill_(last)
        return _Sums(local, torch.empty(0, table.shape[1], dtype=torch.float32, device=table.device), numbers)

    def spread(self, steps: Iterable[tuple[BinaryTable, Step]]) -> None:
        """Send the rows that updates have changed to all ranks; a collective call.

        What arrives is written when everything is there.

        Args:
            steps: (table, the step of its part), in the order of :meth:`gather`.
        """
        received = []
        for table, step in steps:
            arrived = self._arrived.pop(table)
            if step.update is None:
                continue
            ids, counts = _changed_rows(step, arrived), arrived.counts
            if step.before.get("pending_steps"):
                mine = torch.tensor([[ids.shape[0]]], dtype=torch.int64, device=ids.device)
                counts = gather_equal(mine, self.place[1], self.group).flatten().tolist()
            received.append((table, self._send_rows(table, ids, max(counts))))
        for table, parts in received:
            for first, last, rows, places in parts:
                _native_call.put_rows(rows, table.bits[first:last], table.scale[first:last], places)

    def before(self, steps: Iterable[tuple[BinaryTable, Step]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the updates of parts on the CPU are about to change: (array, rows, what they hold).

        A collective call raises there if another rank dies, and then an update whose rows no one will get has to be undone. On GPUs NCCL
        ends the process.
        """
        kept = []
        for table, step in steps:
            if step.update is None or not table.is_cpu:
                continue
            rows, part = _changed_rows(step, self._arrived[table]).long(), self.part(table)
            arrays = [part.bits, part.scale, *(step.state[name] for name in STATE_ARRAYS if name in step.state)]
            kept += [(array, rows, array[rows]) for array in arrays]
        return kept

    def _send_rows(self, table: BinaryTable, ids: Tensor, longest: int) -> list[tuple[int, int, Tensor, Tensor]]:
        """The rows `ids` of this rank's part to all ranks; what comes back are (first and last row of the part, rows, places) of theirs.

        They travel packed, padded to the longest list.
        """
        part, (rank, world) = self.part(table), self.place
        width = part.bits.shape[1] + 4
        split = -(-longest * width // 8) * 8  # rows before it, the places of the rows behind it
        leaving = torch.empty(split + longest * ids.itemsize, dtype=torch.uint8, device=ids.device)
        places = leaving[split:].view(ids.dtype).fill_(-1)
        places[: ids.shape[0]].copy_(ids)
        _native_call.take_rows(part.bits, part.scale, places, leaving[: longest * width].view(longest, width))
        arrived = gather_equal(leaving.unsqueeze(0), world, self.group)
        return [
            (*shard_range(table.shape[0], other, world), theirs[: longest * width].view(longest, width), theirs[split:].view(ids.dtype))
            for other, theirs in enumerate(arrived)
            if other != rank
        ]

    # ---- the state of parts --------------------------------------------------------------------------------------------------------------

    def of_part(self, state: Mapping[str, Any], table: BinaryTable) -> dict[str, Any]:
        """This rank's part of the state of a whole table."""
        first, last = shard_range(table.shape[0], *self.place)
        mine = {name: value[first:last].clone() if name in STATE_ARRAYS else value for name, value in state.items()}
        if "pending_ids" in mine:
            here = (mine["pending_ids"] >= first) & (mine["pending_ids"] < last)
            mine |= {"pending_ids": mine["pending_ids"][here] - first, "pending_rows": mine["pending_rows"][here]}
        return mine

    def whole(self, state: Mapping[str, Any], table: BinaryTable) -> dict[str, Any]:
        """The state of the whole table, on the CPU, from those of the parts; a collective call."""
        whole = dict(state)
        for name in (name for name in state if name in STATE_ARRAYS):  # in the same order on all ranks
            parts: Any = as_dtensor(state[name], table.shape[0], self.group)
            whole[name] = parts.full_tensor().cpu()
        if "pending_ids" in whole:
            everyone: list[Any] = [None] * self.place[1]
            mine = (state["pending_ids"].cpu() + self.part(table).first_row, state["pending_rows"].cpu())
            dist.all_gather_object(everyone, mine, group=self.group)
            whole["pending_ids"], whole["pending_rows"] = (torch.cat(parts) for parts in zip(*everyone, strict=True))
        return whole


def _changed_rows(step: Step, arrived: _Arrived) -> Tensor:
    """The rows of its part that an update may change, those of its whole window; some of them more than once."""
    ids = arrived.grad.ids
    return torch.cat([step.before["pending_ids"], ids.long()]).to(ids.dtype) if step.before.get("pending_steps") else ids


def check_saved_part(part: Sequence[int] | None, replicas: Replicas | None) -> None:
    """Raise unless an optimizer of these replicas can go on from a state_dict of `part` = (rank, world); None: of the whole state.

    Raises:
        ValueError: it is the state of other rows.
    """
    mine = None if replicas is None else replicas.place
    if part is not None and (mine is None or tuple(part) != mine):
        here = "this optimizer has no shard_state" if mine is None else f"this is rank {mine[0]} of {mine[1]}"
        msg = f"state_dict was saved with shard_state by rank {part[0]} of {part[1]}, but {here}: use XORCheckpoint with "
        msg += "torch.distributed.checkpoint, or export_state and import_state"
        raise ValueError(msg)
