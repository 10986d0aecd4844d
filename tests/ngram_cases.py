"""Texts with contexts, starts and boundaries, for the tests of the n-gram hash in NumPy and PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from dualbin import NGrams

#: the ends of what a token can be, and a few that repeat, so that boundaries and equal n-grams occur
TOKENS = st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**31 - 2, 65535, 65536])


class Text(NamedTuple):
    """Arguments of `ngram_rows`."""

    ids: Any
    ngrams: NGrams
    context: Any
    starts: Any


@st.composite
def texts(draw: st.DrawFn) -> Text:
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    length, before = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    orders = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True)))
    heads = draw(st.integers(1, 3))
    parts = len(orders) * heads
    rows = draw(st.one_of(st.integers(parts, 100), st.integers(2**31 - 9, 2**31 - 1), st.integers(parts, parts * (2**31 - 1))))
    boundary, seed = draw(st.one_of(st.none(), TOKENS)), draw(st.sampled_from([0, 1, 2**32, 2**63 - 1]))
    ngrams = NGrams(rows, orders, heads, boundary, seed)
    dtype = draw(st.sampled_from([np.int32, np.int64]))

    def tokens(count: int, values: st.SearchStrategy[int]) -> Any:
        size = int(np.prod(lead)) * count
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype).reshape(*lead, count)

    context = draw(st.one_of(st.none(), st.just(0)))
    starts = draw(st.one_of(st.none(), st.just(0)))
    return Text(
        tokens(length, TOKENS),
        ngrams,
        context if context is None else tokens(before, st.one_of(st.just(-1), TOKENS)),
        starts if starts is None else tokens(length, st.integers(0, 1)).astype(bool),
    )


def story() -> str:
    """A text for the examples: four words of five follow from the two before them, and neither of these alone says anything."""
    random = np.random.default_rng(0)
    words = [first + second for first in "bdfgk" for second in "aeiou"]
    count, free = len(words), random.random((1000, 30)) < 0.2
    text = random.integers(0, count, free.shape)
    for n in range(2, free.shape[1]):
        text[:, n] = np.where(free[:, n], text[:, n], (text[:, n - 1] + 7 * text[:, n - 2]) % count)
    return "\n\n".join(" ".join(words[word] for word in document) for document in text)
