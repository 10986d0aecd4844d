"""What an n-gram memory hashes, and into which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dualbin._checks import MAX_ROWS, check_int

MAX_ORDER = 32
MAX_HEADS = 1024
MAX_TOKEN = 2**31 - 1
MAX_PART = 2**31 - 1  # rows; a row of a part is a product of 32 by 31 bits


@dataclass(frozen=True)
class NGrams:
    """Which rows of a table the n-grams of a text have: the same in PyTorch, JAX and `dualbin.reference.ngram_rows`, which defines it.

    A position of a text has one row for every order n and head: a hash of its token and the n - 1 tokens before it. The table is cut into
    `parts`, one for every order and head, so a common bigram shares no row with the many rare trigrams, and heads, which hash differently,
    make up for each other's collisions.

    Args:
        rows: V, the rows of the table; every part needs at least 1 and at most 2**31 - 1.
        orders: n of the n-grams, 1 to 32, each once.
        heads: rows for each order, 1 to 1024.
        boundary: a token that ends a document: those after it do not see it, nor what was before. None: no token does.
        seed: 0 to 2**63 - 1; another one hashes differently, for memories that are to make up for each other's collisions.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    rows: int
    orders: tuple[int, ...] = (2, 3)
    heads: int = 4
    boundary: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.orders, str | bytes) or not isinstance(self.orders, Sequence):
            msg = f"orders must be integers such as (2, 3), got {self.orders!r}"
            raise TypeError(msg)
        orders = tuple(check_int("orders", order, low=1, high=MAX_ORDER) for order in self.orders)
        if not orders or len(set(orders)) < len(orders):
            msg = f"orders must be different integers, at least one, got {orders}"
            raise ValueError(msg)
        heads = check_int("heads", self.heads, low=1, high=MAX_HEADS)
        count = len(orders) * heads
        rows = check_int("rows", self.rows, low=1, high=MAX_ROWS)
        if not count <= rows <= count * MAX_PART:
            msg = f"rows must be between {count} and {count * MAX_PART}, 1 to {MAX_PART} for each of {count} orders and heads, got {rows}"
            raise ValueError(msg)
        boundary = None if self.boundary is None else check_int("boundary", self.boundary, low=0, high=MAX_TOKEN)
        seed = check_int("seed", self.seed, low=0, high=2**63 - 1)
        for name, value in {"rows": rows, "orders": orders, "heads": heads, "boundary": boundary, "seed": seed}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_table(cls, name: str, rows: int, orders: Any, heads: Any, boundary: Any, seed: Any) -> NGrams:
        """NGrams of a module's table, whose rows are the user's argument `name`."""
        try:
            return cls(rows, orders, heads, boundary, seed)
        except ValueError as error:
            if not str(error).startswith("rows "):
                raise
            msg = f"{name}: {error}"
            raise ValueError(msg) from None

    @property
    def longest(self) -> int:
        """The largest order: a position sees `longest - 1` tokens before its own."""
        return max(self.orders)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First row and number of rows of every part, order by order, head by head."""
        count = len(self.orders) * self.heads
        firsts = [self.rows * part // count for part in range(count + 1)]
        return [(first, after - first) for first, after in pairwise(firsts)]

    @property
    def part_words(self) -> list[int]:
        """The last word that each part hashes: its order and head."""
        return [order << 16 | head for order in self.orders for head in range(self.heads)]

    def fingerprint(self) -> list[int]:
        """All that decides which rows a text has, as integers of 64 bits: the version of the hash, and what was given."""
        return [1, self.rows, self.heads, -1 if self.boundary is None else self.boundary, self.seed, *self.orders]
