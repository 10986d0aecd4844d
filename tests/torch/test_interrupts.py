"""Ctrl-C at any moment of a step: of every table it has happened whole, or not at all."""

from __future__ import annotations

import copy
import random
import signal
import time
from typing import Any

import pytest
import torch

import dualbin.torch as dbt
from dualbin import rules

V, D, N = 60, 100, 300
RULES = [rules.Counter(8), rules.Counter(3, every=3), rules.Bop(every=2)]
TIMES = 250  # for each rule


class Pair:
    """Two optimizers on equal tables that get the same gradients; the second one is never interrupted."""

    def __init__(self, rule: rules.Rule, capturable: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(V, D, generator=generator) for _ in range(2)]
        self.runs = []
        for _ in range(2):
            tables = [torch.nn.Parameter(dbt.BinaryTable.from_float(w)) for w in weights]
            self.runs.append((tables, dbt.XOR(tables, rule=rule, capturable=capturable)))
        self.ids, self.rows = torch.randint(0, V, (N,), generator=generator), torch.randn(N, D, generator=generator)

    def step(self, run: int) -> None:
        tables, optimizer = self.runs[run]
        for table in tables:
            table.grad = dbt.RowGrad(self.ids, self.rows, (V, D))
        optimizer.step()

    def table(self, run: int, index: int) -> dict[str, Any]:
        tables, optimizer = self.runs[run]
        table = tables[index]
        state = optimizer.state.get(table) or {"step": 0}
        return copy.deepcopy({"bits": table.bits, "scale": table.scale, "stats": optimizer.stats(table), **state})


def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return set(a) == set(b) and all(torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name] for name, x in a.items())


def interrupted(call: Any, seconds: float) -> bool:
    """Whether KeyboardInterrupt came out of `call`, of which SIGALRM makes one after `seconds`."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        torch.set_grad_enabled(True)  # torch.no_grad itself can be torn
    return False


@pytest.fixture
def alarm() -> Any:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(("rule", "capturable"), [*((rule, False) for rule in RULES), (rules.Counter(8), True)], ids=str)
def test_an_interrupted_step_of_a_table_is_whole_or_has_not_happened(rule: rules.Rule, capturable: bool) -> None:
    pair, seconds, hits = Pair(rule, capturable), [], 0
    pick = random.Random(5)
    for run in (0, 1):
        pair.step(run)
    for _ in range(TIMES):
        before = [pair.table(0, index) for index in (0, 1)]
        start = time.perf_counter()
        pair.step(1)
        seconds.append(time.perf_counter() - start)
        after = [pair.table(1, index) for index in (0, 1)]
        hit = interrupted(lambda: pair.step(0), pick.uniform(1e-6, 1.2 * sorted(seconds[-9:])[len(seconds[-9:]) // 2]))
        hits += hit
        got = [pair.table(0, index) for index in (0, 1)]
        whole = all(map(is_same, got, after))
        assert whole or (hit and all(map(is_same, got, before)))
        if not whole:
            pair.step(0)
            assert all(map(is_same, [pair.table(0, index) for index in (0, 1)], after))
    assert hits > TIMES // 10
