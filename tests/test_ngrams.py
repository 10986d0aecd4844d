"""The hash of n-grams: the definition, written again with Python's integers, and what it promises."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_cases import Text, texts

from dualbin import NGrams, reference

WORD = 2**32 - 1


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def row(window: list[int], ngrams: NGrams, order: int, head: int) -> int:
    """The row of one n-gram, its newest token first, as docs/design.md says it."""
    words = [ngrams.seed & WORD, ngrams.seed >> 32, *(token & WORD for token in window), order << 16 | head]
    bits = 0
    for key in (0x243F6A88, 0x85A308D3):
        for word in words:
            key = mix(key ^ word)  # noqa: PLW2901  (a chain)
        bits = bits << 32 | key
    count = len(ngrams.orders) * ngrams.heads
    part = ngrams.orders.index(order) * ngrams.heads + head
    first, last = (ngrams.rows * p // count for p in (part, part + 1))
    return first + (bits * (last - first) >> 64)


def rows_of_text(tokens: list[int], starts: list[bool], context: list[int], ngrams: NGrams) -> list[list[int]]:
    text, found = [*context, *tokens], []
    for place in range(len(context), len(text)):
        window: list[int] = [text[place]]
        at, open_ = place, True
        for _ in range(ngrams.longest - 1):
            begins = at - len(context) >= 0 and starts[at - len(context)]
            open_ = open_ and at > 0 and not begins and text[at - 1] not in (-1, ngrams.boundary)
            at -= 1
            window.append(text[at] if open_ else -1)
        found.append([row(window[:order], ngrams, order, head) for order in ngrams.orders for head in range(ngrams.heads)])
    return found


@given(texts())
@settings(max_examples=150, deadline=None)
def test_the_reference_is_the_definition(text: Text) -> None:
    ids, ngrams, context, starts = text
    found = reference.ngram_rows(ids, ngrams, context, starts)
    assert found.dtype == np.int64
    assert found.shape == (*ids.shape, len(ngrams.orders) * ngrams.heads)
    for place in np.ndindex(ids.shape[:-1]):
        begins = [False] * ids.shape[-1] if starts is None else starts[place].tolist()
        before = [] if context is None else context[place].tolist()
        assert found[place].tolist() == rows_of_text(ids[place].tolist(), begins, before, ngrams)


def test_known_rows() -> None:
    """The hash is part of the format of a trained memory: it never changes."""
    found = reference.ngram_rows(np.array([7, 7, 9, 2**31 - 1]), NGrams(10**9, (1, 3), 2, boundary=9, seed=5))
    assert found.tolist() == [
        [215201378, 299307711, 649930995, 793597102],
        [215201378, 299307711, 552769965, 935771480],
        [92522332, 260264872, 694860877, 909114932],
        [28294915, 300689973, 617620054, 861872896],
    ]


def test_documents_side_by_side_are_documents_alone() -> None:
    documents = [np.array([4, 4, 9]), np.array([9]), np.array([1, 4, 4, 4, 9])]
    joined, ngrams = np.concatenate(documents), NGrams(1000, (1, 2, 4), 2, boundary=9)
    apart = np.concatenate([reference.ngram_rows(document, ngrams) for document in documents])
    np.testing.assert_array_equal(reference.ngram_rows(joined, ngrams), apart)
    begins = np.zeros(len(joined), bool)
    begins[[0, 3, 4]] = True
    np.testing.assert_array_equal(reference.ngram_rows(joined, NGrams(1000, (1, 2, 4), 2), None, begins), apart)
    assert (reference.ngram_rows(joined, NGrams(1000, (1, 2, 4), 2)) != apart).any()


def test_rows_are_spread_evenly_and_heads_differ() -> None:
    ids = np.random.default_rng(0).integers(0, 50_000, 40_000)
    ngrams = NGrams(4 * 256, (2, 3), 2)
    found = reference.ngram_rows(ids, ngrams)
    for part, (first, size) in enumerate(ngrams.parts):
        counts = np.bincount(found[:, part] - first, minlength=size)
        assert len(counts) == size
        assert abs(((counts - len(ids) / size) ** 2).sum() / (len(ids) / size) - size) < 6 * (2 * size) ** 0.5  # chi squared
    pairs = Counter(zip(*(found[:, :2] - [first for first, _ in ngrams.parts[:2]]).T.tolist(), strict=True))
    assert max(pairs.values()) < 12  # of 65,536 pairs, 0.6 each


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 7}, ValueError, r"rows must be between 8 and 17179869176, 1 to 2147483647 for each of 8 orders and heads, got 7"),
        ({"rows": 8 * 2**31}, ValueError, "rows must be between 8 and"),
        ({"rows": 8.0}, TypeError, "rows must be an integer"),
        ({"orders": ()}, ValueError, "orders must be different integers, at least one"),
        ({"orders": (2, 2)}, ValueError, r"orders must be different integers, at least one, got \(2, 2\)"),
        ({"orders": (0,)}, ValueError, "orders must be between 1 and 32, got 0"),
        ({"orders": 3}, TypeError, r"orders must be integers such as \(2, 3\), got 3"),
        ({"orders": "23"}, TypeError, "orders must be integers"),
        ({"heads": 0}, ValueError, "heads must be between 1 and 1024, got 0"),
        ({"boundary": -1}, ValueError, "boundary must be between 0 and"),
        ({"seed": -1}, ValueError, "seed must be between 0 and"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NGrams(**{"rows": 100} | options)


@pytest.mark.parametrize("token", [-1, 2**31])
def test_bad_tokens(token: int) -> None:
    with pytest.raises(IndexError, match=r"ids must be in \[0, 2147483648\)"):
        reference.ngram_rows(np.array([1, token]), NGrams(100))


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**64 - 1))
def test_the_row_in_a_part(size: int, bits: int) -> None:
    from dualbin._reference_ngrams import row_in_part

    high, low = (np.array([word], np.uint32) for word in (bits >> 32, bits & WORD))
    assert row_in_part(high, low, np.array([size])) == bits * size >> 64
