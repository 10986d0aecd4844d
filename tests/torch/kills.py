"""`python kills.py FOLDER KILLS SEED`: runs examples/torch/checkpoint.py to the end, and killed by SIGKILL and then to the end:
first at three chosen places, then so many times at random moments, which the resumed runs meet too.

A script of its own, which forks a process for every run; the test compares the checkpoints that they leave.
"""

from __future__ import annotations

import builtins
import os
import random
import runpy
import signal
import sys
import time
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


def run(folder: Path, fault: Callable[[], None] | None = None, lives: float | None = None) -> int:
    """The signal that ended the run, 0 if none; if it lives for so many seconds, it is killed."""
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
    if lives is not None:
        time.sleep(lives)
        os.kill(child, signal.SIGKILL)  # it has not been waited for: no other process has its number
    return os.waitpid(child, 0)[1]


def kill_at_random(root: Path, kills: int, rng: random.Random) -> None:
    """So many kills. Every run that is killed is resumed, until one ends before its kill; then another begins."""
    start = time.monotonic()
    assert run(root / "whole") == 0
    seconds, killed, runs = time.monotonic() - start, 0, 0
    while killed < kills:
        ended = run(root / f"random-{runs}", lives=rng.uniform(0, 1.2 * seconds))
        assert ended in {0, signal.SIGKILL}, ended
        killed += ended == signal.SIGKILL
        runs += ended == 0
    assert run(root / f"random-{runs}") == 0


def main() -> None:
    root, (kills, seed) = Path(sys.argv[1]), map(int, sys.argv[2:])
    assert run(root / "whole") == 0
    for fault in (while_training, while_saving, while_updating):
        folder = root / fault.__name__
        assert run(folder, fault) == signal.SIGKILL
        assert (folder / "checkpoint.pt").exists()  # else there would be nothing to resume
        assert run(folder) == 0
    kill_at_random(root, kills, random.Random(seed))


if __name__ == "__main__":
    main()
