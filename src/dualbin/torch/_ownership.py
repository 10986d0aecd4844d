"""Whether a backward pass is the only one that holds the gradient it was given, which then need not be copied.

Autograd hands the same memory to whoever wants the same values: to another parameter behind a sum, to a hook, to the caller of `backward`.
PyTorch itself takes a gradient as it is where a count of references says that nobody else has it, and so does this. References of C++ are
counted by the tensor and its storage; those of Python include the interpreter's own on the way to the backward pass, whose number is
learned once from a gradient that certainly has no other.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_STORAGE_REFERENCES = 2  # the tensor's, and that of the Python object by which it is asked for


class Ownership:
    """How many references of Python a gradient has that nobody else holds.

    Attributes:
        due: a backward pass has asked, and the number is not known yet. It is learned before the next forward pass, and not before there
            was a backward pass: the first one starts threads, which a process that forks later may not want.
    """

    def __init__(self) -> None:
        self.due = False
        self._alone: int | None = None
        self._learner: int | None = None
        counts = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
        self._can_tell = counts and getattr(sys, "_is_gil_enabled", lambda: True)()

    def has(self, dy: Any, references: int) -> bool:
        """Whether nobody else holds `dy`, of which Python has so many references where the backward pass counts them."""
        if self._alone is None:
            if self._learner == threading.get_ident():
                self._alone = references
            else:
                self.due = self._can_tell
            return False
        return bool(
            references <= self._alone
            and type(dy) is Tensor
            and dy._base is None
            and dy._use_count() == 1  # type: ignore[attr-defined]
            and torch._C._storage_Use_Count(dy.untyped_storage()._cdata) == _STORAGE_REFERENCES
        )

    def learn(self, example: Callable[[], Tensor]) -> None:
        """Learn the number from the backward pass of `example()`, a lookup on the CPU."""
        self.due = False
        self._learner = threading.get_ident()  # the backward pass of a CPU tensor runs here, those of other threads do not count
        try:
            with torch.inference_mode(False), torch.enable_grad():
                (example() * 2).sum().backward()
        finally:
            self._learner = None


ownership = Ownership()
