"""Whether a backward pass is the only one that holds the gradient it was given, which then need not be copied.

Autograd hands the same memory to whoever wants the same values: to another parameter behind a sum, to a hook, to the caller of `backward`.
PyTorch itself takes a gradient as it is where a count of references says that nobody else has it, and so does this. References of C++ are
counted by the tensor and its storage, those of Python by its object. All include those on the way to the backward pass, whose number
differs between versions of PyTorch and Python: it is learned once from a gradient that certainly has no other.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Ownership:
    """How many references a gradient has that nobody else holds.

    Attributes:
        due: a backward pass has asked, and the numbers are not known yet. They are learned before the next forward pass, and not before
            there was a backward pass: the first one starts threads, which a process that forks later may not want.
    """

    def __init__(self) -> None:
        self.due = False
        self._alone: tuple[int, int, int] | None = None  # of Python, of the tensor, of its storage
        self._learner: int | None = None
        counts = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
        self._can_tell = counts and getattr(sys, "_is_gil_enabled", lambda: True)()

    def has(self, dy: Any, references: int) -> bool:
        """Whether nobody else holds `dy`, of which Python has so many references where the backward pass counts them."""
        if self._alone is None:
            if self._learner == threading.get_ident():
                self._alone = (references, *_native_references(dy))
            else:
                self.due = self._can_tell
            return False
        if references > self._alone[0] or type(dy) is not Tensor or dy._base is not None:
            return False
        return all(count <= alone for count, alone in zip((references, *_native_references(dy)), self._alone, strict=True))

    def learn(self, example: Callable[[], Tensor]) -> None:
        """Learn the numbers from the backward pass of `example()`, a lookup on the CPU."""
        self.due = False
        self._learner = threading.get_ident()  # the backward pass of a CPU tensor runs here, those of other threads do not count
        try:
            with torch.inference_mode(False), torch.enable_grad():
                (example() * 2).sum().backward()
        finally:
            self._learner = None


def _native_references(dy: Tensor) -> tuple[int, int]:
    """References of C++ to a tensor and to its storage, those by which they are asked for included."""
    return dy._use_count(), torch._C._storage_Use_Count(dy.untyped_storage()._cdata)  # type: ignore[attr-defined]


ownership = Ownership()
