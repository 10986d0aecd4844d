"""A table too large for one rank: its rows are partitioned over the ranks, and a batch fetches those it needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualbin._checks import (
    INDEPENDENT,
    check_int,
)
from dualbin._schema import packed_width
from dualbin.torch import _native_call
from dualbin.torch._distributed import Group, check_initialised, check_same_on_all_ranks
from dualbin.torch._exchange import Asked, Exchange, Route
from dualbin.torch._ids import check_ids
from dualbin.torch._row_grad import RowGrad, row_gradient
from dualbin.torch._state_bits import plain
from dualbin.torch._table import BinaryTable, accept_any_grad_dtype
from dualbin.torch._table_checks import clear_padding_bits
from dualbin.torch._table_module import TableModule, fill_magnitudes, fill_random, planes_option

#: rows of a new table that one seed fills, so that its bits do not depend on the number of ranks
_SEED_ROWS = 4096


class ShardedTable(TableModule):
    """What the modules share whose rows are partitioned over the ranks of a process group."""

    grad_dtype: torch.dtype
    process_group: Group

    def _make_shard(
        self,
        num_embeddings: int,
        embedding_dim: int,
        process_group: Group,
        padding_idx: int | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
        scale: float,
        spread: float,
        planes: int,
        grad_dtype: torch.dtype,
        options: Mapping[str, Any],
    ) -> None:
        """Check the constructor's arguments and make a shard of random bits; `options` are others that all ranks must have alike."""
        if grad_dtype not in {torch.float32, torch.bfloat16}:
            msg = f"grad_dtype must be torch.float32 or torch.bfloat16, got {grad_dtype!r}"
            raise TypeError(msg)

        def part(rows: int) -> tuple[int, int]:
            return shard_range(rows, dist.get_rank(process_group), dist.get_world_size(process_group))

        self._allocate((num_embeddings, embedding_dim), padding_idx, device, dtype, scale, spread, planes, part)
        self.process_group, self.grad_dtype = process_group, grad_dtype
        table: Any = self.weight
        if not table.bits.is_meta:
            shape = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
            alike: dict[str, Any] = {**shape, "planes": planes, "grad_dtype": grad_dtype}
            check_same_on_all_ranks({**alike, **options}, process_group)
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

    def extra_repr(self) -> str:
        table: Any = self.weight
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        padding += planes_option(table)
        padding += self._more_repr()
        here = f"rows={table.first_row}..{table.first_row + table.shape[0] - 1}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={table.dtype}, {here}"

    def _more_repr(self) -> str:
        return ""

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTable:
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


