"""Nothing of the size of a dense table: peak memory of a process that makes and trains a table of 4 million rows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

V, D = 4_000_000, 128
MIB = 2**20

CODE = f"""
import re, torch, dualbin.torch as dbt
from dualbin import rules

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+)", status.read())[1]) / 1024

def train(rows):
    emb = dbt.BinaryEmbedding(rows, {D}, spread=0.1)
    made = peak()
    optimizer = dbt.XOR(emb.parameters(), rule=rules.Counter(2))
    for _ in range(3):
        emb(torch.randint(0, rows, (1024,))).pow(2).sum().backward()
        torch.nn.utils.clip_grad_norm_(emb.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    emb.load_state_dict(emb.state_dict())
    return made

train(1000)  # whatever torch loads at first use
before = peak()
made = train({V})
print(made - before, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_construction_and_training_take_the_packed_table_and_its_state():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    made, trained = map(float, re.findall(r"[\d.]+", result.stdout))
    table = V * (D / 8 + 4) / MIB  # bits and scale
    state = V * (D / 8 + 16) / MIB  # one counter plane, and the record
    assert 0.9 * table < made < table + 16
    assert 0.9 * (table + state) < trained < table + state + 48  # a byte a weight would be 488 MiB, a float 1953
