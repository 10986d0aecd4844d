"""What is compared: the input tables, their hyper-parameters, and the order in which they are run.

A family is one row of the result. It has one or more candidates; the best of them on the first half of the held-out text is run with the
other seeds too and reported on the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dualbin.rules import Bop, Counter, Rule

#: the reference is the better one of them
FP32 = (ADAM, ADAGRAD) = ("fp32, Adam", "fp32, Adagrad")
BASELINES, RULES, PROJECTION, WINDOWS, BYTES, SWEEPS = "baselines", "rules", "projection", "windows", "bytes", "sweeps"

#: fp32 Adam holds the weight and two moments
_ADAM_BITS = 96

#: (bits, eta, dead zone, every) of a Counter -> perplexity over that of fp32, on the whole held-out text, in a float simulation made before
#: the kernels existed.
#: There, one-bit rules flipped with the probability `lr` above the dead zone; here `eta` is so large that they nearly always flip.
_SIMULATED_COUNTERS = {
    "lm": {
        (8, 8.0, 0.0, 1): 1.025,
        (8, 3.0, 0.0, 1): 1.026,
        (8, 16.0, 0.25, 2): 1.020,
        (8, 16.0, 0.0, 8): 1.028,
        (6, 2.0, 0.0, 1): 1.031,
        (6, 2.0, 0.5, 1): 1.031,
        (6, 4.0, 0.25, 8): 1.033,
        (5, 1.5, 0.0, 1): 1.048,
        (5, 3.0, 1.0, 1): 1.040,
        (4, 1.0, 0.0, 1): 1.092,
        (4, 1.0, 1.0, 1): 1.077,
        (4, 2.0, 1.0, 1): 1.067,
        (4, 2.0, 0.5, 8): 1.053,
        (4, 2.0, 0.5, 16): 1.046,
        (4, 2.0, 0.5, 32): 1.051,
        (3, 1.0, 1.0, 1): 1.117,
        (3, 2.0, 0.5, 32): 1.060,
        (2, 1.0, 1.5, 1): 1.179,
        (2, 2.0, 1.0, 32): 1.078,
        (2, 2.0, 1.0, 64): 1.071,
        (1, 1000.0, 2.5, 1): 1.272,
        (1, 1000.0, 2.0, 16): 1.152,
        (1, 1000.0, 1.5, 64): 1.114,
        (1, 1000.0, 1.5, 128): 1.113,
    },
    "sg": {(8, 3.0, 0.0, 1): 1.013, (6, 1.0, 0.0, 1): 1.021, (4, 1.0, 1.0, 1): 1.031, (2, 1.0, 1.5, 1): 1.065, (1, 1000.0, 2.5, 1): 1.087},
}
#: the same by the rule or the optimizer; of these, only Adagrad trains fp32 rows
_SIMULATED = {
    "lm": {"Bop": 1.064, "adam": 1.020, "sgd": 1.020, "adagrad": 0.995, "never trained": 1.306},
    "sg": {"Bop": 1.023, "adam": 1.007, "never trained": 1.133},
}


def finished(kind: str) -> str:
    """The name of an fp32 table that is made smaller when training is over: "signs", "int8", ..."""
    return f"{kind} of the finished fp32 table"


@dataclass(frozen=True)
class Variant:
    """One input table with its hyper-parameters.

    Attributes:
        kind: "fp32" (`optimizer` is "adam" or "adagrad"), "projected" (narrow rows), "straight-through" or "xor".
        options: what the kind takes, JSON values only. With "projection", rows of full width are multiplied by a trained D x D matrix that
            starts as the identity; with "spread", each sign differs at first from a pattern of all rows with this probability; "planes" of
            the table are 1 without it.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        return Variant, (self.kind, dict(self.options))

    def describe(self) -> str:
        """The options in a few words; two variants of a family differ in them."""
        shown = {name: value for name, value in self.options.items() if name not in ("projection", "rule", "optimizer")}  # in the name
        return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items())

    def rule(self) -> Rule:
        """The update rule of an "xor" table."""
        options = {name: value for name, value in self.options.items() if name not in ("projection", "spread", "planes")}
        return Bop(**options) if options.pop("rule") == "Bop" else Counter(**options)


