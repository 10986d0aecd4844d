"""Which run comes next, and the processes that do the runs."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from _quality.clicks import ClickTask
from _quality.data import Task
from _quality.variants import Family, Variant

_MAX_EXTENSIONS = 3
_GRACE = 30.0  # seconds after the budget in which a run that has begun may end
_RESERVE = 1.2  # a run may take this much longer than those before it

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training run."""

    family: Family
    variant: Variant
    seed: int

    def record(self) -> Record:
        """What a line of results.jsonl says about the run before its outcome."""
        return {
            "task": self.family.task,
            "family": self.family.name,
            "variant": self.variant.describe(),
            "options": dict(self.variant.options),
            "seed": self.seed,
        }


class Plan:
    """Hands out runs in order of priority.

    Of a family, every candidate runs with seed 0 first; then the best one on the first half of the held-out text with the other seeds.
    """

    def __init__(self, families: list[Family], seeds: int) -> None:
        self._families = families
        self._seeds = seeds
        self._candidates = {id(family): list(family.candidates) for family in families}
        self._taken: set[tuple[int, str, int]] = set()
        self._losses: dict[tuple[int, str], float] = {}

    def next(self) -> Job | None:
        """The next run that can start now; None if there is none (perhaps because others have to end first)."""
        for family in self._families:
            job = self._open(family)
            if job is not None:
                self._taken.add(_key(job))
                return job
        return None

    def finished(self, job: Job, loss: float) -> None:
        """Take note of a run's loss on the first half of the held-out text; infinity if the run failed."""
        if job.seed == 0:
            self._losses[id(job.family), job.variant.describe()] = loss

    def _open(self, family: Family) -> Job | None:
        candidates = self._candidates[id(family)]
        for variant in candidates:
            job = Job(family, variant, 0)
            if _key(job) not in self._taken:
                return job
        best = candidates[0]
        if len(candidates) > 1 or family.grid:
            losses = [self._losses.get((id(family), variant.describe())) for variant in candidates]
            known = [loss for loss in losses if loss is not None]
            if len(known) < len(candidates):
                return None
            best = candidates[losses.index(min(known))]
            if family.grid and self._extend(family, best):
                return Job(family, self._candidates[id(family)][-1], 0)
        jobs = (Job(family, best, seed) for seed in range(1, min(family.seeds, self._seeds)))
        return next((job for job in jobs if _key(job) not in self._taken), None)

    def _extend(self, family: Family, best: Variant) -> bool:
        """Add a candidate beyond the edge of the grid at which the best one is, if it is at an edge."""
        candidates = self._candidates[id(family)]
        name = family.grid
        assert name is not None
        rates = sorted({variant.options[name] for variant in candidates})
        if len(candidates) >= len(family.candidates) + _MAX_EXTENSIONS or len(rates) < 2:
            return False
        if best.options[name] == rates[-1]:
            rate = rates[-1] * rates[-1] / rates[-2]
        elif best.options[name] == rates[0]:
            rate = rates[0] * rates[0] / rates[1]
        else:
            return False
        candidates.append(Variant(best.kind, {**best.options, name: float(f"{rate:.3g}")}))
        return True


def _key(job: Job) -> tuple[int, str, int]:
    return id(job.family), job.variant.describe(), job.seed


# ---- worker processes --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know. The tasks are those of one file of data."""

    frontend: str
    device: str
    data: Path
    tasks: dict[str, Task] | dict[str, ClickTask]
    threads: int
    gpus: int = 1

    def runner(self) -> Any:
        """What trains, with the data in it; imports the framework."""
        if "clicks" in self.tasks:
            from _quality import flights
            from _quality.train_clicks import Runner as ClickRunner

            return ClickRunner(flights.load(self.data), self.device, self.threads)
        if self.frontend == "torch":
            from _quality.train_torch import Runner
        else:
            from _quality.train_jax import Runner
        from _quality.data import load

        vocabulary = max(task.vocabulary for task in self.tasks.values())
        return Runner(load(self.data, vocabulary), self.device, self.threads)


def work(pipe: Connection, setup: Setup, worker: int) -> None:
    """Body of a worker: receive (task, variant, seed), send the outcome; None ends it."""
    if setup.gpus > 1:  # before anything looks for them
        os.environ["CUDA_VISIBLE_DEVICES"] = str(worker % setup.gpus)
    runner = setup.runner()
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, variant, seed = order
        start = time.perf_counter()
        try:
            outcome = runner.run(setup.tasks[name], variant, seed)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
        pipe.send(outcome | {"seconds": round(time.perf_counter() - start, 2)})


class Pool:
    """Runs a plan on worker processes, and writes every result at once.

    Args:
        setup: for the workers.
        workers: how many processes for each GPU.
        results: file to which a JSON line is appended for every run.
        budget: seconds after `start` in which runs have to end; a run that probably would not is not begun.
        start: time.monotonic() of the beginning.
    """

    def __init__(self, setup: Setup, workers: int, results: Path, budget: float, start: float) -> None:
        self._results, self._budget, self._start = results, budget, start
        self._setup = setup
        self._seconds: dict[str, float] = {}
        context = mp.get_context("spawn")
        self._processes: dict[Connection, mp.process.BaseProcess] = {}
        self._jobs: dict[Connection, Job | None] = {}
        for worker in range(workers * setup.gpus):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, setup, worker), daemon=True)
            process.start()
            there.close()
            self._processes[here], self._jobs[here] = process, None

    def run(self, plan: Plan, report: Callable[[Record], None]) -> bool:
        """Do the runs of `plan`; True if all were done, False if the budget ended or every worker died.

        Args:
            plan: what to run.
            report: called with every record.
        """
        idle: list[Connection] = []
        complete = True
        while self._processes:
            while idle and (job := self._affordable(plan)) is not None:
                pipe = idle.pop()
                self._jobs[pipe] = job
                pipe.send((job.family.task, job.variant, job.seed))
            if len(idle) == len(self._processes):
                complete = plan.next() is None
                break
            remaining = self._budget + _GRACE - self._elapsed()
            ready = wait(list(self._processes), timeout=max(0.0, remaining))
            if not ready:
                complete = False
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                if self._receive(pipe, plan, report):
                    idle.append(pipe)
        complete = complete and bool(self._processes)
        self._close(idle)
        return complete

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _affordable(self, plan: Plan) -> Job | None:
        longest = max(self._seconds.values(), default=0.0)
        return plan.next() if self._elapsed() + _RESERVE * longest < self._budget else None

    def _receive(self, pipe: Connection, plan: Plan, report: Callable[[Record], None]) -> bool:
        """Handle what a worker sent; False if it has died."""
        job, self._jobs[pipe] = self._jobs[pipe], None
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes.pop(pipe)
            process.join()
            message = {"error": f"the worker died with exit code {process.exitcode}"}
            if job is None:
                report({"error": message["error"]})
        if job is not None:
            self._seconds[job.family.task] = message.get("seconds", 0.0)
            record = {"frontend": self._setup.frontend, **job.record(), **message, "at": round(self._elapsed(), 1)}
            with self._results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            plan.finished(job, record.get("selection", float("inf")))
            report(record)
        return pipe in self._processes

    def _close(self, idle: list[Connection]) -> None:
        for pipe, process in self._processes.items():
            if pipe in idle:
                pipe.send(None)
                process.join(20)
            if process.is_alive():
                process.terminate()
                process.join()
