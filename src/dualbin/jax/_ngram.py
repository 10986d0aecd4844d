"""The hash of n-grams on arrays of JAX, which has no 64-bit integers by default: in pairs of uint32."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualbin._ngrams import MAX_TOKEN, NGrams
from dualbin._reference_ngrams import NOBODY, ngram_keys, seen_after, token_words
from dualbin.jax._ids import row_dtype, to_array, to_ids

_HALF = np.uint32(0xFFFF)


def ngram_rows(ids: Any, ngrams: NGrams, context: Any = None, starts: Any = None) -> Array:
    """The rows of a table that the n-grams of a text have, for every order and head.

    A position sees its token and those before it, as many as the order says; nothing before the text or its `context`, nor across a start.

    Args:
        ids: tokens, integers `[..., T]`, in [0, 2**31).
        ngrams: what is hashed, and into which rows; static under jit.
        context: the tokens before `ids`, `[..., C]` of any C, of which at most the last `ngrams.longest - 1` are read; -1 where there is
            none, beyond which nothing is seen. None: texts begin with `ids`.
        starts: bool `[..., T]`, True for a token that begins a document. Documents begin after `ngrams.boundary`, too.

    Returns:
        `[..., T, P]`, P orders times heads: order by order, head by head; int32, or int64 where V needs it. Of n-grams with a bad token
        that nobody could see beforehand, as under jit, -1, which a lookup reports as a bad id.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or V needs int64 and jax_enable_x64 is off.
        IndexError: a token is outside [0, 2**31).
    """
    ids, context, starts = _checked(ids, ngrams, context, starts)
    row_dtype(ngrams.rows)  # raises where there is none
    return _rows(ids, ngrams, context, starts)


@partial(jax.jit, static_argnums=1)  # which makes one call of a hundred small ones
def _rows(ids: Array, ngrams: NGrams, context: Array, starts: Array | None) -> Array:
    words, outside = token_words(ids, ngrams, context, starts, jnp)
    high, low = ngram_keys(words, ngrams, jnp)
    first, size = np.array(ngrams.parts).T
    dtype = row_dtype(ngrams.rows)
    rows = _row_in_part(high, low, size.astype(np.uint32)).astype(dtype) + first.astype(dtype)
    bad = jnp.stack(outside)
    seen = jnp.stack([bad[:order].any(0) for order in ngrams.orders], -1)
    return jnp.where(jnp.repeat(seen, ngrams.heads, axis=-1), NOBODY, rows)


def next_context(ids: Any, ngrams: NGrams, context: Any = None, starts: Any = None) -> Array:
    """The `context` of what follows `ids`: the last `longest - 1` tokens, -1 where there is none or a document began since.

    Arguments and errors are those of :func:`ngram_rows`.

    Returns:
        `[..., longest - 1]`, of the dtype of the tokens.
    """
    ids, context, starts = _checked(ids, ngrams, context, starts)
    return _seen_after(ids, ngrams, context, starts)


@partial(jax.jit, static_argnums=1)
def _seen_after(ids: Array, ngrams: NGrams, context: Array, starts: Array | None) -> Array:
    return seen_after(ids, ngrams, context, starts, jnp)


def _checked(ids: Any, ngrams: Any, context: Any, starts: Any) -> tuple[Array, Array, Array | None]:
    """The arguments of :func:`ngram_rows` as arrays; without a context one without tokens."""
    if not isinstance(ngrams, NGrams):
        msg = f"ngrams must be a dualbin.NGrams, got a {type(ngrams).__name__}"
        raise TypeError(msg)
    ids = to_ids(ids, MAX_TOKEN + 1)
    if ids.ndim == 0:
        msg = "ids must have at least one dimension, [..., T], got a single token"
        raise ValueError(msg)
    lead = ids.shape[:-1]
    context = ids[..., :0] if context is None else to_ids(context, MAX_TOKEN + 1, "context", low=NOBODY)
    if context.ndim != ids.ndim or context.shape[:-1] != lead:
        msg = f"context must be {[*lead, 'C']}, as ids but for the last dimension, got {list(context.shape)}"
        raise ValueError(msg)
    if starts is None:
        return ids, context.astype(ids.dtype), None
    if getattr(starts, "dtype", None) != np.dtype(bool):
        msg = f"starts must be an array of bool, got {getattr(starts, 'dtype', f'a {type(starts).__name__}')}"
        raise TypeError(msg)
    if starts.shape != ids.shape:
        msg = f"starts must be {list(ids.shape)}, as ids, got {list(starts.shape)}"
        raise ValueError(msg)
    return ids, context.astype(ids.dtype), to_array("starts", starts)


def _row_in_part(high: Array, low: Array, size: np.ndarray) -> Array:
    """uint32: `hash * size // 2**64` of the 64 bits `high` and `low`."""
    carry, _ = _product(low, size)
    above, below = _product(high, size)
    return above + (below + carry < carry)  # the sum of the lower words wraps once or not


def _product(a: Array, b: np.ndarray) -> tuple[Array, Array]:
    """The 64 bits of a product of two uint32: its high and its low word, from products of halves."""
    a_high, a_low, b_high, b_low = a >> 16, a & _HALF, b >> 16, b & _HALF
    middle = a_high * b_low + (a_low * b_low >> 16)  # below 2**32
    other = a_low * b_high + (middle & _HALF)
    return a_high * b_high + (middle >> 16) + (other >> 16), a * b
