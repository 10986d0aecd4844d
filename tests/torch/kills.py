"""`python kills.py FOLDER`: runs examples/torch/checkpoint.py once to the end, and several times killed by SIGKILL and then to the end.

A script of its own, which forks a process for every run; the test compares the checkpoints that they leave.
"""

from __future__ import annotations

import builtins
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # (optimizers import it; once for all processes)

from dualbin.torch import _native_call

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "torch" / "checkpoint.py"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def while_training() -> None:
    said = builtins.print

    def print_and_die(text: str) -> None:
        said(text)
        if text.startswith("step 37:"):
            die()

    builtins.print = print_and_die  # type: ignore[assignment]


def while_saving() -> None:
    save, calls = torch.save, []

    def save_half_and_die(state: Any, path: Path) -> None:
        save(state, path)
        calls.append(path)
        if len(calls) == 3:
            os.truncate(path, path.stat().st_size // 2)
            die()

    torch.save = save_half_and_die


def while_updating() -> None:
    apply, calls = _native_call.apply_steps, []

    def apply_and_die(steps: Any) -> None:
        apply(steps)
        calls.append(steps)
        if len(calls) == 25:  # the table has changed, the dense weights have not
            die()

    _native_call.apply_steps = apply_and_die


def run(folder: Path, fault: Callable[[], None] | None = None) -> int:
    """The signal that ended the run, 0 if none."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        if fault is not None:
            fault()
        sys.argv = [str(EXAMPLE), str(folder)]
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except BaseException as error:
            sys.stderr.write(repr(error))
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    root = Path(sys.argv[1])
    assert run(root / "whole") == 0
    for fault in (while_training, while_saving, while_updating):
        folder = root / fault.__name__
        assert run(folder, fault) == signal.SIGKILL
        assert (folder / "checkpoint.pt").exists()  # else there would be nothing to resume
        assert run(folder) == 0


if __name__ == "__main__":
    main()
