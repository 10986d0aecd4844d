"""Time lookups and updates beside what has to move, and beside what else there is in PyTorch and JAX.

    python benchmarks/speed.py --device cuda --out results

The floor of a call is the time in which the device copies as many bytes as the call has to move: N*D values written, their packed rows,
scales and ids read in a lookup; N*D values and N ids read, and the bits and counters of the distinct rows read and written in an update.
How fast the device copies is measured first, in the same run. On a GPU the times are those of the device: calls are queued behind other
work, as in a training step (benchmarks/overhead.py has what a call costs the host). On a CPU they are wall times of single calls. Writes to
the output folder:

    speed.md        the tables
    speed.json      the same with all samples, the bytes, and what it ran on
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _speed.report import Row, compare, markdown, write_json
from _speed.timing import Clock
from _speed.workloads import DTYPES, Case, Data, Workload, workloads

import dualbin

FRONTENDS = {"torch": "_speed.torch_cases", "jax": "_speed.jax_cases"}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    prepare_environment(options.device)
    run = Run(options.device, options.small)
    for frontend in FRONTENDS if options.frontend == "both" else (options.frontend,):
        try:
            run.measure(frontend)
        except Exception as error:  # the other frontend can still be measured; this one becomes a line
            run.failures.append(f"{frontend}: {describe(error)}")
            print(f"{frontend}: FAILED: {describe(error)}", flush=True)
    compare(run.rows)
    facts = {**run.facts, **environment(options.device, sys.argv[1:] if arguments is None else arguments), "seconds": run.seconds()}
    facts.setdefault("device", cpu_name() if options.device == "cpu" else options.device)
    text = markdown(run.rows, run.failures, facts)
    (options.out / "speed.md").write_text(text)
    write_json(options.out / "speed.json", run.rows, run.failures, facts)
    print(f"\n{text}\n{len(run.rows)} measurements in {run.seconds():.0f} s")
    return 1 if run.failures or any(row.error and not row.peer for row in run.rows) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="what to measure")
    parser.add_argument("--frontend", choices=(*FRONTENDS, "both"), default="both", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("speed-out"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny tables, to see that everything works; the numbers mean nothing")
    options = parser.parse_args(arguments)
    cuda = dualbin.backends()["cuda"]
    if options.device == "cuda" and not cuda["devices"]:
        parser.error("--device cuda: " + ("there is no NVIDIA GPU" if cuda["built"] else "dualbin is built without CUDA"))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


def prepare_environment(device: str) -> None:
    """What JAX reads when it is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory in the same process
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Run:
    """The measurements on one device.

    Attributes:
        rows: a row for each case and dtype.
        failures: a line for each frontend that could not be measured.
        facts: the device's name and its bandwidth, by the first frontend.
    """

    def __init__(self, device: str, small: bool) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.facts: dict[str, Any] = {}
        self._device, self._start = device, time.monotonic()
        self._data = [Data(workload) for workload in workloads(device, small)]
        self._copy_bytes = 2**25 if small else 2**29 if device == "cpu" else 2**32

    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)

    def measure(self, frontend: str) -> None:
        """All workloads in all dtypes."""
        module = importlib.import_module(FRONTENDS[frontend])
        if name := module.start(self._device):
            self.facts.setdefault("device", name)
        clock = module.clock(self._device, self._copy_bytes)
        self.facts.setdefault("copy", {"frontend": frontend, "bytes": self._copy_bytes, "gb_s": clock.bandwidth / 1e9})
        self._say(f"{frontend}: a copy runs at {clock.bandwidth / 1e9:.1f} GB/s")
        for data in self._data:
            for dtype in DTYPES:
                for case in module.cases(data, dtype, self._device):
                    row = self._row(case, clock, data.workload, frontend, dtype)
                    self.rows.append(row)
                    self._say(str(row))
                gc.collect()
                module.release()

    def _row(self, case: Case, clock: Clock, workload: Workload, frontend: str, dtype: str) -> Row:
        floor = case.bytes / self.facts["copy"]["gb_s"] / 1e3
        facts = (str(workload), frontend, case.direction, case.name, dtype, case.peer, case.bytes, floor)
        try:
            return Row(*facts, [seconds * 1e6 for seconds in clock.times(case.prepare())])
        except Exception as error:  # whatever stops one case, the others are still worth measuring
            return Row(*facts, [], error=describe(error))

    def _say(self, what: str) -> None:
        print(f"[{self.seconds():5.1f} s] {what}", flush=True)


def describe(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def environment(device: str, arguments: list[str]) -> dict[str, Any]:
    """What is needed to understand the numbers later."""
    versions = {"dualbin": dualbin.__version__}
    for package in ("torch", "triton", "jax", "jaxlib", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    backends = dualbin.backends()
    return {
        "command": shlex.join(["python", "benchmarks/speed.py", *arguments]),
        "driver": driver() if device == "cuda" else None,
        "python": platform.python_version(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
        "versions": versions,
        "native": backends["native"],
        "simd": backends["simd"],
        "fallbacks": backends["fallbacks"],
    }


def driver() -> str:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