@dataclass(frozen=True)
class Family:
    """One row of the result.

    Attributes:
        task: name of the task.
        name: what the row is called.
        group: which part of the report it belongs to.
        candidates: at least one.
        grid: the option in which the candidates differ, a geometric grid; it is extended while the best is at its edge.
        seeds: at most this many runs of the chosen candidate.
        jax: it is one of those that the JAX frontend runs too.
        reference: it runs whatever else does, as the others of its task are compared with it.
    """

    task: str
    name: str
    group: str
    candidates: tuple[Variant, ...]
    grid: str | None = None
    seeds: int = 3
    jax: bool = False
    reference: bool = False


def families(task: str, width: int) -> list[list[Family]]:
    """The families of a task in levels: the first level of every task comes before the second one of any."""
    first = [*_baselines(task), *_rules(task), *_projections(task)]
    windows = _windows(task)
    served, training = _equal_bytes(task, width)
    return [first, [*_other_rules(task), *served], windows, [*_sweeps(task), *training]]


def ordered(widths: Mapping[str, int], jax: bool) -> list[Family]:
    """All families of the given tasks (name -> width of the table), most important first.

    Args:
        widths: D of each task.
        jax: only those that the JAX frontend runs.
    """
    lists = [families(task, width) for task, width in widths.items()]
    result = []
    for level in range(max(map(len, lists))):
        for steps in lists:
            result += [family for family in (steps[level] if level < len(steps) else []) if family.jax or not jax]
    return result


def simulated_ratio(task: str, options: Mapping[str, Any]) -> float | None:
    """Perplexity over that of fp32 which the simulation had with the same rule and options, if it had them."""
    if options.get("projection"):
        return None
    if options.get("rule") == "Counter" and options.get("eta") != 0:
        key = (options["bits"], options.get("eta"), options.get("dead_zone"), options["every"])
        return _SIMULATED_COUNTERS[task].get(key)
    name = "never trained" if options.get("rule") == "Counter" else options.get("rule", options.get("optimizer"))
    return _SIMULATED[task].get(name)


def counter(bits: int, eta: float, dead_zone: float, every: int = 1) -> Variant:
    """A counter with a dead zone that does not grow, as the simulation had it."""
    return Variant("xor", {"rule": "Counter", "bits": bits, "every": every, "eta": eta, "dead_zone": dead_zone})


def tuned(bits: int, every: int = 1, **options: Any) -> Variant:
    """A counter as the library sets it by default."""
    return Variant("xor", {"rule": "Counter", "bits": bits, "every": every, **options})


def _grid(kind: str, rates: tuple[float, ...], **options: Any) -> tuple[Variant, ...]:
    return tuple(Variant(kind, {**options, "lr": rate}) for rate in rates)


def _baselines(task: str) -> list[Family]:
    """Rates of fp32 Adam are multiples of the base rate; those of Adagrad and of straight-through (weights in [-1, 1]) are absolute."""
    lm = task == "lm"
    straight = "straight-through"
    fp32 = {"jax": True, "reference": True}
    adam = _grid(straight, (0.003, 0.01, 0.03) if lm else (0.001, 0.003, 0.01), optimizer="adam")
    return [
        Family(task, ADAM, BASELINES, _grid("fp32", (5.0, 10.0, 20.0) if lm else (1.0, 3.0, 10.0), optimizer="adam"), "lr", **fp32),
        Family(task, ADAGRAD, BASELINES, _grid("fp32", (0.05, 0.1, 0.2, 0.5), optimizer="adagrad"), "lr", **fp32),
        Family(task, "random bits, never trained", BASELINES, (counter(1, 0.0, 2.5),), jax=True),
        Family(task, f"{straight}, Adam", BASELINES, adam, "lr"),
    ]


