"""Several tables of one width, partitioned over the ranks, whose lookups are one exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_int
from dualbin.torch._distributed import Group, check_initialised, check_same_on_all_ranks
from dualbin.torch._ids import check_ids
from dualbin.torch._sharded import PrefetchedIds, ShardedBinaryEmbedding


class ShardedBinaryEmbeddingCollection(ShardedBinaryEmbedding):
    """Several tables of one width, in the memory of one :class:`ShardedBinaryEmbedding`: a lookup in all of them is one exchange, and their
    training one update.

    The rows of the tables stand one after the other in `weight`, and the ranks have equal shares of them all. So a rank may hold all of a
    small table; each rank asks it for a row once, however often its batch has it.

    Args:
        tables: name -> number of rows.
        embedding_dim: D, that of all tables.
        process_group, device, dtype, generator, scale, spread, planes, grad_dtype, capacity: as in :class:`ShardedBinaryEmbedding`, for
            all tables together.

    Attributes:
        tables: as above.
        first_rows: name -> the row of `weight`, counted over all ranks, where the table begins.

    Shape:
        ids, a mapping of names to int32 or int64 of any shape, in [0, rows of the table); output a dict with the same names in the same
        order, `ids.shape + (D,)` each. Names may be left out.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or another one than on another rank.
        RuntimeError: torch.distributed has not been initialised.
    """

    def __init__(
        self,
        tables: Mapping[str, int],
        embedding_dim: int,
        process_group: Group = None,
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
        check_initialised("ShardedBinaryEmbeddingCollection")
        if not isinstance(tables, Mapping) or not tables:
            msg = f"tables must be a mapping of names to numbers of rows, got {tables!r}"
            raise TypeError(msg)
        rows = {str(name): check_int(f"tables[{name!r}]", count, low=1) for name, count in tables.items()}
        check_same_on_all_ranks({"tables": rows}, process_group)  # the same number of rows might be that of other tables
        starts, total = {}, 0
        for name, count in rows.items():
            starts[name] = total
            total += count
        super().__init__(
            total,
            embedding_dim,
            process_group,
            device=device,
            dtype=dtype,
            generator=generator,
            scale=scale,
            spread=spread,
            planes=planes,
            grad_dtype=grad_dtype,
            capacity=capacity,
        )
        self.tables, self.first_rows = rows, starts
        self._places: tuple[Any, tuple[Tensor, Tensor]] | None = None  #: of the last form of a batch: see `_places_of`

    @torch._disable_dynamo
    def forward(self, input: Mapping[str, Tensor] | PrefetchedIds) -> dict[str, Tensor]:  # type: ignore[override]
        ids = input if isinstance(input, PrefetchedIds) else self.prefetch(input, early=False)
        try:
            rows = super().forward(ids)
        except IndexError:
            self._refuse_bad_ids(ids)
            raise
        parts = rows.split([shape.numel() for shape in ids.shapes.values()])
        return {name: part.reshape(*shape, self.embedding_dim) for part, (name, shape) in zip(parts, ids.shapes.items(), strict=True)}

    @torch._disable_dynamo
    def prefetch(self, input: Mapping[str, Tensor], *, early: bool = True) -> PrefetchedIds:  # type: ignore[override]
        """As :meth:`ShardedBinaryEmbedding.prefetch`, of the ids of all tables; it has their `shapes` by name."""
        table: Any = self.weight
        if not isinstance(input, Mapping):
            msg = f"input must be a mapping of names of tables to ids, or what prefetch returned, got a {type(input).__name__}"
            raise TypeError(msg)
        for name, ids in input.items():
            if name not in self.tables:
                msg = f"input must have names of tables, {list(self.tables)}, got {name!r}"
                raise ValueError(msg)
            check_ids(ids, table.device, name=f"input[{name!r}]")
        shapes = {name: ids.shape for name, ids in input.items()}
        nothing = torch.empty(0, dtype=torch.int64, device=table.device)
        flat = torch.cat([nothing, *(ids.reshape(-1).long() for ids in input.values())])
        started = super().prefetch(self._rows(flat, shapes), early=early)
        return PrefetchedIds(started.shape, started._exchange, started._started, shapes, flat)

    def _rows(self, flat: Tensor, shapes: Mapping[str, torch.Size]) -> Tensor:
        """The rows of `weight` that ids mean. Bad ids, which may be rows of another table, become bad rows."""
        first, rows = self._places_of(shapes, flat.device)
        return torch.where(flat < 0, flat, torch.where(flat < rows, flat + first, flat - rows + self.num_embeddings))

    def _places_of(self, shapes: Mapping[str, torch.Size], device: torch.device) -> tuple[Tensor, Tensor]:
        """Of every id of a batch, where its table begins and how many rows it has; kept, since batches tend to have one form."""
        form = (device, *shapes.items())
        if self._places is None or self._places[0] != form:
            counts = torch.tensor([shape.numel() for shape in shapes.values()], dtype=torch.int64)
            values = [[where[name] for name in shapes] for where in (self.first_rows, self.tables)]
            first, rows = (torch.tensor(each, dtype=torch.int64).repeat_interleave(counts).to(device) for each in values)
            self._places = form, (first, rows)
        return self._places[1]

    def _refuse_bad_ids(self, given: PrefetchedIds) -> None:
        """Name the table and the id, if this rank has a bad one."""
        parts = given._flat.split([shape.numel() for shape in given.shapes.values()])
        for name, ids in zip(given.shapes, parts, strict=True):
            rows = self.tables[name]
            if (bad := ((ids < 0) | (ids >= rows)).nonzero()).numel():
                position = int(bad[0])
                msg = f"input[{name!r}] must be in [0, {rows}), the rows of the table, got {int(ids[position])} at position {position}"
                raise IndexError(msg) from None
