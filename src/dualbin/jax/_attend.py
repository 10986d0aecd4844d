"""`attend`: a table as the output weights of a model."""

from __future__ import annotations

from typing import Any

from jax import Array

from dualbin.jax._ids import to_array
from dualbin.jax._table import BinaryTable, check_dtype, check_table


def attend(table: BinaryTable, query: Any) -> Array:
    """The product of `query` with every row, `query @ table.dequantize().T`: the logits of a model whose output weights are its table.

    It needs the table as floats, `[V, D]` in the dtype of query, which is 32 times (16 times in half precision) the memory of the table,
    and a second such array in the backward pass. There the gradient has all V rows, so declare all of them::

        dbj.value_and_grad(loss, ids=lambda params, batch: {"emb": jnp.arange(V)})

    Args:
        table: the table, V rows of D weights.
        query: float32, float16 or bfloat16 `[..., D]`.

    Returns:
        `[..., V]` of the dtype of query.

    Raises:
        TypeError, ValueError: query has another dtype or shape, or the table is malformed.
        ValueError: inside a loss whose table trains, if fewer than V rows are declared.
    """
    check_table(table)
    query = to_array("query", query)
    if query.ndim < 1 or query.shape[-1] != table.dim:
        msg = f"query must have shape [..., {table.dim}], got {list(query.shape)}"
        raise ValueError(msg)
    return query @ table.dequantize(check_dtype(query.dtype, "query")).T
