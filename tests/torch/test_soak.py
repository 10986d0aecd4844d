"""Random operations on random tables against the reference, bit for bit, with flat memory, files and threads.

`make test` makes 200 steps, `make soak` 100,000. DUALBIN_SOAK says how many, or with an s how many seconds ("300s"); DUALBIN_PARTS into how
many tests the steps are divided; DUALBIN_TEST_PLATFORM=cuda runs them on a GPU.
"""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import dualbin.torch as dbt
from dualbin import reference, rules

SOAK = os.environ.get("DUALBIN_SOAK", "200")
PARTS = int(os.environ.get("DUALBIN_PARTS", "1"))
DEVICE = "cuda" if os.environ.get("DUALBIN_TEST_PLATFORM") == "cuda" else "cpu"
LIFE = 20  #: steps of a table
WARM = 5  #: tables before memory is measured
DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}

pytestmark = [pytest.mark.cuda] if DEVICE == "cuda" else []


def random_rule(rng: np.random.Generator, planes: int) -> rules.Rule:
    every = int(rng.integers(1, 4))
    if planes == 1 and rng.random() < 0.3:
        return rules.Bop(every=every) if rng.random() < 0.5 else rules.Sign(every=every)
    return rules.Counter(int(rng.integers(planes, 9)), every=every, norm=str(rng.choice(rules.NORMS)))


def random_shape(rng: np.random.Generator) -> tuple[int, int]:
    """Mostly small; one in ten is wider than a GPU's shared rows, with one in a hundred beyond what words of 32 columns are for."""
    kind = rng.random()
    dim = int(rng.integers(1, 200) if kind < 0.9 else rng.integers(200, 1500) if kind < 0.99 else rng.integers(8180, 8210))
    return int(rng.integers(1, 50)), dim


