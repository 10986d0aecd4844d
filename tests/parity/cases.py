"""The cases of the parity suite: rules x id types x gradient types x widths x patterns of ids, in full or covering every pair.

There are two selections. :func:`covering` has every pair of two values, so every rule at every width: some 450 cases, for the library
itself and for PyTorch, which is one call of it a step. For JAX each case is a program that XLA compiles, a second of a processor, around
the same library; what JAX adds are operands, attributes and shapes. It takes :func:`thin`, which has pairs of what rules are made of
(bits, planes, norm, options) in the place of pairs of whole rules, in a third of the cases.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from dualbin import reference, rules

STEPS = 50
BATCHES = 5  # distinct batches, repeated in turn: gradients differ from step to step, and every step has the same shapes
SEED = (7 << 33) + 12345  # needs both words

RULES: dict[str, rules.Rule] = {
    **{f"counter{b}": rules.Counter(b) for b in range(1, 9)},
    **{f"counter{b}-{norm}": rules.Counter(b, norm=norm) for b in (1, 4, 8) for norm in rules.NORMS},
    # every number of planes of every number of bits; the norms in turn
    **{f"counter{b}-planes{p}": rules.Counter(b, norm=rules.NORMS[(b + p) % 2]) for b in range(2, 9) for p in range(2, b + 1)},
    "counter8-planes4-every3": rules.Counter(8, every=3),
    "counter6-planes2-zone": rules.Counter(6, eta=3.0, dead_zone=0.5, anneal=2.0, norm="rms"),
    **{f"counter{b}-zone0": rules.Counter(b, eta=1.0, dead_zone=0.0) for b in (1, 2, 3, 5, 6)},
    **{f"counter{b}-centred": rules.Counter(b, eta=1.5, dead_zone=0.25, anneal=3.0, center=True) for b in (1, 4, 8)},
    "counter8-every3": rules.Counter(8, every=3),
    "counter2-every4": rules.Counter(2, eta=0.7, dead_zone=0.25, every=4),
    "bop": rules.Bop(),
    "bop-every2": rules.Bop(gamma=0.3, tau=0.05, every=2),
    "sign": rules.Sign(),
}
IDS_DTYPES = ("int32", "int64")
GRAD_DTYPES = ("float32", "float16", "bfloat16")
DIMS = (1, 7, 8, 9, 64, 100, 767, 4096)
PATTERNS = ("none", "one", "repeated", "hot", "all")
AXES: tuple[tuple[str, ...], ...] = (tuple(RULES), IDS_DTYPES, GRAD_DTYPES, tuple(map(str, DIMS)), PATTERNS)


@dataclass(frozen=True)
class Case:
    rule: str
    ids_dtype: str
    grad_dtype: str
    dim: int
    pattern: str

    def __str__(self) -> str:
        return f"{self.rule}-{self.ids_dtype}-{self.grad_dtype}-D{self.dim}-{self.pattern}"

    @property
    def planes(self) -> int:
        """Of the table."""
        found = re.search(r"planes(\d)", self.rule)
        return int(found[1]) if found else 1

    @property
    def scale_lr(self) -> float:
        """Every third width trains with a frozen scale, whose state has no moments."""
        return 0.0 if DIMS.index(self.dim) % 3 == 1 else 3e-3

    @property
    def features(self) -> tuple[str, ...]:
        """What its rule is made of, whether the scale is trained, and the values of the other axes."""
        found = re.fullmatch(r"(?P<kind>[a-z]+)(?P<bits>\d?)(-planes\d)?-?(?P<options>.*)", self.rule)
        assert found
        norm = getattr(rules.resolve(RULES[self.rule], self.planes, self.dim), "norm", "")
        made_of = *found.group("kind", "bits", "options"), norm, str(self.planes), str(self.scale_lr)
        return *made_of, self.ids_dtype, self.grad_dtype, str(self.dim), self.pattern

    def lr(self, step: int) -> float:
        """A schedule, so that a wrong step or a forgotten rate shows."""
        return 1.0 - 0.01 * step


def full() -> list[Case]:
    return [_case(values) for values in itertools.product(*AXES)]


@functools.cache
def covering() -> tuple[Case, ...]:
    """A small selection in which every pair of values of two axes occurs. It takes seconds, in every process of the tests."""
    return tuple(_case(values) for values in covering_tuples(AXES))


@functools.cache
def thin() -> tuple[Case, ...]:
    """Few cases of :func:`covering` with every rule and every pair of two features that a case of it has (greedy)."""
    goals = {case: {case.rule, *_pairs(case.features)} for case in covering()}
    chosen, left = [], set().union(*goals.values())
    while left:
        chosen.append(max(goals, key=lambda case: len(goals[case] & left)))
        left -= goals[chosen[-1]]
    return tuple(chosen)


def covering_tuples(axes: tuple[tuple[str, ...], ...], known: Iterable[Any] = ()) -> list[tuple[str, ...]]:
    """Few tuples of one value from each axis, such that every pair of values of two axes is in one of them (greedy, deterministic).

    Pairs of the tuples `known` count as covered.
    """
    open_pairs = {((i, a), (j, b)) for i, j in itertools.combinations(range(len(axes)), 2) for a in axes[i] for b in axes[j]}
    open_pairs -= set().union(*map(_pairs, known))
    rng = np.random.default_rng(0)
    chosen: list[tuple[str, ...]] = []
    while open_pairs:
        (i, a), (j, b) = min(open_pairs)
        best: tuple[int, tuple[str, ...]] = (-1, ())
        for _ in range(30):
            values = [str(rng.choice(axis)) for axis in axes]
            values[i], values[j] = a, b
            gain = len(_pairs(values) & open_pairs)
            best = max(best, (gain, tuple(values)))
        chosen.append(best[1])
        open_pairs -= _pairs(best[1])
    return chosen


def _pairs(values: Any) -> set[Any]:
    return set(itertools.combinations(tuple(enumerate(values)), 2))


def _case(values: tuple[str, ...]) -> Case:
    rule, ids_dtype, grad_dtype, dim, pattern = values
    return Case(rule, ids_dtype, grad_dtype, int(dim), pattern)


@dataclass(frozen=True)
class Problem:
    """What every back end starts from and is fed with."""

    case: Case
    bits: Any
    scale: Any
    batches: list[tuple[Any, Any]]

    @property
    def rule(self) -> rules.Rule:
        return RULES[self.case.rule]


def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng(abs(hash_text(str(case))))
    rows = 11 if case.pattern != "all" else 6
    w = rng.normal(size=(rows, case.dim)).astype(np.float32)
    scale = reference.row_scale(w, case.planes)
    scale[1] = 0.0  # a padding row
    scale[2] *= -1.0  # allowed in files made elsewhere: evidence changes sign
    return Problem(case, reference.pack(w, case.planes), scale, [_batch(case, rows, rng) for _ in range(BATCHES)])


def _batch(case: Case, rows: int, rng: np.random.Generator) -> tuple[Any, Any]:
    ids = {
        "none": lambda: np.zeros(0),
        "one": lambda: rng.integers(0, rows, 1),
        "repeated": lambda: rng.integers(0, 5, 23),
        "hot": lambda: np.where(rng.random(2100) < 0.95, 4, rng.integers(0, rows, 2100)),
        "all": lambda: np.concatenate([rng.permutation(rows), rng.integers(0, rows, 9)]),
    }[case.pattern]()
    magnitude = 10.0 ** rng.integers(-3, 2)
    dy = rng.standard_normal((len(ids), case.dim), np.float32) * np.float32(magnitude)
    dtype = ml_dtypes.bfloat16 if case.grad_dtype == "bfloat16" else case.grad_dtype
    return ids.astype(case.ids_dtype), dy.astype(dtype)


def hash_text(text: str) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(text.encode(), "little") % (2**61 - 1)
