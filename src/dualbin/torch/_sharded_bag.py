"""Bags of rows that are partitioned over the ranks: each rank combines those of its own rows, and only bags travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualbin._checks import check_bool
from dualbin.torch import _native_call
from dualbin.torch._bag import bag_bounds, check_mode, check_weights
from dualbin.torch._distributed import Group, check_initialised, gather_equal
from dualbin.torch._exchange import exchange, refuse_bad_ids
from dualbin.torch._ids import check_ids
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._sharded import ShardedTable, check_once_differentiable
from dualbin.torch._table import BinaryTable, accept_any_grad_dtype


class ShardedBinaryEmbeddingBag(ShardedTable):
    """A :class:`BinaryEmbeddingBag` whose rows are partitioned over the ranks of a process group, as in :class:`ShardedBinaryEmbedding`.

    Every rank sends its ids (and weights) to the ranks that hold their rows. These combine what they hold of a bag, and the float32 sums of
    their parts come back; they are added in the order of the ranks, divided by the number of rows with mode "mean", and rounded once. In
    the backward pass the gradients of the bags go to all ranks, which make the gradients of their rows of them. So for a bag a rank
    receives D floats from every rank: with short bags the rows of :class:`ShardedBinaryEmbedding` are fewer bytes (docs/scale.md).

    Gradients arrive averaged over the ranks, as occurrences, in the order of the joined batch: on one process with all batches, one after
    the other, every bit becomes the same, if the number of ranks is a power of two (else but for roundings).

    Args:
        num_embeddings: V, the number of rows of the whole table; every rank must get at least one.
        embedding_dim: D.
        mode: "sum" or "mean".
        include_last_offset: `offsets` has one more element, the number of ids.
        process_group, padding_idx, device, dtype, generator, scale, spread, planes: as in :class:`ShardedBinaryEmbedding`; the row
            padding_idx is left out of every bag.
        grad_dtype: torch.float32, or torch.bfloat16: what gradients of bags are rounded to before they travel (half precision stays).

    Shape:
        as in :class:`BinaryEmbeddingBag`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or another one than on another rank.
        RuntimeError: torch.distributed has not been initialised.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        process_group: Group = None,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
        scale: float = 0.3,
        spread: float = 0.5,
        planes: int = 1,
        grad_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_initialised("ShardedBinaryEmbeddingBag")
        check_mode(mode, planes)
        if mode == "majority":
            msg = "mode of a ShardedBinaryEmbeddingBag must be 'sum' or 'mean', got 'majority': parts of a bag have no majority to add"
            raise ValueError(msg)
        shape, options = (num_embeddings, embedding_dim), {"mode": mode}
        self._make_shard(*shape, process_group, padding_idx, device, dtype, generator, scale, spread, planes, grad_dtype, options)
        self.mode, self.include_last_offset = mode, check_bool("include_last_offset", include_last_offset)

    @torch._disable_dynamo  # the numbers of ids to exchange are no part of a graph
    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        table: Any = self.weight
        with torch._C.DisableTorchFunctionSubclass():
            check_ids(input, table.device)
            if input.ndim not in {1, 2}:
                msg = f"ids must have shape [N] or [G, L], got {list(input.shape)}"
                raise ValueError(msg)
            weights = per_sample_weights
            if weights is not None:
                check_weights(self.mode, weights, input)
                weights = weights.reshape(-1).float()
            bounds = bag_bounds(input, offsets, self.include_last_offset)
            accept_any_grad_dtype(table)
            return _ShardedBags.apply(table, weights, input.reshape(-1), bounds, self)

    def _more_repr(self) -> str:
        return f", mode={self.mode!r}" + (", include_last_offset=True" if self.include_last_offset else "")


@dataclass(frozen=True)
class _Parts:
    """The bags of all ranks, as far as this rank holds their rows, and the way back to their own ranks."""

    order: Tensor  #: positions of this rank's ids, sorted by the rank that holds the row
    asked: list[int]  #: ids that this rank sends to each rank
    served: list[int]  #: ids that each rank sends here
    bags: list[int]  #: bags of each rank
    ids: Tensor  #: [n], the ids that came in, counted from the first row of this rank
    offsets: Tensor  #: [sum of bags + 1], where the bags begin and end in them
    weights: Tensor | None  #: float32 [n]
    anywhere: bool  #: whether any rank has ids
    group: Group


