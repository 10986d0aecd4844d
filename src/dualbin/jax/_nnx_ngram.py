"""The memory of n-grams for flax nnx."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

try:
    from flax import nnx
except ImportError as error:
    _MESSAGE = "dualbin.jax.NGramEmbed needs flax: pip install 'flax>=0.12'"
    raise ImportError(_MESSAGE) from error

from dualbin._checks import check_dim, check_projection, check_rows
from dualbin._ngrams import NGrams
from dualbin.jax._ngram import next_context, ngram_rows
from dualbin.jax._nnx import BinaryEmbed


class NGramEmbed(nnx.Module):
    """Token ids in, rows of hashed n-grams out: a large table that a model reads a few rows of for every token.

    A position gets a row for every order and head (:class:`dualbin.NGrams`), side by side, and with a projection their product with a
    matrix. The rows, those of `dualbin.torch.NGramEmbedding`, are in the module `embed`, a :class:`BinaryEmbed`. What a step reads of it is
    declared by :meth:`rows`::

        dbj.value_and_grad(loss_fn, ids=lambda params, batch: {"memory.embed.table": dbj.ngram_rows(batch["ids"], ngrams)})

    with `ngrams = model.memory.ngrams`.

    Args:
        num_embeddings: V, rows of the table; above 2**31 - 1 with jax_enable_x64 only.
        features: D, weights in a row.
        orders, heads, boundary, seed: as in :class:`dualbin.NGrams`.
        projection: multiply the P rows of a position by the `nnx.Param` `projection`, float32 [P * D, W]: an output width W of at least 1,
            or True for P * D. It starts normal with standard deviation 1/sqrt(P * D), and belongs to the dense optimizer.
        dtype, scale, spread, planes: as in :class:`BinaryEmbed`.
        rngs: its stream `params` gives the key of the table, and then that of the projection.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        orders: tuple[int, ...] = (2, 3),
        heads: int = 4,
        boundary: int | None = None,
        seed: int = 0,
        projection: bool | int = False,
        dtype: Any = jnp.float32,
        scale: float = 0.3,
        spread: float = 0.5,
        planes: int = 1,
        rngs: nnx.Rngs,
    ) -> None:
        rows = check_rows("num_embeddings", num_embeddings, check_dim("features", features))
        self.ngrams = NGrams.of_table("num_embeddings", rows, orders, heads, boundary, seed)
        inputs = features * len(self.ngrams.parts)
        width = check_projection(projection, inputs)
        self.embed = BinaryEmbed(rows, features, dtype=dtype, scale=scale, spread=spread, planes=planes, rngs=rngs)
        self.projects = width is not None
        if width is not None:
            self.projection = nnx.Param(jax.random.normal(rngs.params(), (inputs, width), jnp.float32) * inputs**-0.5)

    def __call__(self, inputs: Any, context: Any = None, starts: Any = None) -> Array:
        """The memory of a text `inputs` `[..., T]`: `[..., T, P * D]`, with a projection `[..., T, W]`.

        Arguments and errors are those of :func:`dualbin.jax.ngram_rows`, whose `ids` are called `inputs` here.
        """
        found = self.embed(self.rows(inputs, context, starts))
        found = found.reshape(*found.shape[:-2], found.shape[-2] * found.shape[-1])
        return found @ self.projection.get_value().astype(found.dtype) if self.projects else found

    def rows(self, inputs: Any, context: Any = None, starts: Any = None) -> Array:
        """The rows of `embed` that a text has, `[..., T, P]`: :func:`dualbin.jax.ngram_rows`."""
        return ngram_rows(inputs, self.ngrams, context, starts)

    def next_context(self, inputs: Any, context: Any = None, starts: Any = None) -> Array:
        """What a decoder keeps: the `context` of the tokens after `inputs`, `[..., longest - 1]`; see `dualbin.torch.NGramEmbedding`."""
        return next_context(inputs, self.ngrams, context, starts)