def _name(bits: int, every: int = 1, planes: int = 1) -> str:
    name = f"Counter({bits})" if every == 1 else f"Counter({bits}, every={every})"
    return name if planes == 1 else f"{name}, {planes} planes"


def _default(task: str, bits: int, every: int = 1, seeds: int = 3, jax: bool = False) -> Family:
    group = RULES if every == 1 else WINDOWS
    candidates = (tuned(bits, every),) if seeds == 1 else _settings(bits, every)
    return Family(task, _name(bits, every), group, candidates, seeds=seeds, jax=jax)


def _settings(bits: int, every: int, **options: Any) -> tuple[Variant, ...]:
    """What suits the windows; the defaults where nothing does better."""
    suits: dict[tuple[int, int], tuple[dict[str, Any], ...]] = {
        (2, 1): ({}, {"center": True}),
        (1, 1): ({}, {"center": True}),
        (4, 8): ({"eta": 3.0, "anneal": 100.0, "center": True},),
        (4, 16): ({"eta": 4.0, "anneal": 100.0, "center": True},),
        (2, 64): ({"eta": 3.0, "anneal": 12.0, "center": True},),
        (1, 64): ({"center": True}, {"anneal": 4.0, "center": True}),
    }
    return tuple(tuned(bits, every, **setting, **options) for setting in suits.get((bits, every), ({},)))


#: (bits, planes) -> what to choose from beside what the library does if nothing is given
_CHOICES: dict[tuple[int, int], tuple[dict[str, Any], ...]] = {
    (8, 4): ({"eta": 96.0}, {"eta": 384.0}),
    (8, 2): ({"eta": 96.0}, {"eta": 384.0}),
    (8, 1): ({"eta": 64.0}, {"eta": 256.0}),
    (6, 2): ({"eta": 24.0}, {"eta": 96.0}),
    (4, 4): ({"eta": 12.0, "dead_zone": 0.0}, {"eta": 12.0, "dead_zone": 0.5}),
    (4, 2): ({"eta": 16.0, "dead_zone": 0.0}, {"eta": 16.0, "dead_zone": 0.5}),
    (4, 1): ({"anneal": 1000.0}, {"anneal": 300.0, "center": True}),
}


def _rules(task: str) -> list[Family]:
    """Every number of bits as the library sets it, and for the language model what else there is to choose from."""
    found = []
    for (bits, planes), choices in _CHOICES.items():
        more = {} if planes == 1 else {"planes": planes}
        candidates = (tuned(bits, **more), *(tuned(bits, **more, **choice) for choice in choices if task == "lm"))
        found.append(Family(task, _name(bits, planes=planes), RULES, candidates, jax=(bits, planes) in {(8, 4), (8, 1), (4, 1)}))
    return [*found, *(_default(task, bits) for bits in (2, 1))]


def _other_rules(task: str) -> list[Family]:
    bop = Family(task, "Bop", RULES, (Variant("xor", {"rule": "Bop", "gamma": 0.05, "tau": 0.1}),), seeds=3 if task == "lm" else 1)
    rms = Family(task, "Counter(8), rms", RULES, (tuned(8, norm="rms"),), seeds=1)
    return [bop, rms, *(_default(task, bits, seeds=1) for bits in ((6, 3, 5, 7) if task == "lm" else (6,)))]


#: (bits, every) of the tables that have a projection behind them
_PROJECTED = {"lm": ((8, 1), (4, 16), (4, 8), (2, 64), (1, 64), (4, 1), (2, 1), (1, 1)), "sg": ((8, 1), (4, 1), (2, 1), (1, 1))}