def host(tensor: torch.Tensor) -> Any:
    """A NumPy array of the same dtype."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_same(what: str, got: torch.Tensor | np.ndarray, want: np.ndarray) -> None:
    array = host(got) if isinstance(got, torch.Tensor) else got
    assert (array.shape, array.tobytes()) == (want.shape, want.astype(array.dtype).tobytes()), what


class Life:
    """A table that trains in PyTorch and in the reference."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.planes, (self.rows, self.dim) = rng, int(rng.integers(1, 9)), random_shape(rng)
        self.dtype = list(DTYPES)[rng.integers(3)]
        w = torch.from_numpy(rng.standard_normal((self.rows, self.dim)).astype(np.float32)).to(DEVICE, self.dtype)
        self.bag = dbt.BinaryEmbeddingBag.from_float(w, "sum", planes=self.planes)
        self.table: Any = self.bag.weight
        self.bits, self.scale = reference.pack(host(w.float()), self.planes), reference.row_scale(host(w.float()), self.planes)
        padding = rng.random(self.rows) < 0.1
        self.scale[padding] = 0.0
        with torch.no_grad():
            self.table.scale[torch.from_numpy(padding).to(DEVICE)] = 0.0
        rule = random_rule(rng, self.planes)
        self.options: dict[str, Any] = {"rule": rule, "scale_lr": float(rng.choice([0.0, 3e-3])), "lr": float(rng.choice([0.3, 1.0]))}
        self.options["seed"] = int(rng.integers(2**63))
        self.optimizer = dbt.XOR([self.table], **self.options)
        self.state = reference.init_state(rule, self.rows, self.dim, planes=self.planes, scale_lr=self.options["scale_lr"])

    def step(self) -> None:
        """One update from the gradients of one or two passes, now and then with the state of another optimizer."""
        passes = [self.lookup() if self.rng.random() < 0.8 else self.lookup_bag() for _ in range(1 + (self.rng.random() < 0.2))]
        ids, dy = passes[0] if len(passes) == 1 else added(*passes, self.rows)
        reference.update(self.bits, self.scale, self.state, ids, dy, dim=self.dim, planes=self.planes, **self.options)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rng.random() < 0.1:
            self.change_optimizers()

    def random_ids(self) -> np.ndarray:
        count = int(self.rng.integers(1, 300) if self.rng.random() < 0.95 else self.rng.integers(300, 3000))
        return self.rng.integers(0, self.rows, min(count, 100_000 // self.dim + 1), self.rng.choice([np.int32, np.int64]))

    def random_gradient(self, count: int) -> tuple[torch.Tensor, np.ndarray]:
        dy = (self.rng.standard_normal((count, self.dim)) * 10.0 ** self.rng.integers(-3, 3)).astype(np.float32)
        tensor = torch.from_numpy(dy).to(DEVICE, self.dtype)
        return tensor, host(tensor)

    def lookup(self) -> tuple[np.ndarray, np.ndarray]:
        ids = self.random_ids()
        dy, dy_host = self.random_gradient(len(ids))
        y = dbt.lookup(self.table, torch.from_numpy(ids).to(DEVICE))
        assert_same("lookup", y, reference.lookup(self.bits, self.scale, ids, self.dim, DTYPES[self.dtype], self.planes))
        y.backward(dy)
        return ids, dy_host

    def lookup_bag(self) -> tuple[np.ndarray, np.ndarray]:
        ids = self.random_ids()[:100]  # the reference takes them one by one
        modes = ["sum", "weights", "mean", "majority"][: 3 + (self.planes == 1)]
        mode = str(self.rng.choice(modes))
        starts = np.sort(self.rng.integers(0, len(ids) + 1, int(self.rng.integers(1, 20))))
        starts[0] = 0
        offsets = np.append(starts, len(ids)).astype(ids.dtype)
        weights = self.rng.standard_normal(len(ids)).astype(np.float32) if mode == "weights" else None
        factors = None if weights is None else torch.from_numpy(weights).to(DEVICE).requires_grad_()
        self.bag.mode = "sum" if mode == "weights" else mode
        y = self.bag(torch.from_numpy(ids).to(DEVICE), torch.from_numpy(offsets[:-1]).to(DEVICE), factors)
        arguments = (self.bits, self.scale, ids, offsets, self.dim)
        want = reference.lookup_bag(*arguments, self.bag.mode, weights, DTYPES[self.dtype], planes=self.planes)
        assert_same(f"bag, {mode}", y, want)
        dy, dy_host = self.random_gradient(len(starts))
        y.backward(dy)
        if factors is not None:
            assert factors.grad is not None
            want = reference.bag_weight_gradient(self.bits, self.scale, ids, offsets, dy_host, self.dim, planes=self.planes)
            assert_same("gradient of weights", factors.grad, want)
        counts = reference.bag_counts(self.scale, ids, offsets) if mode == "mean" else None
        return ids, reference.bag_gradient(ids, offsets, dy_host, self.bag.mode, counts, weights)

    def change_optimizers(self) -> None:
        fresh = dbt.XOR([self.table], **self.options)
        if self.rng.random() < 0.5:
            fresh.load_state_dict(self.optimizer.state_dict())
        else:
            fresh.import_state(self.optimizer.export_state({"t": self.table}), {"t": self.table})
        self.optimizer = fresh

    def check(self) -> None:
        """Compare what the steps made of the table and its state, and what can be made of the table."""
        assert_same("bits", self.table.bits, self.bits)
        assert_same("scale", self.table.scale, self.scale)
        exported = self.optimizer.export_state({"t": self.table})["t"]
        for name, value in self.state.items():
            assert_same(name, np.asarray(exported[name]), np.asarray(value))
        fewer = int(self.rng.integers(1, self.planes + 1))
        smaller = self.table.detach().with_planes(fewer)
        bits, scale = reference.with_planes(self.bits, self.scale, self.dim, self.planes, fewer)
        assert_same("bits of fewer planes", smaller.bits, bits)
        assert_same("scale of fewer planes", smaller.scale, scale)
        other, weight = dbt.BinaryTable(self.table.bits.clone(), -self.table.scale.flip(0), self.dim, planes=self.planes), 0.25
        mean = dbt.average(self.table.detach().to(torch.float32), other, weight, step=3, seed=5)
        bits, scale = reference.average(self.bits, self.scale, self.bits, -self.scale[::-1], weight, self.dim, self.planes, seed=5, step=3)
        assert_same("bits of an average", mean.bits, bits)
        assert_same("scale of an average", mean.scale, scale)


def added(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the gradients of two passes: distinct ids, and rows that are added in float32."""
    (ids_a, rows_a), (ids_b, rows_b) = reference.row_gradient(*a, rows), reference.row_gradient(*b, rows)
    ids = np.union1d(ids_a, ids_b)
    total = np.zeros((len(ids), rows_a.shape[1]), np.float32)
    total[np.searchsorted(ids, ids_a)] = rows_a
    place = np.searchsorted(ids, ids_b)
    both = np.isin(ids_b, ids_a)
    total[place[both]] += rows_b[both]
    total[place[~both]] = rows_b[~both]
    return ids, total


def live(number: int) -> None:
    life = Life(np.random.default_rng(number))
    try:
        for _ in range(LIFE):
            life.step()
        life.check()
    except AssertionError as error:
        msg = f"life {number} ({life.options['rule']}, {life.planes} planes, {life.rows} x {life.dim}, {life.dtype}): {error}"
        raise AssertionError(msg) from error


def resources() -> tuple[int, int, int, int]:
    """Resident bytes, bytes of PyTorch on the GPU, open files and threads of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:  # noqa: PTH123
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    allocated = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    return resident, allocated, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208


@pytest.mark.timeout(7200)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")  # noqa: PTH110
@pytest.mark.parametrize("part", range(PARTS))
def test_soak(part: int) -> None:
    seconds = float(SOAK.removesuffix("s")) if SOAK.endswith("s") else None
    steps = None if seconds is not None else int(SOAK) / PARTS
    start, number = time.monotonic(), 0
    before = resources()
    while number < 2 * WARM or (number * LIFE < steps if steps is not None else time.monotonic() - start < seconds):
        live(number * PARTS + part)
        number += 1
        if number == WARM:
            before = resources()
    after = resources()
    print(f"{number * LIFE} steps of {number} tables, part {part + 1} of {PARTS}, in {time.monotonic() - start:.0f} s on {DEVICE}")
    assert after[0] < before[0] + 64 * 2**20, f"resident memory grew from {before[0]} to {after[0]} bytes"
    assert after[1] < before[1] + 2**20, f"memory on the GPU grew from {before[1]} to {after[1]} bytes"
    assert after[2:] == before[2:], "files and threads"
