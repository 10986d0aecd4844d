"""How a batch's rows travel between the ranks that share a table: every id once, rows packed, gradients summed by row.

A :class:`Route` says who wants which rows of whom. It is made in one of two ways. Without a capacity the ranks tell each other how many
rows they want, and the host reads that once. With a capacity every pair of ranks has a fixed number of slots, and the host reads nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualbin._errors import add_report
from dualbin.torch import _native_call
from dualbin.torch._distributed import Group, gather_into, place_in

#: rows of NaN before those that arrive with a capacity, for ids that have no slot: four, so that the others begin at a multiple of 16 bytes
_SPARE = 4


@dataclass(frozen=True)
class Route:
    """Who sends which rows of one batch to whom."""

    slots: Tensor  #: [N]: the place of an id's row among those that arrive
    wanted: Tensor  #: rows of this shard that the ranks want, in the order of the ranks; of unused slots, numbers beyond the shard
    spare: int  #: rows of NaN before those that arrive
    arriving: int  #: rows that arrive
    asked: list[int] | None  #: rows that this rank wants of each rank; None: the same number of all
    served: list[int] | None  #: rows that each rank wants of this one
    anywhere: bool  #: whether any rank has ids, as far as the host knows
    group: Group

    def fetch(self, bits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that this rank wants, as the bits and scales of a small table in which `slots` are the ids."""
        leaving = _native_call.take_rows(bits, scale, self.wanted)
        arrived = leaving.new_empty(self.spare + self.arriving, leaving.shape[1])
        exchange(arrived[self.spare :] if self.spare else arrived, leaving, self.asked, self.served, self.group)
        if self.spare:
            arrived[: self.spare].fill_(255)  # a scale of such bytes is NaN
        new_bits, new_scale = bits.new_empty(arrived.shape[0], bits.shape[1]), scale.new_empty(arrived.shape[0], 1)
        _native_call.put_rows(arrived, new_bits, new_scale)
        return new_bits, new_scale

    def send_sums(self, dy: Tensor, dtype: torch.dtype) -> Tensor:
        """The average of a gradient over the ranks, at the ranks that hold the rows: what comes in belongs to the rows `wanted`.

        This rank sums dy [N, D] by row, divides by the number of ranks and rounds to `dtype`.
        """
        sums = _native_call.slot_means(self.slots, dy, self.spare + self.arriving, dist.get_world_size(self.group), dtype)
        if self.spare:
            sums = sums[self.spare :]
        arrived = sums.new_empty(self.wanted.shape[0], sums.shape[1])
        exchange(arrived, sums, self.served, self.asked, self.group)
        return arrived


@dataclass(frozen=True)
class Asked:
    """A route without a capacity on its way: the numbers of rows that all ranks want, before the host has read them."""

    ids: Tensor  #: [N]
    slots: Tensor
    local: Tensor  #: [U or more], the distinct ids counted from the first row of their rank
    numbers: Tensor  #: of every rank: how many of its distinct ids lie before the end of each rank, then the position of a bad id or -1
    ready: Any = None  #: an event, if `numbers` are on their way to the host


@dataclass(eq=False)
class _Missed:
    """What lookups with a capacity could not find, counted on the device."""

    rows: int
    capacity: int
    counts: Tensor  #: int64: ids without a row, the smallest and the largest id, then the slots wanted of every rank

    def take(self) -> Exception | None:
        if int(self.counts[0]) == 0:
            return None
        missed, low, high, *wanted = self.counts.tolist()
        self.counts.zero_()
        problems, where = [], f"{missed} rows are NaN on {self.counts.device} since the last check"
        if max(wanted) > self.capacity:
            rank = wanted.index(max(wanted))
            problems.append(f"a lookup wanted {max(wanted)} distinct rows of rank {rank}, more than the capacity of {self.capacity} slots")
        if low < 0 or high >= self.rows:
            problems.append(f"ids must be in [0, {self.rows}), the rows of the table, got {low if low < 0 else high}")
            return IndexError(f"lookups of a ShardedBinaryEmbedding: {where}: " + "; ".join(problems))
        return RuntimeError(f"lookups of a ShardedBinaryEmbedding: {where}: " + "; ".join(problems) + ". Give it more, or smaller batches")


_records: weakref.WeakSet[_Missed] = weakref.WeakSet()
add_report(lambda: [found for record in list(_records) if (found := record.take()) is not None])


