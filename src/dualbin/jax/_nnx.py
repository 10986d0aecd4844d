"""A module for flax nnx."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

try:
    from flax import nnx
except ImportError as error:
    _MESSAGE = "dualbin.jax.BinaryEmbed needs flax: pip install 'flax>=0.12'"
    raise ImportError(_MESSAGE) from error

from dualbin._checks import check_dim, check_projection, check_rows
from dualbin.jax._attend import attend
from dualbin.jax._table import BinaryTable, check_dtype, lookup


class BinaryEmbed(nnx.Module):
    """`flax.nnx.Embed` with one bit a weight, or as many as `planes` says.

    The parameter `table` is an `nnx.Param` with a :class:`BinaryTable` in it. To train, split the model and differentiate with
    respect to its state, in which the table has the path of this module and "table"::

        graphdef, params = nnx.split(model, nnx.Param)
        loss, grads = dbj.value_and_grad(lambda params, batch: loss_of(nnx.merge(graphdef, params), batch),
                                         ids=lambda params, batch: {"embed.table": batch["ids"]})(params, batch)
        optimizer.update(model, grads)                       # an nnx.Optimizer(model, tx, wrt=nnx.Param)

    Args:
        num_embeddings: V, rows.
        features: D, weights in a row.
        dtype: of the looked-up values: float32, float16 or bfloat16.
        scale: the scale of every row, at least 1e-4.
        padding_idx: a row that is all zeros and stays so; negative counts from the end.
        spread: how much rows differ at first, at most 0.5, see :meth:`BinaryTable.create`.
        planes: 1 to 8, bits of a weight.
        projection: multiply rows by the `nnx.Param` `projection`, float32 [D, P]: an output width P of at least 1, or True for D. It starts
            as the identity where P = D, else normal with standard deviation 1/sqrt(D), and belongs to the dense optimizer. It makes up
            for a fifth to two thirds of what one bit lost a language model (docs/quality.md).
        rngs: its stream `params` gives the key of the table, and then the one of a projection that is random.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: Any = jnp.float32,
        scale: float = 0.3,
        padding_idx: int | None = None,
        spread: float = 0.5,
        planes: int = 1,
        projection: bool | int = False,
        rngs: nnx.Rngs,
    ) -> None:
        width = check_projection(projection, check_dim("features", features))
        check_rows("num_embeddings", num_embeddings, features)
        self.dtype = check_dtype(dtype)
        if not callable(getattr(rngs, "params", None)):
            msg = f"rngs must be an nnx.Rngs with a stream params, got a {type(rngs).__name__}"
            raise TypeError(msg)
        self.num_embeddings, self.features = num_embeddings, features
        options: dict[str, Any] = {"scale": scale, "padding_idx": padding_idx, "spread": spread, "planes": planes}
        self.table = nnx.Param(BinaryTable.create(rngs.params(), num_embeddings, features, **options))
        self.projects = width is not None
        if width == features:
            self.projection = nnx.Param(jnp.eye(features, dtype=jnp.float32))
        elif width is not None:
            self.projection = nnx.Param(jax.random.normal(rngs.params(), (features, width), jnp.float32) * features**-0.5)

    def __call__(self, inputs: Any) -> Array:
        """Rows `inputs`, int32 or int64 of any shape: `inputs.shape + (features,)`, as :func:`dualbin.jax.lookup` gives them.

        With a projection, times that matrix: `inputs.shape + (P,)`.
        """
        rows = lookup(self.table.get_value(), inputs, self.dtype)
        return rows @ self.projection.get_value().astype(self.dtype) if self.projects else rows

    def attend(self, query: Any) -> Array:
        """The product of `query` with every row, as `nnx.Embed.attend`: the logits `[..., V]` of a model with tied weights.

        Args:
            query: `[..., D]`, with a projection `[..., P]`; cast to the module's dtype. Memory and gradient: :func:`dualbin.jax.attend`.
        """
        if not (hasattr(query, "dtype") and jnp.issubdtype(query.dtype, jnp.floating)):
            msg = f"query must be an array of floats, got {getattr(query, 'dtype', type(query).__name__)}"
            raise TypeError(msg)
        query = jnp.asarray(query, self.dtype)
        if self.projects:  # q . (v @ M) = (q @ M.T) . v, and there are fewer queries than rows
            query = query @ self.projection.get_value().astype(self.dtype).T
        return attend(self.table.get_value(), query)
