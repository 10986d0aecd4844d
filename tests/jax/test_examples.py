"""The scripts of docs/jax.md run, resume after SIGKILL, and run on two hosts."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys

import pytest

import dualbin.jax as dbj

SCRIPTS = ["train", "nnx_model", "scan_steps", "mesh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(root, name, capsys):
    runpy.run_path(str(root / "examples" / "jax" / f"{name}.py"))
    assert "loss" in capsys.readouterr().out


def test_docs_show_every_script(root):
    text = (root / "docs" / "jax.md").read_text()
    for script in (root / "examples" / "jax").glob("*.py"):
        assert f"examples/jax/{script.name}" in text
    for name in dbj.__all__:
        assert name in text, f"docs/jax.md does not mention {name}"


def environment(root, devices=1):
    # all else as in this process: another level of optimization rounds the model differently
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(root, tmp_path):
    script = root / "examples" / "jax" / "checkpoint.py"
    killed = subprocess.Popen([sys.executable, script, tmp_path / "killed"], stdout=subprocess.PIPE, env=environment(root), text=True)
    for line in killed.stdout:
        if line == "step 4\n":
            break
    killed.send_signal(signal.SIGKILL)
    killed.stdout.close()
    assert killed.wait() == -signal.SIGKILL
    ends = []
    for directory in ("killed", "whole"):
        # in a process as the killed one was: options of XLA that this process set would change the dense part in its last bits
        command = [sys.executable, script, tmp_path / directory]
        printed = subprocess.run(command, stdout=subprocess.PIPE, env=environment(root), text=True, check=True).stdout
        ends.append(re.search(r"started after (\w+), ended with (\w+)", printed).groups())
    assert int(ends[0][0]) >= 4
    assert ends[1][0] == "None"
    assert ends[0][1] == ends[1][1]


@pytest.mark.slow
def test_two_hosts(root):
    """Two processes of two devices each, with gloo collectives, end with the same bits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    script = root / "examples" / "jax" / "hosts.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, "2", str(k)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(root, 2),
            text=True,
        )
        for k in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], results
    digests = {re.search(r"bits (\w+)", out)[1] for out, _ in results}
    assert len(digests) == 1, results