class ShardedBinaryEmbedding(ShardedTable):
    """A :class:`BinaryEmbedding` whose rows are partitioned over the ranks of a process group.

    Rank r holds rows `[r * ceil(V/world), (r + 1) * ceil(V/world))` as its `weight`, a :class:`BinaryTable` with `first_row`, and trains
    them with its own :class:`XOR`. A lookup sends the distinct ids to the ranks that hold their rows and gets the rows back, packed; the
    backward pass sums the gradient by row and sends the sums there. So every rank must call the module equally often, forward and backward,
    with no ids where it has none. A rank holds its share of the table and its state, the rows of its batch, and those that others ask for.

    Gradients arrive averaged over the ranks, as DDP does with other parameters: each rank sums its rows by id, divides by the number of
    ranks and rounds to `grad_dtype`; the sums are added in the order of the ranks. So no bit depends on the backend, and another number of
    ranks, or one process with the joined batch, differs by rounding only. :func:`sync_row_grads` leaves the table alone. Clip only the
    other parameters: a rank knows the norm of its own rows only (and with `norm="rms"` the size of a row's gradient does not matter
    anyway). In place of GradScaler use `torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler`, which agrees on infinities.

    Without a capacity the host reads once in a lookup how many rows travel. With `capacity` it reads nothing, so that forward, backward and
    `XOR(capturable=True).step()` can be captured in a CUDA graph, after one step outside it. What does not fit has rows of NaN, as bad ids
    have then on every device; both are counted, and :func:`check_errors` raises for them. Every lookup with a backward pass is a step then,
    also where no rank has ids.

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
        grad_dtype: torch.float32, or torch.bfloat16 for half the bytes: what sums of gradients are rounded to before they travel.
        capacity: distinct rows that a rank can ask of each rank in one lookup; None: any number. So many travel in every lookup, used or
            not. Multiples of 4 are fastest.

    Shape:
        ids int32 or int64 of any shape, in [0, V); output `ids.shape + (D,)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or another one than on another rank.
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
        grad_dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
    ) -> None:
        check_initialised("ShardedBinaryEmbedding")
        if capacity is not None:
            share = -(-check_int("num_embeddings", num_embeddings, low=1) // dist.get_world_size(process_group))
            capacity = check_int("capacity", capacity, low=1, high=share)
        shape, options = (num_embeddings, embedding_dim), {"capacity": capacity}
        self._make_shard(*shape, process_group, padding_idx, device, dtype, generator, scale, spread, planes, grad_dtype, options)
        self.capacity = capacity
        self._exchange = Exchange(self.num_embeddings, process_group, capacity)

    @torch._disable_dynamo  # the numbers of rows to exchange are no part of a graph
    def forward(self, input: Tensor | PrefetchedIds) -> Tensor:
        table: Any = self.weight
        ids = input if isinstance(input, PrefetchedIds) else self._start(input, early=False)
        if ids._exchange is not self._exchange:
            msg = "input must be ids, or those that this module has prefetched; got what another module's prefetch returned"
            raise ValueError(msg)
        with torch._C.DisableTorchFunctionSubclass():
            accept_any_grad_dtype(table)
            rows = _ShardedLookup.apply(table, ids._finish(), self._local_padding(), self.grad_dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)

    @torch._disable_dynamo
    def prefetch(self, input: Tensor, *, early: bool = True) -> PrefetchedIds:
        """Start the exchange of the ids of a later batch, which :meth:`forward` takes in their place: then it need not wait for numbers.

        Every rank must call it equally often, and in the same order among its lookups. The rows are read by `forward`, so updates between
        the two are seen. The ids may be changed afterwards.

        Args:
            input: as ids of :meth:`forward`.
            early: False where `forward` follows at once.

        Returns:
            What to give to :meth:`forward` of this module, once or several times; it has the `shape` of the ids.
        """
        return self._start(input, early)

    def _start(self, input: Tensor, early: bool) -> PrefetchedIds:
        table: Any = self.weight
        with torch._C.DisableTorchFunctionSubclass():
            check_ids(input, table.device)
            return PrefetchedIds(input.shape, self._exchange, self._exchange.start(input, early=early))

    def _more_repr(self) -> str:
        return "" if self.capacity is None else f", capacity={self.capacity}"


class PrefetchedIds:
    """Ids whose exchange has begun; `prefetch` of :class:`ShardedBinaryEmbedding` and its collections makes them.

    Attributes:
        shape: of the ids, of all tables together in a collection.
        shapes: of a collection, name -> shape.
    """

    def __init__(
        self,
        shape: torch.Size,
        exchange: Exchange,
        started: Asked | Route,
        shapes: Mapping[str, torch.Size] | None = None,
        flat: Tensor | None = None,
    ) -> None:
        self.shape, self._exchange, self._started = shape, exchange, started
        self.shapes: Mapping[str, torch.Size] = shapes or {}
        self._flat: Any = flat  #: the ids of a collection as they were given

    def _finish(self) -> Route:
        self._started = route = self._exchange.finish(self._started)
        return route


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


class _ShardedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: BinaryTable, route: Route, padding: int, grad_dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.route, ctx.padding, ctx.grad_dtype = table.shape, route, padding, grad_dtype
        bits, scale = route.fetch(table.bits, table.scale)
        rows = torch.empty(route.slots.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
        if rows.shape[0]:  # else no row may have arrived, and there is no table without rows
            _native_call.lookup_fresh(bits, scale, table.shape[1], route.slots, rows)
        return rows

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[RowGrad | None, None, None, None]:
        check_once_differentiable(dy)
        route = ctx.route
        if not route.anywhere:  # no rank has rows: not a step
            return None, None, None, None
        return rows_gradient(route.wanted, route.send_sums(dy, ctx.grad_dtype), ctx.shape, ctx.padding), None, None, None


def check_once_differentiable(dy: Tensor) -> None:
    """Raise if the backward pass is to be part of a graph."""
    if torch.is_grad_enabled() and dy.requires_grad:
        msg = (
            "create_graph=True is not supported by ShardedBinaryEmbedding and its kin: rows that travel between ranks leave the graph. Use "
        )
        msg += "a BinaryEmbedding, whole on every rank, or leave this table out of what is differentiated twice"
        raise NotImplementedError(msg)


def rows_gradient(ids: Tensor, rows: Tensor, shape: Sequence[int], padding: int) -> RowGrad:
    """The gradient of a shard from what came in for its rows `ids`. Numbers beyond the shard, of unused slots, are left out; on a GPU,
    where nobody waits for their number, the update does that.
    """
    if ids.is_cpu and ids.numel() and int(ids.max()) >= shape[0]:
        used = ids < shape[0]
        ids, rows = ids[used], rows[used]
    if padding < 0:  # the rows are nobody else's, and nobody writes the ids of a route
        return RowGrad._wrap(ids, rows, shape)
    return row_gradient(ids, rows, shape, padding, own=True)
