"""The scripts of docs/jax.md run, resume after SIGKILL, and run on two hosts."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys

import jax
import pytest

import dualbin.jax as dbj

SCRIPTS = ["train", "nnx_model", "linen_model", "scan_steps", "mesh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(root, name, capsys):
    if name == "mesh" and jax.device_count() < 4:
        pytest.skip("needs four devices")
    runpy.run_path(str(root / "examples" / "jax" / f"{name}.py"))
    assert "loss" in capsys.readouterr().out


def test_docs_show_every_script(root):
    text = (root / "docs" / "jax.md").read_text()
    for script in (root / "examples" / "jax").glob("*.py"):
        assert f"examples/jax/{script.name}" in text
    for name in dbj.__all__:
        assert name in text, f"docs/jax.md does not mention {name}"


def environment(devices=1):
    # all else as in this process: another level of optimization rounds the model differently
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    platforms = "cpu" if jax.default_backend() == "cpu" else "cuda,cpu"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": platforms}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(root, tmp_path):
    script = root / "examples" / "jax" / "checkpoint.py"
    killed = subprocess.Popen([sys.executable, script, tmp_path / "killed"], stdout=subprocess.PIPE, env=environment(), text=True)
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
        printed = subprocess.run(command, stdout=subprocess.PIPE, env=environment(), text=True, check=True).stdout
        ends.append(re.search(r"started after (\w+), ended with (\w+)", printed).groups())
    assert int(ends[0][0]) >= 4
    assert ends[1][0] == "None"
    assert ends[0][1] == ends[1][1]


def run_hosts(root, processes, devices):
    """What examples/jax/hosts.py prints in each of so many processes, each with so many devices of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, root / "examples" / "jax" / "hosts.py", address, str(processes)]
    running = []
    for k in range(processes):
        own = {"CUDA_VISIBLE_DEVICES": ",".join(str(k * devices + i) for i in range(devices))}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([*command, str(k)], env=environment(devices) | own, **output))
    try:
        results = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * processes, results
    return [re.search(r"loss (.*), bits (\w+)", out).groups() for out, _ in results]


@pytest.mark.slow
def test_two_hosts(root, on_gpu):
    """Two processes, on the CPU with gloo collectives, end with the same bits, and with the losses of one process with all devices."""
    if on_gpu and jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    devices = 1 if on_gpu else 2
    first, second = run_hosts(root, 2, devices)
    assert first == second
    ((losses, _),) = run_hosts(root, 1, 2 * devices)
    assert losses == first[0]
