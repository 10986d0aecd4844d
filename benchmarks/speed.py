"""Time lookups and updates beside what has to move, and beside what else there is in PyTorch and JAX.

    python benchmarks/speed.py --device cuda --out results

The floor of a call is the time in which the device copies as many bytes as the call has to move: N*D values written, their packed rows,
scales and ids read in a lookup; N*D values and N ids read, and the bits and counters of the distinct rows read and written in an update.
How fast the device copies is measured first, in the same run. On a GPU the times are those of the device: calls are queued behind other
work, as in a training step; what small calls cost the host is a topic of its own. On a CPU they are wall times of single calls. Writes to
the output folder, anew after each workload, so that a run that is ended leaves what it has:

    speed.md        the tables
    speed.json      the same with all samples, the bytes, and what it ran on

With --plot FILE it measures nothing, but draws such a JSON file as docs/images/speed.png.
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
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _speed.cases import BAGS, CALLS, LOOKUPS, STEPS, TOPICS, UPDATES, Case, Group
from _speed.picture import plot
from _speed.report import Row, compare, markdown, write_json
from _speed.timing import Clock, Skip

import dualbin

FRONTENDS = {"torch": "_speed.torch_cases", "jax": "_speed.jax_cases"}
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "speed.png"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plot:
        print(f"{PICTURE}: {plot(options.plot, PICTURE)} bars")
        return 0
    prepare_environment(options.device)
    facts = environment(options.device, sys.argv[1:] if arguments is None else arguments)
    run = Run(options.device, options.small, options.what, options.only, options.out, facts)
    for frontend in FRONTENDS if options.frontend == "both" else (options.frontend,):
        try:
            run.measure(frontend)
        except Exception as error:  # the other frontend can still be measured; this one becomes a line
            run.fail(frontend, error)
    print(f"\n{run.write()}\n{len(run.rows)} measurements in {run.seconds():.0f} s")
    return 1 if run.failures or any(row.failed and not row.peer for row in run.rows) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--device", choices=("cpu", "cuda"), help="what to measure")
    target.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed.json of a run, and measure nothing")
    parser.add_argument("--frontend", choices=(*FRONTENDS, "both"), default="both", help="default: %(default)s")
    parser.add_argument("--what", type=topics, metavar="TOPIC,...", help=f"of {', '.join(TOPICS)} (default: all, on a CPU those of tables)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose line has this text; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("speed-out"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny tables, to see that everything works; the numbers mean nothing")
    options = parser.parse_args(arguments)
    if options.plot:
        if not options.plot.is_file():
            parser.error(f"--plot: there is no file {options.plot}")
        return options
    options.what = options.what or (TOPICS if options.small or options.device == "cuda" else (UPDATES, LOOKUPS, STEPS, BAGS))
    cuda = dualbin.backends()["cuda"]
    if options.device == "cuda" and not cuda["devices"]:
        parser.error("--device cuda: " + ("there is no NVIDIA GPU" if cuda["built"] else "dualbin is built without CUDA"))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


def topics(text: str) -> tuple[str, ...]:
    """The topics in a list with commas, in the order in which they run."""
    names = text.split(",")
    if wrong := [name for name in names if name not in TOPICS]:
        msg = f"{', '.join(wrong)}: not among {', '.join(TOPICS)}"
        raise argparse.ArgumentTypeError(msg)
    return tuple(topic for topic in TOPICS if topic in names)


def prepare_environment(device: str) -> None:
    """What JAX reads when it is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory in the same process
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Run:
    """The measurements on one device.

    Args:
        device: "cpu" or "cuda".
        small: tiny tables.
        what: topics.
        only: texts of which a case must have one; all cases if there is none.
        out: the folder of results.
        facts: what is known about the run.

    Attributes:
        rows: a row for each case and dtype.
        failures: a line for each frontend or topic that could not be measured.
        facts: these, with the device's name and its bandwidth, by the first frontend.
    """

    def __init__(self, device: str, small: bool, what: Sequence[str], only: Sequence[str], out: Path, facts: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.facts = dict(facts)
        self._device, self._small, self._what, self._only, self._out = device, small, what, [text.lower() for text in only], out
        self._start = time.monotonic()
        self._copy_bytes = 2**25 if small else 2**29 if device == "cpu" else 2**32

    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)

    def measure(self, frontend: str) -> None:
        """All topics in one frontend."""
        module = importlib.import_module(FRONTENDS[frontend])
        if name := module.start(self._device):
            self.facts.setdefault("device", name)
        clock = module.clock(self._device, self._copy_bytes)
        self.facts.setdefault("copy", {"frontend": frontend, "bytes": self._copy_bytes, "gb_s": clock.bandwidth / 1e9})
        self._say(f"{frontend}: a copy runs at {clock.bandwidth / 1e9:.1f} GB/s")
        for topic in self._what:
            try:
                for group in module.groups(topic, self._device, self._small):
                    self._group(group, clock, module, frontend)
                if topic == CALLS and hasattr(module, "launches"):
                    self.facts["launches"] = module.launches(self._device, self._small)
            except Skip as reason:
                self._say(f"{frontend}, {topic}: skipped: {reason}")
            except Exception as error:  # the other topics can still be measured
                self.fail(f"{frontend}, {topic}", error)
            self.write()

    def fail(self, what: str, error: Exception) -> None:
        """Make a line of the error."""
        self.failures.append(f"{what}: {describe(error)}")
        self._say(f"{what}: FAILED: {describe(error)}")

    def write(self) -> str:
        """Write what there is by now; returns the tables."""
        compare(self.rows)
        facts = {**self.facts, "seconds": self.seconds()}
        facts.setdefault("device", cpu_name() if self._device == "cpu" else self._device)
        text = markdown(self.rows, self.failures, facts)
        (self._out / "speed.md").write_text(text)
        write_json(self._out / "speed.json", self.rows, self.failures, facts)
        return text

    def _group(self, group: Group, clock: Clock, module: Any, frontend: str) -> None:
        before = None
        for case in group.cases:
            if self._only and not any(text in _line(group, frontend, case).lower() for text in self._only):
                continue
            if before is None:
                gc.collect()
                module.release()
                before = module.peak_memory() or 0
            row = self._row(case, clock, group, frontend)
            if group.memory and row.median_us is not None and (most := module.peak_memory()) is not None:
                row.memory = most - before
            self.rows.append(row)
            self._say(str(row))
        if before is not None:
            self.write()

    def _row(self, case: Case, clock: Clock, group: Group, frontend: str) -> Row:
        floor = case.bytes / self.facts["copy"]["gb_s"] / 1e3
        facts = (group.workload, frontend, case.direction, case.name, group.dtype, case.peer, case.bytes, floor)
        try:
            return Row(*facts, [seconds * 1e6 for seconds in case.time(clock, case.prepare())])
        except Skip as reason:
            return Row(*facts, [], error=str(reason), skipped=True)
        except Exception as error:  # whatever stops one case, the others are still worth measuring
            return Row(*facts, [], error=describe(error))

    def _say(self, what: str) -> None:
        print(f"[{self.seconds():5.1f} s] {what}", flush=True)


def _line(group: Group, frontend: str, case: Case) -> str:
    return f"{group.workload}, {frontend}, {case.direction}, {group.dtype}: {case.name}"


def describe(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def environment(device: str, arguments: list[str]) -> dict[str, Any]:
    """What is needed to understand the numbers later."""
    versions = {"dualbin": dualbin.__version__}
    for package in ("torch", "triton", "jax", "jaxlib", "numpy", "fbgemm_gpu"):
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
