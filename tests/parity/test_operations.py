"""Every back end against the reference, operation by operation, bit for bit.

`make test` runs a selection that covers every pair of values; `make parity` runs the full product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from parity import cases
from parity.operations import (
    AXES,
    BACKENDS,
    OPERATIONS,
    PATTERNS,
    PURE,
    Case,
    Native,
    assert_same,
    covering,
    full,
    make_problem,
    run_reference,
    without_subnormals,
)
from parity.wrong import WRONG


def _runs(operation: str, backend: str) -> bool:
    if operation in {"pack", "unpack"}:  # no operators of the frontends, which call them when a table is made
        return backend.startswith("native")
    return not backend.startswith("pure") or operation in PURE


def _marks(backend: str) -> tuple[Any, ...]:
    return (pytest.mark.cuda,) if backend.endswith("cuda") else ()


def check(case: Case, backend: str) -> None:
    if not backend.startswith("native"):
        pytest.importorskip("jax" if backend.startswith("pure") else backend.removesuffix("-cuda"))
    problem = make_problem(case)
    got, want = BACKENDS[backend](problem), run_reference(problem)
    if backend == "pure":  # XLA makes zeros of them on the CPU, in float16
        got, want = without_subnormals(got), without_subnormals(want)
    assert_same(got, want)


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, marks=_marks(b), id=f"{c}-{b}") for c in covering() for b in BACKENDS if _runs(c.operation, b)],
)
def test_pairs(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parity
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("operation", "dim", "backend"),
    [
        pytest.param(operation, dim, backend, marks=_marks(backend))
        for operation, dim, backend in itertools.product(OPERATIONS, reversed(cases.DIMS), BACKENDS)
        if _runs(operation, backend)
    ],
)
def test_full_product(operation: str, dim: int, backend: str) -> None:
    """All types and patterns of one operation and width."""
    for ids_dtype, dtype, pattern, planes in itertools.product(cases.IDS_DTYPES, cases.GRAD_DTYPES, PATTERNS, (1, 2, 4, 8)):
        case = Case(operation, ids_dtype, dtype, dim, pattern, 1 if operation.endswith("majority") else planes)
        try:
            check(case, backend)
        except AssertionError as error:
            msg = f"{case} on {backend}: {error}"
            raise AssertionError(msg) from error


def test_selection_covers_every_pair() -> None:
    def pairs(selection: Iterable[Case]) -> set[Any]:
        return set().union(*(cases._pairs((c.operation, c.ids_dtype, c.dtype, str(c.dim), c.pattern, str(c.planes))) for c in selection))

    chosen, every = pairs(covering()), pairs(full())
    assert chosen == every
    assert len(covering()) < len(full()) / 10
    assert len(AXES) == 6


@pytest.mark.parametrize("name", WRONG)
def test_suite_notices(name: str) -> None:
    case, wrong = WRONG[name]
    problem = make_problem(case)
    want = run_reference(problem)
    assert_same(Native().run(problem), want)
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_same(wrong(problem), want)
