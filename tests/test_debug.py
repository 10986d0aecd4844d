"""Updates in several threads: of different tables they give the bits of one thread; of one table DUALBIN_DEBUG=1 says that they meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import threading
import numpy as np
from dualbin import _native, reference, rules

V, D, N, STEPS = 3_000, 256, 20_000, 12
RULE = rules.resolve(rules.Counter(8), 1, D)
NATIVE = _native.Rule(**RULE.native())

class Table:
    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.bits, self.scale = reference.pack(rng.normal(size=(V, D)).astype(np.float32)), np.full((V, 1), 0.3, np.float32)
        self.state = {name: np.zeros(*spec) for name, spec in rules.state_layout(RULE, V, D, train_scale=True).items()}
        self.batches = [(rng.integers(0, V, N), rng.normal(size=(N, D)).astype(np.float32)) for _ in range(2)]
        self.errors = []

    def train(self, first=0, steps=STEPS):
        workspace = np.zeros(_native.workspace_bytes("update", -1, 1, N, V, D), np.uint8)
        for step in range(first, first + steps):
            try:
                _native.update(self.bits, self.scale, D, self.state, NATIVE, (7, step, 0, 1.0, 3e-3), *self.batches[step % 2], workspace)
            except RuntimeError as error:
                self.errors.append(str(error))

    def contents(self):
        return [self.bits.tobytes(), self.scale.tobytes(), *(self.state[name].tobytes() for name in sorted(self.state))]

def together(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

alone = [Table(seed) for seed in range(3)]
for table in alone: table.train()
tables = [Table(seed) for seed in range(3)]
together(*(table.train for table in tables))
assert [t.contents() for t in tables] == [t.contents() for t in alone]
assert not any(t.errors for t in tables)

shared = tables[0]
for _ in range(20):
    if sys.argv[1] == "1" and shared.errors: break
    together(*[shared.train] * 4)
print(len(shared.errors), shared.errors[0] if shared.errors else "")
met = len(shared.errors)
shared.train()
assert len(shared.errors) == met  # alone again
"""


@pytest.mark.parametrize("debug", ["1", "0"])
def test_updates_in_threads(debug: str, root: Path) -> None:
    environment = os.environ | {"DUALBIN_DEBUG": debug, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT if debug == "1" else SCRIPT.replace("range(20)", "range(1)"), debug]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert result.returncode == 0, result.stderr
    count, message = result.stdout.strip().split(" ", 1) if debug == "1" else (result.stdout.strip(), "")
    if debug == "0":
        assert count == "0"
        return
    assert int(count) > 0
    assert message.startswith("dualbin: two updates of one table at the same time, which DUALBIN_DEBUG=1 looks for")
