"""`python -m ranks.deaths FOLDER WORLD DEATHS SEED`, with tests/ on the path: ranks that die while they exchange rows or save a checkpoint.

Every kind of training is run once by WORLD ranks of gloo to the end. Then one of the ranks is killed, or stops answering, at a random
moment after one of its collective calls has begun. The others have to raise in time, with tables and states of the step before or of a
finished one, as the undisturbed run had them. The same in the middle of a save: the last checkpoint that is whole has to load.

A script of its own, which forks a process for every rank; what is wrong it says, and exits with 1.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # (optimizers import it; once for all ranks)
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import dualbin.torch as dbt
from dualbin import rules
from dualbin.torch import _distributed

ROWS, DIM, STEPS = 211, 40, 6
TIMEOUT = 2.0  #: seconds until a collective call raises
GRACE = 5.0  #: seconds more for a machine that is busy

Fault = Callable[[], None]


class Training:
    """The tables of this rank, and what a step is."""

    def __init__(self, kind: str, rank: int) -> None:
        torch.manual_seed(0)
        self.kind, self.rank = kind, rank
        make: Any = dbt.ShardedBinaryEmbedding if kind == "sharded" else dbt.BinaryEmbedding
        self.modules = torch.nn.ModuleList(make(ROWS, DIM, planes=planes) for planes in (2, 1))
        self.tables = [module.weight for module in self.modules]
        windows = 1 if kind == "sharded" else 2  # which XORCheckpoint wants closed
        groups = [{"params": [self.tables[0]]}, {"params": [self.tables[1]], "rule": rules.Counter(4, every=windows)}]
        self.optimizer = dbt.XOR(groups, rule=rules.Counter(4), shard_state=kind == "divided")

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(1000 * number + self.rank)
        for module in self.modules:
            y = module(torch.randint(0, ROWS, (300,), generator=generator))
            y.backward(torch.randn(y.shape, generator=generator))
        if self.kind == "replicas":
            dbt.sync_row_grads(self.tables)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved(self) -> dict[str, Any]:
        return {"modules": self.modules, "xor": dbt.XORCheckpoint(self.modules, self.optimizer)}

    def digest(self) -> str:
        """Of bits, scales and states."""
        found = hashlib.sha256()
        for table in self.tables:
            arrays = {"bits": table.bits, "scale": table.scale, **self.optimizer.state.get(table, {})}
            for name, value in sorted(arrays.items()):
                found.update(name.encode() + (value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode()))
        return found.hexdigest()


# ---- what a rank does; it leaves a report ------------------------------------------------------------------------------------------------


def count_calls(fault: Fault | None, at: int) -> list[int]:
    """Count the collective calls of this rank from now on, and have the fault happen in one of them."""
    calls: list[int] = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(len(calls))
            if fault is not None and len(calls) - 1 == at:
                fault()
            return function(*args, **options)

        return call

    dist.all_to_all_single = counted(dist.all_to_all_single)
    _distributed._all_gather = counted(_distributed._all_gather)
    return calls


def in_a_moment(number: signal.Signals, seconds: float) -> Fault:
    """Send this process a signal, from another thread."""

    def wait() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), number)

    return lambda: threading.Thread(target=wait).start()


def train(kind: str, rank: int, fault: Fault | None, at: int) -> dict[str, Any]:
    training = Training(kind, rank)
    dist.barrier()
    calls, digests = count_calls(fault, at), [training.digest()]
    for number in range(STEPS):
        start = time.monotonic()
        try:
            training.step(number)
        except Exception as error:
            return {
                "steps": number,
                "error": f"{type(error).__name__}: {error}",
                "seconds": time.monotonic() - start,
                "digest": training.digest(),
            }
        digests.append(training.digest())
    return {"steps": STEPS, "digests": digests, "calls": len(calls)}


def save(folder: Path, rank: int, fault: Fault | None, at: int) -> dict[str, Any]:
    """Save after every step, each time into a folder of its own; the fault happens in one of the saves."""
    training = Training("sharded", rank)
    digests = []
    for number in range(STEPS):
        training.step(number)
        digests.append(training.digest())
        if fault is not None and number == at:
            fault()
        try:
            dcp.save(training.saved(), checkpoint_id=folder / str(number))
        except Exception as error:
            return {"steps": number, "error": f"{type(error).__name__}: {error}"}
    return {"steps": STEPS, "digests": digests}


def load(folder: Path, rank: int) -> dict[str, Any]:
    """The last checkpoint that is whole: torch writes `.metadata` when everything else is there."""
    whole = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if not whole:
        return {"loaded": -1}
    training = Training("sharded", rank)
    training.tables[0].bits.zero_()
    dcp.load(training.saved(), checkpoint_id=folder / str(max(whole)))
    return {"loaded": max(whole), "digest": training.digest()}


# ---- runs of all ranks -------------------------------------------------------------------------------------------------------------------


def run(folder: Path, world: int, job: Callable[[int], dict[str, Any]], victim: int | None = None) -> list[dict[str, Any] | None]:
    """The reports of the ranks of a job; None: it left none. When all others have ended, the victim is killed if it still lives."""
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    children = [fork(folder, rank, world, job) for rank in range(world)]
    for rank, child in enumerate(children):
        if rank != victim:
            os.waitpid(child, 0)
    if victim is not None:
        os.kill(children[victim], signal.SIGKILL)  # it has not been waited for: no other process has its number
        os.waitpid(children[victim], 0)
    reports = []
    for rank in range(world):
        file = folder / f"{rank}.json"
        reports.append(json.loads(file.read_text()) if file.exists() else None)
        file.unlink(missing_ok=True)
    return reports


def fork(folder: Path, rank: int, world: int, job: Callable[[int], dict[str, Any]]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        timeout = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
        report = job(rank)
    except BaseException:
        report = {"failure": traceback.format_exc()}
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(report))
    part.rename(folder / f"{rank}.json")  # whole or not there: the victim may be killed while it writes
    os._exit(0)


def wrong_survivor(report: dict[str, Any] | None, whole: dict[str, Any]) -> str | None:
    """What is wrong with a rank whose peer has died."""
    if report is None or "failure" in report:
        return f"no report: {report}"
    if report["steps"] == STEPS:  # it needed nothing more of the other
        return None if report["digests"] == whole["digests"] else "another result than that of the undisturbed run"
    if report["seconds"] > TIMEOUT + GRACE:
        return f"raised after {report['seconds']:.1f} s"
    before, after = whole["digests"][report["steps"] : report["steps"] + 2]
    if report["digest"] not in {before, after}:
        return f"step {report['steps']} is torn; {report['error']}"
    return None


def deaths_in_training(folder: Path, world: int, rng: random.Random, count: int) -> Iterator[str]:
    whole = {kind: run(folder, world, lambda rank, kind=kind: train(kind, rank, None, 0)) for kind in ("sharded", "replicas", "divided")}
    raised = 0
    for number in range(count):
        kind, victim = list(whole)[number % 3], rng.randrange(world)
        expected = whole[kind]
        assert all(report is not None and "digests" in report for report in expected), expected
        kill = signal.SIGSTOP if number % 10 == 3 else signal.SIGKILL
        at, seconds = rng.randrange(expected[victim]["calls"]), rng.choice((0.0, rng.uniform(0, 1e-3)))  # type: ignore[index]
        fault = in_a_moment(kill, seconds)

        def job(rank: int, kind: str = kind, victim: int = victim, fault: Fault = fault, at: int = at) -> dict[str, Any]:
            return train(kind, rank, fault if rank == victim else None, at)

        for rank, report in enumerate(run(folder, world, job, victim)):
            if rank != victim:
                raised += report is not None and "error" in report
                if (wrong := wrong_survivor(report, expected[rank])) is not None:  # type: ignore[arg-type]
                    yield f"death {number}, {kind}, {kill.name} of rank {victim} in call {at}: rank {rank}: {wrong}"
    if raised < count // 2:
        yield f"only {raised} ranks raised in {count} deaths"


def deaths_in_saves(folder: Path, world: int, rng: random.Random, count: int) -> Iterator[str]:
    whole = run(folder, world, lambda rank: save(folder / "whole", rank, None, 0))
    assert all(report is not None and "digests" in report for report in whole), whole
    for number in range(count):
        victim, at = rng.randrange(world), rng.randrange(1, STEPS)
        fault, saves = in_a_moment(signal.SIGKILL, rng.uniform(0, 0.03)), folder / f"saves-{number}"

        def job(rank: int, victim: int = victim, fault: Fault = fault, at: int = at, saves: Path = saves) -> dict[str, Any]:
            return save(saves, rank, fault if rank == victim else None, at)

        run(folder, world, job, victim)
        for rank, report in enumerate(run(folder, world, lambda rank, saves=saves: load(saves, rank))):
            where = f"kill {number}, of rank {victim} in save {at}: rank {rank}"
            if report is None or "failure" in report:
                yield f"{where}: {report}"
            elif report["loaded"] < at - 1:
                yield f"{where}: the last whole checkpoint is {report['loaded']}"
            elif report["digest"] != whole[rank]["digests"][report["loaded"]]:  # type: ignore[index]
                yield f"{where}: checkpoint {report['loaded']} is another one than that of the undisturbed run"


def main() -> None:
    folder, (world, count, seed) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.set_num_threads(1)
    faults = [*deaths_in_training(folder, world, random.Random(seed), count)]
    faults += deaths_in_saves(folder, world, random.Random(seed), -(-count // 2))
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
