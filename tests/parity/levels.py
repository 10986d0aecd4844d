"""The native library with other instruction sets than the one that it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def other_levels() -> list[str]:
    """What this processor has beside the set in use."""
    try:
        from dualbin import _native
    except ImportError:
        return []
    return [level for level in _native.simd_levels() if level != _native.simd()]


@contextmanager
def simd(level: str) -> Iterator[None]:
    """That instruction set, within."""
    from dualbin import _native

    before = _native.simd()
    _native.use_simd(level)
    try:
        yield
    finally:
        _native.use_simd(before)


def at_levels(run: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
    """A back end "native-<level>" for each of them, which does the same as `run` with that set."""

    def at(level: str) -> Callable[[Any], Any]:
        def run_there(problem: Any) -> Any:
            with simd(level):
                return run(problem)

        return run_there

    return {f"native-{level}": at(level) for level in other_levels()}
