"""The hash of n-grams on tensors: plain operations on int64, which a compiler fuses. `dualbin.reference.ngram_rows` is its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualbin._ngrams import MAX_TOKEN, NGrams
from dualbin._reference_ngrams import NOBODY, start_keys
from dualbin.torch._ids import check_ids

_WORD = 0xFFFFFFFF
#: factors of `mix`; the second less 2**32, so that its product with a word fits int64
_FIRST, _LAST = 0x7FEB352D, 0x846CA68B - (1 << 32)


def ngram_rows(ids: Tensor, ngrams: NGrams, context: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """The rows of a table that the n-grams of a text have, for every order and head.

    A position sees its token and those before it, as many as the order says; nothing before the text or its `context`, nor across a start.

    Args:
        ids: tokens, int32 or int64 `[..., T]`, in [0, 2**31).
        ngrams: what is hashed, and into which rows.
        context: the tokens before `ids`, int32 or int64 `[..., C]` of any C, of which at most the last `ngrams.longest - 1` are read; -1
            where there is none, beyond which nothing is seen. None: texts begin with `ids`.
        starts: bool `[..., T]`, True for a token that begins a document. Documents begin after `ngrams.boundary`, too.

    Returns:
        int64 `[..., T, P]`, P orders times heads: order by order, head by head. Of n-grams with a bad token, on a GPU, -1, which a lookup
        reports as a bad id.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        IndexError: a token is outside [0, 2**31); on a CPU outside compiled code.
    """
    check_tokens(ids, ngrams, context, starts)
    words, outside = _token_words(ids, ngrams, context, starts)
    high, low = _keys(words, ngrams).unbind()
    count = len(ngrams.orders) * ngrams.heads
    bounds = torch.arange(count + 1, device=ids.device) * ngrams.rows // count
    first, size = bounds[:-1], bounds[1:] - bounds[:-1]
    rows = (high * size + (low * size >> 32) >> 32) + first
    bad = torch.stack([outside[order - 1] for order in ngrams.orders], -1)
    return torch.where(bad.repeat_interleave(ngrams.heads, -1), -1, rows)


def next_context(ids: Tensor, ngrams: NGrams, context: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """The `context` of what follows `ids`: the last `longest - 1` tokens, -1 where there is none or a document began since.

    Arguments and errors are those of :func:`ngram_rows`.

    Returns:
        int64 `[..., longest - 1]`.
    """
    check_tokens(ids, ngrams, context, starts)
    reach = ngrams.longest - 1
    text, first = _text(ids, ngrams, context, starts)
    kept = [text[..., :0]]
    seen = torch.ones_like(text[..., -1:], dtype=torch.bool)
    for distance in range(reach):  # from the last token back
        here = slice(text.shape[-1] - 1 - distance, text.shape[-1] - distance)
        kept.insert(0, torch.where(seen, text[..., here], NOBODY))
        seen = seen & ~first[..., here]
    return torch.cat(kept, -1)


def check_tokens(ids: Any, ngrams: Any, context: Any, starts: Any) -> None:
    """Check the arguments of :func:`ngram_rows`."""
    if not isinstance(ngrams, NGrams):
        msg = f"ngrams must be a dualbin.NGrams, got a {type(ngrams).__name__}"
        raise TypeError(msg)
    check_ids(ids, ids.device if isinstance(ids, Tensor) else torch.device("cpu"))
    if ids.layout != torch.strided or ids.ndim == 0:
        msg = f"ids must be a dense tensor [..., T] of at least one dimension, got {ids.layout} {list(ids.shape)}"
        raise ValueError(msg)
    if context is not None:
        check_ids(context, ids.device, name="context", owner="ids")
        if context.layout != torch.strided or context.ndim != ids.ndim or context.shape[:-1] != ids.shape[:-1]:
            msg = f"context must be {[*ids.shape[:-1], 'C']}, as ids but for the last dimension, got {list(context.shape)}"
            raise ValueError(msg)
    if starts is not None:
        if not isinstance(starts, Tensor) or starts.dtype != torch.bool:
            msg = f"starts must be a tensor of bool, got {starts.dtype if isinstance(starts, Tensor) else f'a {type(starts).__name__}'}"
            raise TypeError(msg)
        if starts.layout != torch.strided or starts.shape != ids.shape or starts.device != ids.device:
            msg = f"starts must be {list(ids.shape)} on {ids.device}, as ids, got {list(starts.shape)} on {starts.device}"
            raise ValueError(msg)
    if torch.compiler.is_compiling():  # then a lookup of row -1 reports it
        return
    for name, tokens, low in (("ids", ids, 0), ("context", context, NOBODY)):
        if tokens is not None and tokens.device.type == "cpu" and tokens.numel():
            bounds = [int(bound) for bound in torch.aminmax(tokens)]
            if bounds[0] < low or bounds[1] > MAX_TOKEN:
                msg = f"{name} must be in [{low}, {MAX_TOKEN + 1}), got {bounds[0] if bounds[0] < low else bounds[1]}"
                raise IndexError(msg)


def _text(ids: Tensor, ngrams: NGrams, context: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 `[..., longest - 1 + T]`: the context and the tokens; and bool: where nothing before is seen."""
    reach = ngrams.longest - 1
    context = ids[..., :0] if context is None else context[..., max(0, context.shape[-1] - reach) :]
    nothing = ids.new_full((*ids.shape[:-1], reach - context.shape[-1]), NOBODY, dtype=torch.int64)
    text = torch.cat([nothing, context.long(), ids.long()], -1)
    previous = torch.nn.functional.pad(text[..., : max(0, text.shape[-1] - 1)], (min(1, text.shape[-1]), 0), value=NOBODY)
    first = previous == NOBODY
    if ngrams.boundary is not None:
        first = first | (previous == ngrams.boundary)
    if starts is not None:
        first = first | torch.nn.functional.pad(starts, (reach, 0), value=False)
    return text, first


def _token_words(ids: Tensor, ngrams: NGrams, context: Tensor | None, starts: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """For every distance 0, 1, ... the tokens that the positions see there, as words; and whether one up to there is bad."""
    text, first = _text(ids, ngrams, context, starts)
    wrong = (text < 0) | (text > MAX_TOKEN)
    seen = bad = None
    words, outside = [], []
    for distance in range(ngrams.longest):
        start = ngrams.longest - 1 - distance
        here = slice(start, start + ids.shape[-1])
        token, wrong_here = text[..., here], wrong[..., here]
        words.append((token if seen is None else torch.where(seen, token, NOBODY)) & _WORD)
        bad = wrong_here if seen is None or bad is None else bad | (seen & wrong_here)
        outside.append(bad)
        seen = ~first[..., here] if seen is None else seen & ~first[..., here]
    return words, outside


def _keys(words: list[Tensor], ngrams: NGrams) -> Tensor:
    """int64 `[2, ..., T, P]`: the high and the low 32 bits of every n-gram and head."""
    keys = torch.stack([words[0] ^ start for start in start_keys(ngrams)])
    of_order = {1: _mix(keys)}
    for order, word in enumerate(words[1:], 2):
        of_order[order] = _mix(of_order[order - 1] ^ word)
    head = torch.arange(ngrams.heads, device=keys.device)
    last = [of_order[order][..., None] ^ (order << 16 | head) for order in ngrams.orders]
    return _mix(torch.cat(last, -1))


def _mix(x: Tensor) -> Tensor:
    """`mix` of docs/design.md, on words in int64."""
    x = x ^ (x >> 16)
    x = x * _FIRST & _WORD
    x = x ^ (x >> 15)
    x = x * _LAST & _WORD
    return x ^ (x >> 16)
