"""The memory of n-grams: a module in front of a language model, or between its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualbin._checks import check_dim, check_projection, check_rows
from dualbin._ngrams import NGrams
from dualbin.torch._module import BinaryEmbedding
from dualbin.torch._ngram import next_context, ngram_rows
from dualbin.torch._sharded import PrefetchedIds, ShardedBinaryEmbedding


class NGramEmbedding(nn.Module):
    """Token ids in, rows of hashed n-grams out: a large table that a model reads a few rows of for every token.

    A position gets a row for every order and head (:class:`dualbin.NGrams`), side by side, and with a projection their product with a
    matrix. The rows are in the module `embed`, a :class:`BinaryEmbedding`; train `memory.embed.weight` with :class:`XOR` and the rest with
    the dense optimizer.

    Hashing is plain tensor operations on the tokens, which `torch.compile` fuses. The state_dict has what `embed` has, `projection`, and
    `_extra_state`, the numbers of `ngrams`: a state of another hash is refused.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: D, weights in a row.
        orders, heads, boundary, seed: as in :class:`dualbin.NGrams`.
        projection: multiply the P rows of a position by the parameter `projection` [P * D, W]: an output width W of at least 1, or True for
            P * D. It starts normal with standard deviation 1/sqrt(P * D), and belongs to the dense optimizer.
        device, dtype, generator, scale, spread, planes: as in :class:`BinaryEmbedding`; a random projection takes the generator after the
            bits.

    Shape:
        ids int32 or int64 `[..., T]`; output `[..., T, P * D]`, with a projection `[..., T, W]`; P is orders times heads.

    Attributes:
        ngrams: the :class:`dualbin.NGrams`.
        embed: the module that holds the rows.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    projection: nn.Parameter
    _projects = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        orders: tuple[int, ...] = (2, 3),
        heads: int = 4,
        boundary: int | None = None,
        seed: int = 0,
        projection: bool | int = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        scale: float = 0.3,
        spread: float = 0.5,
        planes: int = 1,
    ) -> None:
        super().__init__()
        rows = check_rows("num_embeddings", num_embeddings, check_dim("embedding_dim", embedding_dim))
        ngrams = NGrams.of_table("num_embeddings", rows, orders, heads, boundary, seed)
        width = check_projection(projection, embedding_dim * len(ngrams.parts))
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "generator": generator,
            "scale": scale,
            "spread": spread,
            "planes": planes,
        }
        self._setup(BinaryEmbedding(rows, embedding_dim, **options), ngrams, width, generator)

    @classmethod
    def from_embedding(
        cls,
        embed: nn.Embedding | ShardedBinaryEmbedding,
        *,
        orders: tuple[int, ...] = (2, 3),
        heads: int = 4,
        boundary: int | None = None,
        seed: int = 0,
        projection: bool | int = False,
        generator: torch.Generator | None = None,
    ) -> NGramEmbedding:
        """A memory whose rows are those of a module that there is: of several ranks, of a trained table, or of floats.

        With a :class:`ShardedBinaryEmbedding` every rank hashes its own tokens, and the rows travel as those of any lookup of it do.

        Args:
            embed: a :class:`BinaryEmbedding` or nn.Embedding without padding row and projection, or a :class:`ShardedBinaryEmbedding`.
            orders, heads, boundary, seed, projection: as in the constructor.
            generator: source of a random projection.

        Raises:
            TypeError, ValueError: an argument has the wrong type or value.
        """
        if not isinstance(embed, nn.Embedding | ShardedBinaryEmbedding):
            msg = f"embed must be a BinaryEmbedding, a ShardedBinaryEmbedding or an nn.Embedding, got a {type(embed).__name__}"
            raise TypeError(msg)
        if embed.padding_idx is not None:
            msg = f"embed must have no padding row, since n-grams are hashed to every row, got padding_idx={embed.padding_idx}"
            raise ValueError(msg)
        if getattr(embed, "projection", None) is not None:
            msg = "embed must have no projection of its own: give projection= to from_embedding, for the rows of all heads together"
            raise ValueError(msg)
        ngrams = NGrams.of_table("embed", embed.num_embeddings, orders, heads, boundary, seed)
        width = check_projection(projection, embed.embedding_dim * len(ngrams.parts))
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._setup(embed, ngrams, width, generator)
        return self

    def _setup(self, embed: nn.Module, ngrams: NGrams, width: int | None, generator: torch.Generator | None) -> None:
        self.ngrams, self.embed = ngrams, embed
        if width is not None:
            weight: Any = embed.weight
            inputs = weight.shape[1] * len(ngrams.parts)
            self.projection = nn.Parameter(torch.empty(inputs, width, dtype=weight.dtype, device=weight.device))
            self._projects = True
            self._reset_projection(generator)

    def forward(self, ids: Tensor | PrefetchedIds, context: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """The memory of a text, or of ids that :meth:`prefetch` was given; arguments and errors are those of :meth:`rows`."""
        if isinstance(ids, PrefetchedIds):
            for name, value in (("context", context), ("starts", starts)):
                if value is not None:
                    msg = f"{name} belongs to prefetch, which has hashed the ids: leave it out here"
                    raise ValueError(msg)
            rows: Any = ids
        else:
            rows = self.rows(ids, context, starts)
        found = self.embed(rows).flatten(-2)
        return found @ self.projection if self._projects else found

    def rows(self, ids: Tensor, context: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """The rows of `embed` that a text has, int64 `[..., T, P]`: :func:`ngram_rows`."""
        return ngram_rows(ids, self.ngrams, context, starts)

    def next_context(self, ids: Tensor, context: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """What a decoder keeps: the `context` of the tokens after `ids`, int64 `[..., longest - 1]`.

        `memory(ids[:, :5])` and then `memory(ids[:, 5:], context=memory.next_context(ids[:, :5]))` are `memory(ids)`, bit for bit but for
        the product with a projection. Arguments and errors are those of :meth:`rows`.
        """
        return next_context(ids, self.ngrams, context, starts)

    def prefetch(self, ids: Tensor, context: Tensor | None = None, starts: Tensor | None = None) -> PrefetchedIds:
        """Begin the exchange of the next batch's rows, as a ShardedBinaryEmbedding does; arguments are those of :meth:`rows`.

        Raises:
            TypeError: the rows are not in a ShardedBinaryEmbedding.
        """
        if not isinstance(self.embed, ShardedBinaryEmbedding):
            msg = f"prefetch needs ids that travel: embed must be a ShardedBinaryEmbedding, it is a {type(self.embed).__name__}"
            raise TypeError(msg)
        return self.embed.prefetch(self.rows(ids, context, starts))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New random rows and projection."""
        embed: Any = self.embed
        if isinstance(embed.weight, nn.Parameter) and type(embed) is nn.Embedding:
            embed.reset_parameters()
        else:
            embed.reset_parameters(generator)
        if self._projects:
            self._reset_projection(generator)

    def extra_repr(self) -> str:
        ngrams = self.ngrams
        options = f"orders={ngrams.orders}, heads={ngrams.heads}"
        options += "" if ngrams.boundary is None else f", boundary={ngrams.boundary}"
        options += f", seed={ngrams.seed}" if ngrams.seed else ""
        return options + (f", projection={self.projection.shape[1]}" if self._projects else "")

    def _reset_projection(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.projection, std=self.projection.shape[0] ** -0.5, generator=generator)

    # ---- state_dict: also what is hashed -----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.ngrams.fingerprint())

    def set_extra_state(self, state: Tensor) -> None:
        """Checked before anything is loaded."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = state_dict.get(prefix + "_extra_state")
        mine = self.ngrams.fingerprint()
        if state is not None and (not isinstance(state, Tensor) or state.tolist() != mine):
            got = state.tolist() if isinstance(state, Tensor) else state
            error_msgs.append(
                f"{prefix}_extra_state: the state_dict is of other n-grams, whose rows mean something else: this memory has "
                f"[version, rows, heads, boundary or -1, seed, *orders] {mine}, the state_dict's {got}."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
