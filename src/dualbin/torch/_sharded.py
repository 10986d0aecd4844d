"""A table too large for one rank: its rows are partitioned over the ranks, and a batch fetches those it needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualbin._checks import INDEPENDENT, check_initial_scale, check_int, check_padding_idx, check_planes, check_spread
from dualbin._schema import packed_width
from dualbin.torch import _native_call
from dualbin.torch._distributed import Group, check_initialised, gather_equal
from dualbin.torch._ids import check_ids
from dualbin.torch._row_grad import RowGrad, row_gradient
from dualbin.torch._state_bits import plain
from dualbin.torch._table import BinaryTable, accept_any_grad_dtype
from dualbin.torch._table_checks import check_dtype, clear_padding_bits
from dualbin.torch._table_module import TableModule, fill_magnitudes, fill_random, planes_option

#: rows of a new table that one seed fills, so that its bits do not depend on the number of ranks
_SEED_ROWS = 4096


class ShardedBinaryEmbedding(TableModule):
    """A :class:`BinaryEmbedding` whose rows are partitioned over the ranks of a process group.

    Rank r holds rows `[r * ceil(V/world), (r + 1) * ceil(V/world))` as its `weight`, a :class:`BinaryTable` with `first_row`, and trains
    them with its own :class:`XOR`. A lookup sends the ids to the ranks that hold their rows and gets the rows back; the backward pass sends
    the gradients of the rows there. So every rank must call the module equally often, forward and backward, with no ids where it has none.
    A rank holds its share of the table and its state, the rows of its batch, and those that others ask it for.

    Gradients arrive averaged over the ranks, as DDP does with other parameters, and in the order of the joined batch: every bit becomes
    what it becomes in one process that holds the whole table and sees the batches of all ranks one after the other.
    :func:`sync_row_grads` leaves it alone. Clip only the other parameters: a rank knows the norm of its own rows only (and with
    `norm="rms"` the size of a row's gradient does not matter anyway). In place of GradScaler use
    `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler`, which agrees on infinities.

    The state_dict has `weight.bits` and `weight.scale` as DTensors with `Shard(0)` over the group, which torch.distributed.checkpoint saves
    and loads with any number of ranks; see :class:`XORCheckpoint` for the optimizer. `load_state_dict` also takes the plain tensors of this
    shard, or of the whole table, of which it copies its own rows.

    Args:
        num_embeddings: V, the number of rows of the whole table; every rank must get at least one.
        embedding_dim: D.
        process_group: the ranks that share the table; None takes all.
        padding_idx, device, dtype, scale, spread, planes: as in :class:`BinaryEmbedding`; padding_idx is a row of the whole table.
        generator: source of the seed of the random bits; that of the group's first rank counts. A table has the same bits for every
            number of ranks.

    Shape:
        ids int32 or int64 of any shape, in [0, V); output `ids.shape + (D,)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
        RuntimeError: torch.distributed has not been initialised.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        process_group: Group = None,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
        scale: float = 0.3,
        spread: float = 0.5,
        planes: int = 1,
    ) -> None:
        check_initialised("ShardedBinaryEmbedding")
        rows = check_int("num_embeddings", num_embeddings, low=1)
        dim = check_int("embedding_dim", embedding_dim, low=1)
        dtype = check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        padding_idx = check_padding_idx(padding_idx, rows)
        scale = check_initial_scale(scale)
        different = check_spread(spread)
        first, last = shard_range(rows, dist.get_rank(process_group), dist.get_world_size(process_group))
        bits = _native_call.fresh((last - first, check_planes(planes) * packed_width(dim)), torch.uint8, device)
        scales = _native_call.fresh((last - first, 1), torch.float32, bits.device)
        self._setup(BinaryTable._wrap(bits, scales, dim, dtype, first), padding_idx, scale, different)
        self.num_embeddings, self.process_group = rows, process_group
        if not bits.is_meta:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New random bits on all ranks, which must all call it; every scale and the spread of the bits as given to the
        constructor, the padding row's scale 0.
        """
        table: Any = self.weight
        seed = [int(torch.randint(2**62, (1,), generator=generator, device=generator.device if generator is not None else "cpu"))]
        dist.broadcast_object_list(seed, group=self.process_group, group_src=0)  # wherever the group can send, the table may be elsewhere
        with torch.no_grad():
            _fill_rows(table.bits, self.embedding_dim, table.first_row, seed[0], self._spread)
            clear_padding_bits(table.bits, self.embedding_dim)
            table.scale.fill_(self._initial_scale)
            if (padding := self._local_padding()) >= 0:
                table.scale[padding] = 0

    @torch._disable_dynamo  # the numbers of rows to exchange are no part of a graph
    def forward(self, input: Tensor) -> Tensor:
        table: Any = self.weight
        with torch._C.DisableTorchFunctionSubclass():
            exchange, local_ids = _exchange_ids(table, input, self.num_embeddings, self.process_group)
            accept_any_grad_dtype(table)
            rows = _ShardedLookup.apply(table, local_ids, exchange, self._local_padding())
        return rows.reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        table: Any = self.weight
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        padding += planes_option(table)
        here = f"rows={table.first_row}..{table.first_row + table.shape[0] - 1}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={table.dtype}, {here}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedBinaryEmbedding:
        """A copy on the same ranks: a process group cannot be copied."""
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        memo[id(self.process_group)] = self.process_group
        duplicate.__dict__ = copy.deepcopy(self.__dict__, memo)
        return duplicate

    def _local_padding(self) -> int:
        """The padding row's place in this shard, -1 if it is elsewhere."""
        table: Any = self.weight
        if self.padding_idx is None or not 0 <= self.padding_idx - table.first_row < table.shape[0]:
            return -1
        return self.padding_idx - table.first_row

    # ---- state_dict --------------------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in (prefix + "weight.bits", prefix + "weight.scale"):
            destination[key] = as_dtensor(plain(destination[key]), self.num_embeddings, self.process_group)

    def _load_table(self, keys: tuple[str, str], state_dict: Mapping[str, Any], assign: bool, error_msgs: list[str]) -> None:
        mine = {key: self._rows_here(state_dict[key]) for key in keys}
        super()._load_table(keys, mine, assign, error_msgs)

    def _rows_here(self, array: Any) -> Any:
        """This shard's rows, from a DTensor or the whole table; anything else as it is."""
        if hasattr(array, "to_local"):
            array = array.to_local()
        table: Any = self.weight
        if isinstance(array, Tensor) and array.ndim == 2 and array.shape[0] == self.num_embeddings:
            return array[table.first_row : table.first_row + table.shape[0]]
        return array


def shard_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [first, last) of a rank: `ceil(rows / world)` each, fewer on the last one.

    Raises:
        ValueError: a rank would get none.
    """
    share = -(-rows // world)
    if share * (world - 1) >= rows:
        msg = f"num_embeddings must give each of {world} ranks a row: with {rows} rows, {share} a rank, the last rank gets none"
        raise ValueError(msg)
    return rank * share, min(rows, (rank + 1) * share)


def as_dtensor(local: Tensor, rows: int, group: Group) -> Tensor:
    """This rank's part of an array `[rows, ...]` as a DTensor over the group; the memory is shared."""
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415  (slow to import, and only needed to save)
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    mesh = DeviceMesh.from_group(dist.group.WORLD if group is None else group, local.device.type)  # type: ignore[arg-type]
    shape = torch.Size((rows, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _fill_rows(bits: Tensor, dim: int, first_row: int, seed: int, spread: int) -> None:
    """Random bits for the rows from `first_row` on, which depend on the seed and the row's place in the whole table only."""
    generator = torch.Generator(bits.device)
    pattern = None
    if spread != INDEPENDENT:  # no block has the seed before that of the first
        pattern = torch.empty_like(bits[:1, : packed_width(dim)]).random_(0, 256, generator=generator.manual_seed((seed - 1) % 2**63))
    last_row = first_row + bits.shape[0]
    for start in range(first_row - first_row % _SEED_ROWS, last_row, _SEED_ROWS):
        generator.manual_seed((seed + start) % 2**63)
        block = torch.empty(_SEED_ROWS, bits.shape[1], dtype=torch.uint8, device=bits.device)
        fill_random(block[:, : packed_width(dim)], pattern, spread, generator)
        fill_magnitudes(block, dim, generator)
        low, high = max(start, first_row), min(start + _SEED_ROWS, last_row)
        bits[low - first_row : high - first_row] = block[low - start : high - start]


# ---- a lookup ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exchange:
    """Who sends how many rows to whom in one lookup."""

    order: Tensor  #: positions of this rank's ids, sorted by the rank that holds the row
    asked: list[int]  #: ids that this rank sends to each rank
    served: list[int]  #: ids that each rank sends here
    anywhere: bool  #: whether any rank has ids at all
    group: Group

    def to_owners(self, array: Tensor) -> Tensor:
        """Entries of this rank's batch to the ranks that hold their rows; what comes in is in the order of the ranks."""
        return _all_to_all(array.index_select(0, self.order), self.asked, self.served, self.group)

    def from_owners(self, array: Tensor) -> Tensor:
        """The reverse."""
        sorted_rows = _all_to_all(array, self.served, self.asked, self.group)
        return torch.empty_like(sorted_rows).index_copy_(0, self.order, sorted_rows)


class _ShardedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: BinaryTable, ids: Tensor, exchange: _Exchange, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.exchange, ctx.padding = table.shape, exchange, padding
        rows = torch.empty(ids.numel(), table.shape[1], dtype=table.dtype, device=table.device)
        _native_call.lookup(table.bits, table.scale, table.shape[1], ids, rows)
        return exchange.from_owners(rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[RowGrad | None, None, None, None]:
        if torch.is_grad_enabled() and dy.requires_grad:
            msg = "create_graph=True is not supported by ShardedBinaryEmbedding: rows that travel between ranks leave the graph. Use a "
            msg += "BinaryEmbedding, whole on every rank, or leave this table out of what is differentiated twice"
            raise NotImplementedError(msg)
        if not ctx.exchange.anywhere:  # no rank has rows: not a step
            return None, None, None, None
        (ids,) = ctx.saved_tensors
        rows = ctx.exchange.to_owners(dy) / len(ctx.exchange.asked)
        return row_gradient(ids, rows, ctx.shape, ctx.padding, own=True), None, None, None


@torch.no_grad()
def _exchange_ids(table: BinaryTable, ids: Tensor, rows: int, group: Group) -> tuple[_Exchange, Tensor]:
    """How the rows of `ids` travel, and the ids that other ranks want from this shard, counted from its first row."""
    check_ids(ids, table.device)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-rows // world)
    flat = ids.reshape(-1).long()
    bad = (flat < 0) | (flat >= rows)
    owners = flat.div(share, rounding_mode="floor").masked_fill(bad, world)  # the last count is that of the bad ids
    order = owners.argsort(stable=True)
    counts = owners.bincount(minlength=world + 1)
    by_rank = gather_equal(counts.unsqueeze(0), world, group).tolist()
    _refuse_bad_ids(flat, bad, [numbers[world] for numbers in by_rank], rows, rank)
    asked, served = by_rank[rank][:world], [numbers[rank] for numbers in by_rank]
    exchange = _Exchange(order, asked, served, any(map(any, by_rank)), group)
    return exchange, exchange.to_owners(flat) - rank * share


def _refuse_bad_ids(ids: Tensor, bad: Tensor, bad_by_rank: list[int], rows: int, rank: int) -> None:
    """Raise on every rank if there are bad ids on any, so that none is left waiting."""
    if not any(bad_by_rank):
        return
    if bad_by_rank[rank]:
        position = int(bad.nonzero()[0])
        msg = f"ids must be in [0, {rows}), the rows of the table, got {int(ids[position])} at position {position}"
    else:
        msg = f"ids must be in [0, {rows}), the rows of the table; rank {next(r for r, n in enumerate(bad_by_rank) if n)} has others"
    raise IndexError(msg)


def _all_to_all(array: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """`sent[r]` entries of `array` to every rank r. They travel as bytes: not every backend knows every dtype."""
    out = array.new_empty(sum(received), *array.shape[1:])
    dist.all_to_all_single(_bytes(out), _bytes(array.contiguous()), received, sent, group=group)
    return out


def _bytes(array: Tensor) -> Tensor:
    return array.reshape(array.shape[0], -1).view(torch.uint8) if array.numel() else array.new_empty(0, dtype=torch.uint8)
