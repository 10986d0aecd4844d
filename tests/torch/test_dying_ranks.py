"""Ranks that die, or stop answering, while they exchange rows or save: the others raise, with whole tables, and the last checkpoint loads.

`make test` kills four times, `make soak` 200 times (DUALBIN_KILLS) with two and with three ranks, divided into so many
tests as DUALBIN_PARTS says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ranks.launch import TESTS

KILLS = int(os.environ.get("DUALBIN_KILLS", "4"))
PARTS = int(os.environ.get("DUALBIN_PARTS", "1"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.skipif(sys.platform != "linux", reason="forks ranks")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("world", [2, 3] if KILLS > 4 else [2])
def test_the_others_raise_and_have_whole_tables(world: int, part: int, tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "ranks.deaths", str(tmp_path), str(world), str(-(-KILLS // PARTS)), str(part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
