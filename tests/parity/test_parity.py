"""Every back end against the reference: bits, scale and state equal after 50 steps, bit for bit.

`make test` runs a selection that covers every pair of values; `make parity` runs the full product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest

from dualbin import reference
from parity import cases
from parity.backends import BACKENDS, Native, NativeCuda, Result, assert_same, run_reference


@functools.lru_cache(maxsize=64)
def problem_and_result(case: cases.Case) -> tuple[cases.Problem, Result]:
    problem = cases.make_problem(case)
    return problem, run_reference(problem)


def _marks(backend: str, extra: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    return (*((pytest.mark.cuda,) if backend.endswith("cuda") else ()), *extra)


def _params() -> list[Any]:
    """Back ends of one case follow each other: they share the problem and the result of the reference."""
    thin = set(cases.thin())
    pairs = [(c, b) for c in cases.covering() for b in BACKENDS if c in thin or not b.startswith("jax")]
    return [pytest.param(c, b, marks=_marks(b), id=f"{c}-{b}") for c, b in pairs]


def _product_params() -> list[Any]:
    """Back ends of one rule and width stay in one process, which computes the reference once for all of them; the longest come first."""
    return [
        pytest.param(rule, dim, backend, marks=_marks(backend, (pytest.mark.xdist_group(f"{rule}-{dim}"),)))
        for dim, rule, backend in itertools.product(reversed(cases.DIMS), cases.RULES, BACKENDS)
    ]


def check(case: cases.Case, backend: str) -> None:
    if not backend.startswith("native"):
        pytest.importorskip(backend.removesuffix("-cuda"))
    problem, want = problem_and_result(case)
    assert_same(BACKENDS[backend](problem), want)


@pytest.mark.parametrize(("case", "backend"), _params())
def test_pairs(case: cases.Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parity
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("rule", "dim", "backend"), _product_params())
def test_full_product(rule: str, dim: int, backend: str) -> None:
    """All types of ids and gradients and all patterns of one rule and width."""
    for ids_dtype, grad_dtype, pattern in itertools.product(cases.IDS_DTYPES, cases.GRAD_DTYPES, cases.PATTERNS):
        case = cases.Case(rule, ids_dtype, grad_dtype, dim, pattern)
        try:
            check(case, backend)
        except AssertionError as error:
            msg = f"{case} on {backend}: {error}"
            raise AssertionError(msg) from error


def test_selection_covers_every_pair() -> None:
    seen = set()
    for case in cases.covering():
        seen |= cases._pairs((case.rule, case.ids_dtype, case.grad_dtype, str(case.dim), case.pattern))
    everything = set().union(*(cases._pairs((c.rule, c.ids_dtype, c.grad_dtype, str(c.dim), c.pattern)) for c in cases.full()))
    assert seen == everything


def test_thin_selection_covers_every_rule_and_pair_of_features() -> None:
    thin, every = cases.thin(), cases.full()
    assert {case.rule for case in thin} == set(cases.RULES)
    assert set().union(*(cases._pairs(case.features) for case in thin)) == set().union(*(cases._pairs(case.features) for case in every))
    assert len(thin) < len(cases.covering()) / 3


# ---- negative controls: the suite has to notice each of these ---------------------------------------------------------------------------

CONTROL = cases.Case("counter2-zone0", "int64", "float32", 100, "repeated")


class WrongSign(Native):
    def update(self, ids: Any, dy: Any, lr: float, step: int) -> None:
        super().update(ids, -dy, lr, step)


class WrongBitOrder(Native):
    def run(self) -> Result:
        reversed_bits = np.packbits(np.unpackbits(self.problem.bits, axis=1), axis=1, bitorder="little")
        self.problem = dataclasses.replace(self.problem, bits=reversed_bits)
        result = super().run()
        result["bits"] = np.packbits(np.unpackbits(result["bits"], axis=1), axis=1, bitorder="little")
        return result


class DroppedDuplicate(Native):
    def update(self, ids: Any, dy: Any, lr: float, step: int) -> None:
        _, first = np.unique(ids, return_index=True)
        keep = np.sort(first)
        super().update(ids[keep], dy[keep], lr, step)


class ShiftedStep(Native):
    def update(self, ids: Any, dy: Any, lr: float, step: int) -> None:
        super().update(ids, dy, lr, step + 1)


class ReorderedSum(Native):
    def update(self, ids: Any, dy: Any, lr: float, step: int) -> None:
        super().update(ids[::-1].copy(), dy[::-1].copy(), lr, step)


PLANES_CONTROL = cases.Case("counter6-planes4", "int64", "float32", 100, "repeated")


class SwappedPlanes(Native):
    """The magnitude planes of the table with the least significant one first."""

    def swap(self, bits: Any) -> Any:
        planes = bits.reshape(len(bits), self.case.planes, -1)
        return np.concatenate([planes[:, :1], planes[:, :0:-1]], axis=1).reshape(bits.shape)

    def run(self) -> Result:
        self.problem = dataclasses.replace(self.problem, bits=self.swap(self.problem.bits))
        result = super().run()
        return result | {"bits": self.swap(result["bits"])}


class SwappedCounter(Native):
    """The planes of the counter with the least significant one first, as files of version 1 have them."""

    def run(self) -> Result:
        result = super().run()
        counter = result["counter"]
        planes = counter.reshape(len(counter), self.problem.rule.bits - self.case.planes, -1)
        return result | {"counter": planes[:, ::-1].reshape(counter.shape)}


class UnclearedPlane(Native):
    """A plane whose bits are only ever set."""

    def update(self, ids: Any, dy: Any, lr: float, step: int) -> None:
        plane = slice(13, 26)  # of 100 columns
        before = self.bits[:, plane].copy()
        super().update(ids, dy, lr, step)
        self.bits[:, plane] |= before


class HalfALevelOff(Native):
    """A scale whose gradient takes a weight for s * 2m, not for s * (2m + 1)."""

    def run(self) -> Result:
        result = super().run()
        odd = np.abs(reference.unpack(result["bits"], self.case.dim, self.case.planes)).mean(axis=1)
        return result | {"scale_m": (result["scale_m"] * (odd - 1) / odd).astype(np.float32)}


@pytest.mark.parametrize("broken", [SwappedPlanes, SwappedCounter, UnclearedPlane, HalfALevelOff])
def test_suite_notices_planes(broken: type[Native]) -> None:
    problem, want = problem_and_result(PLANES_CONTROL)
    assert_same(Native(problem).run(), want)
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same(broken(problem).run(), want)


@pytest.mark.parametrize("broken", [WrongSign, WrongBitOrder, DroppedDuplicate, ShiftedStep])
def test_suite_notices(broken: type[Native]) -> None:
    problem, want = problem_and_result(CONTROL)
    assert_same(Native(problem).run(), want)
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same(broken(problem).run(), want)


def test_suite_notices_the_order_of_summation() -> None:
    """The order shows where rounding does: in the moments of the scale of a row with thousands of occurrences."""
    problem, want = problem_and_result(cases.Case("counter8", "int64", "float32", 4096, "hot"))
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same(ReorderedSum(problem).run(), want)


@pytest.mark.parametrize("backend", [Native, pytest.param(NativeCuda, marks=pytest.mark.cuda)])
def test_shards_hash_the_rows_of_the_whole_table(backend: type[Native]) -> None:
    problem, want = problem_and_result(CONTROL)
    moved = 1 << 33
    bits, scale, state = problem.bits.copy(), problem.scale.copy(), reference.init_state(problem.rule, len(problem.bits), CONTROL.dim)
    for step in range(cases.STEPS):
        ids, dy = problem.batches[step % len(problem.batches)]
        reference.update(
            bits, scale, state, ids, dy, rule=problem.rule, dim=CONTROL.dim, lr=CONTROL.lr(step), seed=cases.SEED, first_row=moved
        )
    assert not np.array_equal(bits, want["bits"])
    assert_same(backend(problem, first_row=moved).run(), {"bits": bits, "scale": scale, **state})


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_do_not_change_bits(threads: int) -> None:
    problem, want = problem_and_result(cases.Case("counter5", "int32", "float16", 767, "hot"))
    assert_same(Native(problem, threads).run(), want)
