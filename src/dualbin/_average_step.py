"""The default step of `average`, one definition for the reference and both frontends.

A counter would be the obvious one, but compiled code cannot count its calls, and processes that ought to agree may have counted
differently. So it is a number that tells the contents of two tables from others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MASK = 0xFFFFFFFF

#: a word of 32 bits as the framework wants constants
Word = Callable[[int], Any]


def hash_rows(bits: Any, scale: Any, columns: Any, rows: Any, word: Word = int) -> Any:
    """The sum over rows of a number that tells what a row holds and which one it is.

    Written for arrays of NumPy, PyTorch and JAX alike, uint32 or int64, which may overflow: 32 bits of everything count. As it is a sum, a
    caller may take a table apart by rows and add the numbers of the parts.

    Args:
        bits: the bytes `[N, B]` of rows of a table, as integers.
        scale: `[N]`, the 32 bits of their float32 scales as non-negative integers.
        columns: 0 to B - 1.
        rows: `[N]`, which rows of the table these are.
        word: makes a constant.

    Returns:
        An integer of 32 bits, without a dimension.
    """
    mask = word(_MASK)
    row = ((bits * _odd(columns, word)).sum(1, dtype=bits.dtype) + scale * word(0x2C1B3C6D)) & mask
    row = (row ^ (row >> word(15))) * word(0x85EBCA6B) & mask
    return ((row ^ (row >> word(13))) * _odd(rows, word)).sum(dtype=bits.dtype) & mask


def _odd(numbers: Any, word: Word) -> Any:
    """A factor for each number, which differ in their high bits, too."""
    return (numbers * word(2) + word(1)) * word(0x9E3779B9) & word(_MASK)


def default_step(a: Any, b: Any, word: Word = int) -> Any:
    """The step, 32 bits, from :func:`hash_rows` of both tables."""
    return (a * word(0x85EBCA6B) + b) & word(_MASK)
