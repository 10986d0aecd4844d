"""`io.save` that is killed at a random moment, or whose disk is full: the file is the old one or the new one, whole."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dualbin import io

KILLS = int(os.environ.get("DUALBIN_KILLS", "12"))
PARTS = int(os.environ.get("DUALBIN_PARTS", "1"))  # into how many tests the kills are divided
ROWS, DIM = 40000, 256

SAVES = """
import sys, numpy as np
from dualbin import io
print("ready", flush=True)
for n in range(10**9):
    value = np.uint8(n % 2 * 255)
    io.save(sys.argv[1], {{"t": io.Table(np.full(({rows}, {width}), value), np.ones(({rows}, 1), np.float32), {dim})}})
"""


@pytest.mark.timeout(60 + 10 * KILLS)
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_while_saving(tmp_path: Path, part: int) -> None:
    path, rng = tmp_path / "table", random.Random(part)
    code = SAVES.format(rows=ROWS, width=DIM // 8, dim=DIM)
    for _ in range(-(-KILLS // PARTS)):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
        if path.exists():
            bits = io.load(path)[0]["t"].bits
            assert np.unique(bits).size == 1, "a file is that of one save"
    io.save(path, {"t": io.Table(np.zeros((3, 1), np.uint8), np.ones((3, 1), np.float32), 8)})
    assert [left.name for left in tmp_path.iterdir()] == ["table"], "what killed processes left is gone with the next save"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table"
    small = io.Table(np.zeros((3, 1), np.uint8), np.ones((3, 1), np.float32), 8)
    io.save(path, {"t": small})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        with pytest.raises(OSError, match="table"):
            io.save(path, {"t": io.Table(np.zeros((ROWS, DIM // 8), np.uint8), np.ones((ROWS, 1), np.float32), DIM)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["table"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        io.load(tmp_path)
    with pytest.raises(OSError, match="file"):
        io.save(tmp_path / "file" / "table", {"t": io.Table(np.zeros((3, 1), np.uint8), np.ones((3, 1), np.float32), 8)})
