"""`python workers.py`: lookups in processes that a process with OpenMP threads has forked or spawned, as DataLoader workers are."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import dualbin.torch as dbt

ROWS, DIM, COUNT = 5_000, 64, 4_000


class Lookups(Dataset[Any]):
    """Item i: what a worker looks up, and the batch's number of threads. The last one writes into the table."""

    def __init__(self, table: dbt.BinaryTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        y = dbt.lookup(self.table, ids(index))
        if index == 2:
            self.table.scale[7] = 123.0
        return y


def ids(index: int) -> torch.Tensor:
    return torch.randint(0, ROWS, (COUNT,), generator=torch.Generator().manual_seed(index))


def forked(table: dbt.BinaryTable) -> None:
    """A process forked by hand, where torch still says four threads."""
    want = dbt.lookup(table, ids(0)).numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # the thread pool that hangs cannot be interrupted in another way
        same = torch.get_num_threads() == 4 and dbt.lookup(table, ids(0)).numpy().tobytes() == want
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def loaded(table: dbt.BinaryTable, method: str) -> None:
    want = [dbt.lookup(table, ids(index)) for index in range(3)]
    loader = DataLoader(Lookups(table), batch_size=None, num_workers=1, multiprocessing_context=method, timeout=60)
    for got, expected in zip(loader, want, strict=True):
        assert torch.equal(got, expected)
    assert table.scale[7] == 123.0  # shared memory: the worker's write is seen here
    table.scale[7] = 1.0


def main() -> None:
    torch.set_num_threads(4)
    table = dbt.BinaryTable.from_float(torch.randn(ROWS, DIM)).share_memory_()
    table.scale[7] = 1.0
    forked(table)
    for method in ("fork", "spawn"):
        loaded(table, method)


if __name__ == "__main__":
    main()