@torch.no_grad()
def _send_ids(module: ShardedBinaryEmbeddingBag, ids: Tensor, bounds: Tensor, weights: Tensor | None) -> _Parts:
    """Send every id to the rank that holds its row, with the number of its bag and its weight. Waits for the device once."""
    rows, group, device = module.num_embeddings, module.process_group, ids.device
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    share, flat, bounds = -(-rows // world), ids.long(), bounds.long()
    count, bags = flat.shape[0], bounds.shape[0] - 1
    owners, order = torch.sort(flat.div(share, rounding_mode="floor"), stable=True)
    cuts = torch.searchsorted(owners, torch.arange(1, world + 1, device=device))
    extremes = torch.stack(tuple(torch.aminmax(flat))) if count else cuts.new_zeros(2)
    faults = (bounds.diff() < 0).any() | (bounds[0] != 0) | (bounds[-1] != count)
    numbers = torch.cat([cuts, extremes, faults.long().view(1), torch.full((2,), bags, device=device)])
    numbers[-1:].fill_(int(weights is not None))
    by_rank = gather_equal(numbers.unsqueeze(0), world, group).tolist()
    _refuse_bad_offsets([numbers[world + 2] for numbers in by_rank], count, rank)
    refuse_bad_ids(flat, [numbers[world] < 0 or numbers[world + 1] >= rows for numbers in by_rank], rows, rank)
    counts = [[end - begin for begin, end in zip([0, *cuts], cuts[:world], strict=False)] for cuts in by_rank]
    all_bags, weighted = [numbers[world + 3] for numbers in by_rank], any(numbers[world + 4] for numbers in by_rank)
    sent, served = counts[rank], [numbers[rank] for numbers in counts]

    places = torch.searchsorted(bounds, torch.arange(count, device=device), right=True) + (sum(all_bags[:rank]) - 1)
    columns = [torch.remainder(flat, share).to(_native_call.local_dtype(share)).view(count, 1), places.to(torch.int64).view(count, 1)]
    if weighted:
        columns.append(flat.new_ones(count, 1).float() if weights is None else weights.view(count, 1))
    words = [column.view(torch.int32) if count else column.new_empty(0, column.itemsize // 4, dtype=torch.int32) for column in columns]
    leaving = torch.cat(words, dim=1).index_select(0, order)
    arrived = leaving.new_empty(sum(served), leaving.shape[1])
    exchange(arrived, leaving, served, sent, group)
    pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in arrived.split([word.shape[1] for word in words], dim=1)]
    own_ids, own_places = pieces[0].view(columns[0].dtype).view(-1), pieces[1].view(torch.int64).view(-1)
    own_weights = pieces[2].view(torch.float32).view(-1) if weighted else None
    offsets = torch.searchsorted(own_places, torch.arange(sum(all_bags) + 1, device=device))
    return _Parts(order, sent, served, all_bags, own_ids, offsets, own_weights, any(map(any, counts)), group)


def _refuse_bad_offsets(faults: list[int], count: int, rank: int) -> None:
    """Raise on every rank if there are bad offsets on any."""
    if any(faults):
        here = "" if faults[rank] else f"; rank {next(r for r, fault in enumerate(faults) if fault)} has others"
        msg = f"offsets must start at 0, ascend and end at the number of ids ({count} on this rank){here}"
        raise ValueError(msg)


class _ShardedBags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: BinaryTable, weights: Tensor | None, ids: Tensor, bounds: Tensor, module: ShardedBinaryEmbeddingBag
    ) -> Tensor:
        parts = _send_ids(module, ids, bounds, weights)
        dim, padding, group = table.shape[1], module._local_padding(), parts.group
        rank, world, mean = dist.get_rank(group), dist.get_world_size(group), module.mode == "mean"
        sums = torch.empty(sum(parts.bags), dim, dtype=torch.float32, device=table.device)
        if sums.shape[0]:
            _native_call.lookup_bag(table.bits, table.scale, dim, parts.ids, parts.offsets, "sum", parts.weights, sums, padding)
        if mean:
            counts = sums.new_zeros(sums.shape[0], dtype=torch.int32)
            if sums.shape[0]:
                counts = _native_call.bag_counts(table.scale, parts.ids, parts.offsets, padding)
            sums = torch.cat([sums, counts.view(torch.float32).unsqueeze(1)], dim=1)
        mine = parts.bags[rank]
        arrived = sums.new_empty(world * mine, sums.shape[1])
        exchange(arrived, sums, [mine] * world, parts.bags, group)
        slots = torch.arange(mine, device=table.device).repeat(world)
        bags = _native_call.segment_sum(slots, arrived[:, :dim], mine)
        divisor = None
        if mean:
            numbers = arrived[:, dim:].clone(memory_format=torch.contiguous_format).view(torch.int32)
            divisor = numbers.view(world, mine).sum(0).clamp(min=1).float().unsqueeze(1)
            bags.div_(divisor)
        ctx.table, ctx.parts, ctx.padding, ctx.divisor, ctx.grad_dtype = table, parts, padding, divisor, module.grad_dtype
        return bags.to(table.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[RowGrad | None, Tensor | None, None, None, None]:
        check_once_differentiable(dy)
        table, parts = ctx.table, ctx.parts
        if not parts.anywhere:  # not a step
            return None, None, None, None, None
        world = dist.get_world_size(parts.group)
        if ctx.divisor is not None:
            dy = (dy.float() / ctx.divisor).to(dy.dtype)
        if dy.dtype == torch.float32:
            dy = dy.to(ctx.grad_dtype)
        everyone = _gather_bags(dy, parts.bags, parts.group)
        weight_grad = None
        if parts.weights is not None:  # on any rank, so all of them take part
            slopes = _native_call.bag_weight_gradient(table.bits, table.scale, parts.ids, parts.offsets, everyone, ctx.padding)
            back = slopes.new_empty(sum(parts.asked))
            exchange(back, slopes, parts.asked, parts.served, parts.group)
            if ctx.needs_input_grad[1]:
                weight_grad = torch.empty_like(back).index_copy_(0, parts.order, back)
        grad = None
        if ctx.needs_input_grad[0]:
            rows = _native_call.bag_gradient(parts.ids, parts.offsets, everyone / world, "sum", None, parts.weights, ctx.padding)
            grad = RowGrad._wrap(parts.ids, rows, table.shape)
        return grad, weight_grad, None, None, None


def _gather_bags(dy: Tensor, bags: list[int], group: Group) -> Tensor:
    """The gradients of the bags of all ranks, in the order of the ranks. They travel padded to the most."""
    most = max(bags)
    padded = dy.new_zeros(most, dy.shape[1])
    padded[: dy.shape[0]] = dy
    everyone = gather_equal(padded.view(torch.uint8), len(bags), group).view(dy.dtype)  # not every backend knows every dtype
    if min(bags) == most:
        return everyone
    return torch.cat([everyone[rank * most : rank * most + count] for rank, count in enumerate(bags)])
