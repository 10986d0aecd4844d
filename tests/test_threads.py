"""Updates of different tables in several threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from dualbin import _native, reference, rules

V, D, N, STEPS, TABLES = 1_000, 256, 4_000, 8, 4
RULE = rules.resolve(rules.Counter(8), 1, D)
NATIVE = _native.Rule(**RULE.native())


class Trained:
    """A table that trains on batches of its own; `contents` says what has become of it."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.bits, self.scale = reference.pack(rng.normal(size=(V, D)).astype(np.float32)), np.full((V, 1), 0.3, np.float32)
        self.state = {name: np.zeros(*spec) for name, spec in rules.state_layout(RULE, V, D, train_scale=True).items()}
        self.batches = [(rng.integers(0, V, N), rng.standard_normal((N, D), np.float32)) for _ in range(2)]
        self.workspace = np.zeros(_native.workspace_bytes("update", -1, 1, N, V, D), np.uint8)

    def train(self) -> None:
        for step in range(STEPS):
            context = (7, step, 0, 1.0, 3e-3)
            _native.update(self.bits, self.scale, D, self.state, NATIVE, context, *self.batches[step % 2], self.workspace)

    def contents(self) -> list[Any]:
        return [self.bits.tobytes(), self.scale.tobytes(), *(self.state[name].tobytes() for name in sorted(self.state))]


def test_tables_in_threads_have_the_bits_of_one_thread() -> None:
    alone, together = ([Trained(seed) for seed in range(TABLES)] for _ in range(2))
    start = together[0].contents()
    for table in alone:
        table.train()
    threads = [threading.Thread(target=table.train) for table in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [table.contents() for table in together] == [table.contents() for table in alone]
    assert together[0].contents() != start
