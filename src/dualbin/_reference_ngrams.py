"""The hash of n-grams: a part of :mod:`dualbin.reference`.

As in `_reference_rules`, `xp` is the array module, `numpy` or `jax.numpy`; `token_words` and `ngram_keys` need no 64-bit types.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualbin._ngrams import MAX_TOKEN, NGrams
from dualbin._reference_hash import mix_first, mix_last

Array = Any  #: of the array module

NOBODY = -1  #: in the place of a token that there is not
_WORD = 0xFFFFFFFF


def ngram_rows(ids: ArrayLike, ngrams: NGrams, context: ArrayLike | None = None, starts: ArrayLike | None = None) -> NDArray[np.int64]:
    """The rows of a text: int64 `[..., T, P]` of tokens `[..., T]`, for P orders and heads.

    A position sees its token and those before it, but not across a start. What it does not see counts as the token `NOBODY`.

    Args:
        ids: int32 or int64 `[..., T]`, in [0, 2**31).
        ngrams: what is hashed, and into which rows.
        context: the tokens before them, `[..., C]`; `NOBODY` where there is none, beyond which nothing is seen. None: a text begins.
        starts: bool `[..., T]`: tokens that begin a document, and see nothing before. None: those after `ngrams.boundary` alone.

    Raises:
        IndexError: a token is outside [0, 2**31).
    """
    ids = np.asarray(ids)
    before = np.zeros((*ids.shape[:-1], 0), ids.dtype) if context is None else np.asarray(context)
    words, outside = token_words(ids, ngrams, before, None if starts is None else np.asarray(starts), np)
    if any(bad.any() for bad in outside):
        msg = f"ids must be in [0, {MAX_TOKEN + 1})"
        raise IndexError(msg)
    high, low = ngram_keys(words, ngrams, np)
    first, size = np.array(ngrams.parts).T
    return first + row_in_part(high, low, size)


def token_words(ids: Array, ngrams: NGrams, context: Array, starts: Array | None, xp: Any) -> tuple[list[Array], list[Array]]:
    """For every distance 0, 1, ... `longest - 1`: the tokens that the positions see there, uint32 [..., T], and which of them are bad."""
    reach, length = ngrams.longest - 1, ids.shape[-1]
    text, first = text_and_starts(ids, ngrams, context, starts, xp)
    seen = xp.ones(ids.shape, bool)
    words, outside = [], []
    for distance in range(ngrams.longest):
        here = slice(reach - distance, reach - distance + length)
        token = text[..., here]
        words.append(xp.where(seen, token, NOBODY).astype(np.uint32))
        outside.append(seen & ((token < 0) | (token > MAX_TOKEN)))
        seen = seen & ~first[..., here]
    return words, outside


def seen_after(ids: Array, ngrams: NGrams, context: Array, starts: Array | None, xp: Any) -> Array:
    """The tokens `[..., longest - 1]` that a token after `ids` can see, the oldest first, and `NOBODY` where it sees none."""
    text, first = text_and_starts(ids, ngrams, context, starts, xp)
    kept, seen = [text[..., :0]], xp.ones((*ids.shape[:-1], 1), bool)
    for distance in range(1, ngrams.longest):
        here = slice(text.shape[-1] - distance, text.shape[-1] - distance + 1)
        kept.insert(0, xp.where(seen, text[..., here], NOBODY).astype(text.dtype))
        seen = seen & ~first[..., here]
    return xp.concatenate(kept, -1)


def text_and_starts(ids: Array, ngrams: NGrams, context: Array, starts: Array | None, xp: Any) -> tuple[Array, Array]:
    """`[..., longest - 1 + T]`: the tokens that the positions may see, and bool: which of them see nothing before."""
    reach, lead = ngrams.longest - 1, ids.shape[:-1]
    context = context[..., max(0, context.shape[-1] - reach) :]
    nothing = xp.full((*lead, reach - context.shape[-1]), NOBODY, ids.dtype)
    text = xp.concatenate([nothing, context, ids], -1)
    previous = xp.concatenate([xp.full((*lead, 1), NOBODY, ids.dtype), text], -1)[..., :-1]
    first = previous == NOBODY
    if ngrams.boundary is not None:
        first = first | (previous == ngrams.boundary)
    if starts is not None:
        first = first | xp.concatenate([xp.zeros((*lead, reach), bool), starts], -1)
    return text, first


def start_keys(ngrams: NGrams) -> tuple[int, int]:
    """The two keys before the first token: a hash of the seed. In Python's integers, so that a compiler sees constants."""
    first, second = 0x243F6A88, 0x85A308D3
    for word in (ngrams.seed & _WORD, ngrams.seed >> 32):
        first, second = _mix(first ^ word), _mix(second ^ word)
    return first, second


def _mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def ngram_keys(words: list[Array], ngrams: NGrams, xp: Any) -> tuple[Array, Array]:
    """The 64 bits of every n-gram and head, uint32 [..., T, P] twice: from the newest token back, then order and head."""
    part = xp.asarray(np.array(ngrams.part_words, np.uint32).reshape(len(ngrams.orders), ngrams.heads))
    found = []
    for start in start_keys(ngrams):
        key, of_order = xp.full(words[0].shape, start, np.uint32), {}
        for order, word in enumerate(words, 1):
            key = of_order[order] = mix_last(mix_first(key ^ word))
        keys = [mix_last(mix_first(of_order[order][..., None] ^ own)) for order, own in zip(ngrams.orders, part, strict=True)]
        found.append(xp.concatenate(keys, -1))
    return found[0], found[1]


def row_in_part(high: NDArray[np.uint32], low: NDArray[np.uint32], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """`hash * size // 2**64` of the 64 bits, exactly: size is below 2**31."""
    wide = size.astype(np.uint64)
    carry = low * wide >> np.uint64(32)
    return ((high * wide + carry) >> np.uint64(32)).astype(np.int64)
