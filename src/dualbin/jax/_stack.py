"""Stacks: tables `[..., V, B]` such as a scan over layers takes apart, and what belongs to them, with the same axes in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from dualbin.jax._table import BinaryTable


def stack_axes(table: BinaryTable) -> tuple[int, ...]:
    """The axes in front of one table, () if it is one."""
    return tuple(table.bits.shape[:-2])


def over_members(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`function` for every member of arguments with `count` axes in front."""
    for _ in range(count):
        function = jax.vmap(function)
    return function