#: what to choose from for those of them that are updated at every step
_STARTS: dict[tuple[int, int], tuple[dict[str, Any], ...]] = {
    (8, 1): ({}, {"spread": 0.1}),
    (4, 1): ({"spread": 0.1}, {"spread": 0.1, "eta": 3.0}, {"spread": 0.1, "center": True}),
    (2, 1): ({"spread": 0.1, "eta": 3.0, "anneal": 12.0}, {"spread": 0.1, "eta": 3.0, "anneal": 24.0}),
    (1, 1): ({"spread": 0.25, "anneal": 4.0}, {"spread": 0.25, "anneal": 6.0}),
}


def _projections(task: str) -> list[Family]:
    """Rows of full width with a trained D x D matrix behind them; with fp32 rows, to see what the matrix does by itself."""
    lm = task == "lm"
    found = []
    for of in _PROJECTED[task]:
        starts: tuple[dict[str, Any], ...] = _STARTS.get(of, ({}, {"spread": 0.1})) if lm else ({},)
        variants = tuple(variant for start in starts for variant in _settings(*of, projection=True, **start))
        name = f"{_name(*of)} + projection"
        found.append(Family(task, name, PROJECTION, variants, seeds=3 if lm else 1, jax=lm and of == (8, 1)))
    fp32 = _grid("fp32", (10.0,) if lm else (3.0,), optimizer="adam", projection=True)
    straight = _grid("straight-through", (0.01,) if lm else (0.003,), optimizer="adam", projection=True)
    return [
        *found,
        Family(task, f"{ADAM} + projection", PROJECTION, fp32, seeds=3 if lm else 1),
        Family(task, "straight-through, Adam + projection", PROJECTION, straight, seeds=1),
    ]


def _windows(task: str) -> list[Family]:
    """The defaults with `every` of several steps."""
    if task == "sg":
        return [_default(task, bits, every, seeds=1) for bits, every in ((4, 16), (2, 64), (1, 64))]
    main = [_default(task, bits, every, jax=bits == 2) for bits, every in ((4, 16), (2, 64), (1, 64))]
    others = [(bits, every) for every in (8, 32, 64) for bits in (8, 6, 4, 3, 2, 1) if (bits, every) not in ((2, 64), (1, 64))]
    return [*main, *(_default(task, bits, every, seeds=1) for bits, every in others)]


def _sweeps(task: str) -> list[Family]:
    """The settings of the simulation, and straight-through training by SGD, which it had too."""
    sgd = _grid("straight-through", (0.02,), optimizer="sgd")
    found = [Family(task, "straight-through, SGD", SWEEPS, sgd, seeds=1)]
    for bits, eta, zone, every in _SIMULATED_COUNTERS[task]:
        variant = counter(bits, eta, zone, every)
        found.append(Family(task, f"{_name(bits, every)}, eta {eta:g}, dead zone {zone:g}", SWEEPS, (variant,), seeds=1))
    return found


def _equal_bytes(task: str, width: int) -> tuple[list[Family], list[Family]]:
    """Narrow tables with a projection to `width`: as many served bytes as 1-bit rows; as many bytes in training."""
    made: set[tuple[int, int]] = set()

    def family(narrow: int, bits: int, name: str, seeds: int) -> list[Family]:
        if (narrow, bits) in made:  # at small widths two of them may be the same table
            return []
        made.add((narrow, bits))
        return [Family(task, name, BYTES, _grid("projected", (1.0, 3.0, 10.0), width=narrow, bits=bits), "lr", seeds=seeds)]

    served, training = [], []
    for kind, bits in (("fp32", 32), ("int8", 8), ("int4", 4)):
        narrow = max(1, width // bits)
        served += family(narrow, bits, f"{kind} rows of width {narrow}, projected", seeds=3 if task == "lm" else 1)
    for bits in (8, 4, 2) if task == "lm" else ():
        narrow = max(1, round(width * bits / _ADAM_BITS))
        training += family(narrow, 32, f"fp32 rows of width {narrow}, projected (training bits of Counter({bits}))", seeds=1)
    return served, training