@dataclass
class Exchange:
    """The exchanges of one table.

    Args:
        rows: of the whole table.
        group: the ranks that share it.
        capacity: slots a pair of ranks, or None.
    """

    rows: int
    group: Group
    capacity: int | None
    _missed: dict[torch.device, _Missed] = field(default_factory=dict)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Exchange:
        return Exchange(self.rows, self.group, self.capacity)

    def __reduce__(self) -> Any:
        return Exchange, (self.rows, self.group, self.capacity)

    def start(self, ids: Tensor, *, early: bool = False) -> Asked | Route:
        """Find out which rows the ids need. With a capacity that is all; else :meth:`finish` has to read the numbers.

        Args:
            ids: int32 or int64 of any shape, checked for dtype and device.
            early: have the numbers copied to the host meanwhile.
        """
        flat = ids.reshape(-1).contiguous()
        world, share = self._world, self._share
        if self.capacity is not None:
            missed = self._missed_on(ids.device).counts
            local, slots, _ = _native_call.route(flat, self.rows, share, world, self.capacity, _SPARE, missed)
            wanted = torch.empty_like(local)
            exchange(wanted, local, None, None, self.group)
            return Route(slots, wanted, _SPARE, local.shape[0], None, None, True, self.group)
        local, slots, mine = _native_call.route(flat, self.rows, share, world)
        numbers = mine.new_empty(world * (world + 1))
        gather_into(numbers, mine, self.group)
        numbers = numbers.view(world, world + 1)
        if early:
            flat = flat.clone()  # an error has to name a bad id, and the caller may fill the buffer again
        if not (early and numbers.is_cuda):
            return Asked(flat, slots, local, numbers)
        numbers = numbers.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Asked(flat, slots, local, numbers, ready)

    def finish(self, asked: Asked | Route) -> Route:
        """The route, once the numbers are there. A GPU is waited for; raises IndexError on all ranks if any has a bad id."""
        if isinstance(asked, Route):
            return asked
        if asked.ready is not None:
            asked.ready.synchronize()
        (rank, world), by_rank = self._place, asked.numbers.tolist()
        refuse_bad_ids(asked.ids, [numbers[world] >= 0 for numbers in by_rank], self.rows, rank)
        counts = [[end - begin for begin, end in zip([0, *cuts], cuts[:world], strict=False)] for cuts in by_rank]
        sent, served = counts[rank], [numbers[rank] for numbers in counts]
        wanted = asked.local.new_empty(sum(served))
        exchange(wanted, asked.local[: sum(sent)], served, sent, self.group)
        return Route(asked.slots, wanted, 0, sum(sent), sent, served, any(map(any, counts)), self.group)

    @cached_property
    def _place(self) -> tuple[int, int]:
        return place_in(self.group)

    @property
    def _world(self) -> int:
        return self._place[1]

    @property
    def _share(self) -> int:
        return -(-self.rows // self._world)

    def _missed_on(self, device: torch.device) -> _Missed:
        if (known := self._missed.get(device)) is not None:
            return known
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            msg = "a sharded table makes what its lookups share in the first one: look rows up once before a CUDA graph is captured"
            raise RuntimeError(msg)
        counts = torch.zeros(3 + self._world, dtype=torch.int64, device=device)
        self._missed[device] = made = _Missed(self.rows, self.capacity or 0, counts)
        _records.add(made)
        return made


def refuse_bad_ids(ids: Tensor, bad: list[bool], rows: int, rank: int) -> None:
    """Raise on every rank if there are bad ids on any, so that none is left waiting."""
    if not any(bad):
        return
    if bad[rank]:
        position = int(((ids < 0) | (ids >= rows)).nonzero()[0])
        msg = f"ids must be in [0, {rows}), the rows of the table, got {int(ids[position])} at position {position}"
    else:
        msg = f"ids must be in [0, {rows}), the rows of the table; rank {bad.index(True)} has others"
    raise IndexError(msg)


def exchange(out: Tensor, array: Tensor, received: list[int] | None, sent: list[int] | None, group: Group) -> None:
    """`sent[r]` entries of `array` to every rank r, and `received[r]` of its into `out`; None: equally many. Both are contiguous.

    Half precision travels as bytes: not every backend knows it.
    """
    dist.all_to_all_single(_known(out), _known(array), received, sent, group=group)


def _known(array: Tensor) -> Tensor:
    return array.view(torch.uint8) if array.dtype in {torch.bfloat16, torch.float16} else array
