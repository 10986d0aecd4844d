"""How a batch's rows travel between the ranks that share a table: every id once, rows packed, gradients summed by row.

A :class:`Route` says who wants which rows of whom. It is made in one of two ways. Without a capacity the ranks tell each other how many
rows they want, and the host reads that once. With a capacity every pair of ranks has a fixed number of slots, and the host reads nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualbin._errors import add_report
from dualbin.torch import _native_call
from dualbin.torch._distributed import Group, start_gather

_INT32_MAX = 2**31 - 1
#: rows of NaN before those that arrive with a capacity, for ids that have no slot: four, so that the others begin at a multiple of 16 bytes
_SPARE = 4


@dataclass(frozen=True)
class Route:
    """Who sends which rows of one batch to whom."""

    slots: Tensor  #: int64 [N]: the place of an id's row among those that arrive
    wanted: Tensor  #: rows of this shard that the ranks want, in the order of the ranks; of unused slots, numbers beyond the shard
    spare: int  #: rows of NaN before those that arrive
    arriving: int  #: rows that arrive
    asked: list[int] | None  #: rows that this rank wants of each rank; None: the same number of all
    served: list[int] | None  #: rows that each rank wants of this one
    anywhere: bool  #: whether any rank has ids, as far as the host knows
    group: Group

    def fetch(self, bits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that this rank wants, as the bits and scales of a small table in which `slots` are the ids."""
        width = bits.shape[1]
        word = torch.int32 if width % 4 == 0 and bits.storage_offset() % 4 == 0 else torch.uint8
        here = self.wanted if self.spare == 0 else self.wanted.clamp(max=bits.shape[0] - 1)  # of unused slots nobody reads what comes
        columns = width // word.itemsize
        leaving = torch.empty(here.shape[0], columns + 4 // word.itemsize, dtype=word, device=bits.device)
        torch.index_select(bits.view(word), 0, here, out=leaving[:, :columns])
        torch.index_select(scale.reshape(-1, 1).view(word), 0, here, out=leaving[:, columns:])
        arrived = torch.empty(self.spare + self.arriving, leaving.shape[1], dtype=word, device=bits.device)
        exchange(arrived[self.spare :], leaving, self.asked, self.served, self.group)
        new_bits, new_scale = (  # not contiguous(), which leaves a single row where it is
            part.clone(memory_format=torch.contiguous_format) for part in (arrived[:, :columns], arrived[:, columns:])
        )
        new_bits, new_scale = new_bits.view(torch.uint8), new_scale.view(torch.float32)
        if self.spare:
            new_scale[: self.spare].fill_(float("nan"))
        return new_bits, new_scale

    def send_sums(self, dy: Tensor, dtype: torch.dtype) -> Tensor:
        """The average of a gradient over the ranks, at the ranks that hold the rows: what comes in belongs to the rows `wanted`.

        This rank sums dy [N, D] by row, divides by the number of ranks and rounds to `dtype`.
        """
        sums = _native_call.segment_sum(self.slots, dy, self.spare + self.arriving)[self.spare :]
        world = dist.get_world_size(self.group)
        if dtype != torch.float32:
            sums = torch.div(sums, world, out=torch.empty_like(sums, dtype=dtype))
        elif world > 1:
            sums.div_(world)
        arrived = sums.new_empty(self.wanted.shape[0], sums.shape[1])
        exchange(arrived, sums, self.served, self.asked, self.group)
        return arrived


@dataclass(frozen=True)
class Asked:
    """A route without a capacity on its way: the numbers of rows that all ranks want, before the host has read them."""

    ids: Tensor  #: int64 [N]
    slots: Tensor
    local: Tensor  #: [U or more], the distinct ids counted from the first row of their rank
    numbers: Tensor  #: of every rank: how many of its distinct ids lie before the end of each rank, then its smallest and largest id
    ready: Any = None  #: an event, if `numbers` are on their way to the host


@dataclass
class _Constants:
    """What the lookups of one device have in common."""

    bounds: Tensor  #: int64 [world + 1]: where the rows of the ranks begin and end
    ends: Tensor  #: int64 [world]
    places: Tensor  #: int64 [capacity]
    unused: Tensor  #: int64 [world, 1]: what stands in unused slots of a rank, no smaller than its rows and no larger than the next rank's
    first: Tensor  #: int64 [world, 1]: the first row of each rank
    missed: _Missed


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
    _constants: dict[torch.device, _Constants] = field(default_factory=dict)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Exchange:
        return Exchange(self.rows, self.group, self.capacity)

    def __reduce__(self) -> Any:
        return Exchange, (self.rows, self.group, self.capacity)

    @torch.no_grad()
    def start(self, ids: Tensor, *, early: bool = False) -> Asked | Route:
        """Find out which rows the ids need. With a capacity that is all; else :meth:`finish` has to read the numbers.

        Args:
            ids: int32 or int64 of any shape, checked for dtype and device.
            early: have the numbers copied to the host meanwhile.
        """
        flat, constants = ids.reshape(-1).long(), self._on(ids.device)
        if self.capacity is not None:
            return self._route_by_slots(flat, constants, self.capacity)
        keys = _native_call.distinct(flat, self.rows)
        cuts = torch.searchsorted(keys, constants.ends)  # no slice of bounds: torch 2.11 takes the whole on a GPU
        extremes = torch.aminmax(flat) if flat.numel() else (cuts.new_zeros(()),) * 2
        mine = torch.cat([cuts, torch.stack(tuple(extremes))])
        numbers = mine.new_empty(self._world, mine.shape[0])
        gathering = start_gather(numbers, mine.unsqueeze(0), self.group)
        slots, local = torch.searchsorted(keys, flat), torch.remainder(keys, self._share, out=self._local(keys))  # meanwhile
        gathering.wait()
        if not (early and numbers.is_cuda):
            return Asked(flat, slots, local, numbers)
        numbers = numbers.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Asked(flat, slots, local, numbers, ready)

    @torch.no_grad()
    def finish(self, asked: Asked | Route) -> Route:
        """The route, once the numbers are there. A GPU is waited for; raises IndexError on all ranks if any has a bad id."""
        if isinstance(asked, Route):
            return asked
        if asked.ready is not None:
            asked.ready.synchronize()
        rank, by_rank = dist.get_rank(self.group), asked.numbers.tolist()
        refuse_bad_ids(asked.ids, [numbers[self._world :] for numbers in by_rank], self.rows, rank)
        counts = [[end - begin for begin, end in zip([0, *cuts], cuts[: self._world], strict=False)] for cuts in by_rank]
        sent, served = counts[rank], [numbers[rank] for numbers in counts]
        wanted = asked.local.new_empty(sum(served))
        exchange(wanted, asked.local[: sum(sent)], served, sent, self.group)
        return Route(asked.slots, wanted, 0, sum(sent), sent, served, any(map(any, counts)), self.group)

    def _route_by_slots(self, ids: Tensor, constants: _Constants, capacity: int) -> Route:
        """The distinct ids of a rank's rows take the slots of that rank in ascending order, those beyond the last none.

        Unused slots hold the first id of the next rank (of the last rank, one that no id is), so that all slots ascend, and the last that
        is not above an id is its own or nobody's.
        """
        world, missed = self._world, constants.missed
        safe = ids.clamp(-1, self.rows)  # bad ids become one of two
        keys = _native_call.distinct(safe, self.rows) if ids.numel() else constants.ends[-1:].clone()
        cuts = torch.searchsorted(keys, constants.bounds)
        begin, end = cuts[:-1].unsqueeze(1), cuts[1:].unsqueeze(1)
        place = begin + constants.places
        asked = torch.full((_SPARE + world * capacity,), -2, dtype=torch.int64, device=ids.device)
        by_rank = asked[_SPARE:].view(world, capacity)
        torch.where(place < end, keys[place.clamp(max=keys.shape[0] - 1)], constants.unused, out=by_rank)
        local = torch.sub(by_rank, constants.first, out=self._local(by_rank))
        wanted = torch.empty_like(local)
        asking = start_exchange(wanted, local, None, None, self.group)
        slots = torch.searchsorted(asked, safe, right=True) - 1  # this and what follows meanwhile
        nobodys = asked[slots] != safe
        slots.masked_fill_(nobodys, 0)
        if ids.numel():
            low, high = torch.aminmax(ids)
            missed.counts[0].add_(nobodys.sum())
            torch.minimum(missed.counts[1], low, out=missed.counts[1])
            torch.maximum(missed.counts[2], high, out=missed.counts[2])
            torch.maximum(missed.counts[3:], cuts.diff(), out=missed.counts[3:])
        asking.wait()
        return Route(slots, wanted.view(-1), _SPARE, world * capacity, None, None, True, self.group)

    @property
    def _world(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def _share(self) -> int:
        return -(-self.rows // self._world)

    def _local(self, like: Tensor) -> Tensor:
        """Room for rows of one rank in the place of ids."""
        return torch.empty_like(like, dtype=local_dtype(self._share))

    def _on(self, device: torch.device) -> _Constants:
        if (known := self._constants.get(device)) is not None:
            return known
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            msg = "a sharded table makes what its lookups share in the first one: look rows up once before a CUDA graph is captured"
            raise RuntimeError(msg)
        bounds = [min(rank * self._share, self.rows) for rank in range(self._world + 1)]
        unused = [*bounds[1:-1], self.rows + 1]
        capacity = self.capacity or 0
        first = torch.tensor(bounds[:-1], device=device).unsqueeze(1)
        missed = _Missed(self.rows, capacity, torch.zeros(3 + self._world, dtype=torch.int64, device=device))
        if capacity:
            _records.add(missed)
        self._constants[device] = made = _Constants(
            torch.tensor(bounds, device=device),
            torch.tensor(bounds[1:], device=device),
            torch.arange(capacity, device=device),
            torch.tensor(unused, device=device).unsqueeze(1),
            first,
            missed,
        )
        return made


def local_dtype(share: int) -> torch.dtype:
    """What holds the rows of a rank, of which it has `share` at most, in few bytes."""
    return torch.int32 if share < _INT32_MAX else torch.int64


def refuse_bad_ids(ids: Tensor, extremes: list[list[int]], rows: int, rank: int) -> None:
    """Raise on every rank if there are bad ids on any, so that none is left waiting."""
    bad = [low < 0 or high >= rows for low, high in extremes]
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

    They travel as bytes: not every backend knows every dtype.
    """
    dist.all_to_all_single(_bytes(out), _bytes(array), received, sent, group=group)


def start_exchange(out: Tensor, array: Tensor, received: list[int] | None, sent: list[int] | None, group: Group) -> Any:
    """As :func:`exchange`, which has not happened before `wait()` of what is returned."""
    return dist.all_to_all_single(_bytes(out), _bytes(array), received, sent, group=group, async_op=True)


def _bytes(array: Tensor) -> Tensor:
    return array.reshape(array.shape[0], -1).view(torch.uint8) if array.numel() else array.new_empty(0, dtype=torch.uint8)
