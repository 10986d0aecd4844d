"""Update rules: what turns a row gradient into flipped bits.

A rule is a frozen dataclass shared by both frontends. It holds hyper-parameters only; its state is described by :func:`state_spec` and
lives in the optimizer. `docs/design.md` and :mod:`dualbin.reference` define every arithmetic step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from dualbin._checks import check_bool, check_dim, check_float, check_int, check_mapping
from dualbin._float32 import nearest_float32
from dualbin._schema import MAX_PLANES, NORMS, RECORD, STATE_ARRAYS, state_shape


class CounterDefaults(NamedTuple):
    """Tuned hyper-parameters of :class:`Counter` for one number of bits, of planes, and one norm.

    Attributes:
        eta: of rows of `norm="rms"`; with "adagrad", over the root of the number of columns D: `eta * sqrt(D)` is what a table gets. One
            value then suits rows of 16 weights and of 256 (docs/quality.md).
        dead_zone, anneal, center: as in :class:`Counter`.
    """

    eta: float
    dead_zone: float = 0.0
    anneal: float = 0.0
    center: bool = False


#: One plane, `norm="rms"`, by number of bits.
_RMS = {
    8: CounterDefaults(8.0),
    7: CounterDefaults(4.0),
    6: CounterDefaults(3.0, anneal=1000.0),
    5: CounterDefaults(3.0, anneal=300.0),
    4: CounterDefaults(2.0, anneal=300.0),
    3: CounterDefaults(2.0, anneal=20.0),
    2: CounterDefaults(2.0, anneal=8.0),
    1: CounterDefaults(1000.0, anneal=3.0),
}

#: Levels at 8 bits that a gradient of the size of the divisor is worth, by norm, for one plane and for more. A level is a power of two of
#: the range, so with b bits it is 2**(b - 8) of them.
_LEVELS = {"rms": (8.0, 16.0), "adagrad": (8.0, 12.0)}

#: The dead zone of more than one plane, by norm and number of bits.
_ZONES: Mapping[str, Mapping[int, float]] = {"rms": {4: 0.5, 3: 1.0, 2: 1.5}, "adagrad": {5: 0.1, 4: 0.25, 3: 0.5, 2: 1.0}}


def _defaults(bits: int, planes: int, norm: str) -> CounterDefaults:
    if norm == "rms" and planes == 1:
        return _RMS[bits]
    zone = _ZONES[norm].get(bits, 0.0) if planes > 1 else 0.0
    return CounterDefaults(_LEVELS[norm][planes > 1] * 2.0 ** (bits - MAX_PLANES), dead_zone=zone)


_PAIRS = [(bits, planes) for bits in range(1, MAX_PLANES + 1) for planes in range(1, bits + 1)]

#: What :class:`Counter` uses where nothing is given, by (bits, planes, norm). `docs/quality.md` tells how they were chosen.
COUNTER_DEFAULTS: Mapping[tuple[int, int, str], CounterDefaults] = MappingProxyType(
    {(bits, planes, norm): _defaults(bits, planes, norm) for bits, planes in _PAIRS for norm in NORMS}
)

#: The norm of :class:`Counter` where none is given, by (bits, planes): few bits cannot resolve a rate that falls.
NORM_DEFAULTS: Mapping[tuple[int, int], str] = MappingProxyType(
    {(bits, planes): "adagrad" if bits > (4 if planes == 1 else 3) else "rms" for bits, planes in _PAIRS}
)

#: dead zones are counted in 1/256 of the row's rms, `anneal` in 1/256 of an update
_UNIT = 256

#: the numbers of a rule beside its kind, as the native library has them and in its order, with their values where a rule has none
NUMBERS: Mapping[str, int | float] = MappingProxyType(
    {"bits": 1, "eta": 0.0, "dead_zone_q8": 0, "anneal_q8": 0, "center": False, "norm": 0, "gamma": 0.0, "tau": 0.0}
)

_MAX_ETA = 2.0**22  # lr * eta * 2**24 has to stay below 2**47 for every lr up to 2
_MAX_DEAD_ZONE = 256.0
_MAX_ANNEAL = 2.0**22


class Rule:
    """What all rules share.

    Attributes:
        every: row gradients are summed over this many optimizer steps before one update (1 or more).
    """

    every: int
    kind: ClassVar[int]

    @property
    def counts_rows(self) -> bool:
        """Whether the rule reads the number of finished updates of every row."""
        return False

    @property
    def sums_squares(self) -> bool:
        """Whether the rule reads the sum of the mean squares of every row's gradients."""
        return False

    def resolved(self, planes: int, dim: int) -> Rule:  # noqa: ARG002  (the signature of all rules)
        """See :func:`resolve`."""
        if planes > 1:
            msg = f"rule must be a Counter for a table of {planes} planes, got {self}"
            raise ValueError(msg)
        return self

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", check_int("every", self.every, low=1))  # an int of NumPy would be no plain data in checkpoints

    def native(self) -> dict[str, int | float]:
        """The arguments of `_native.Rule` and the attributes of the XLA targets."""
        return {"kind": self.kind, **NUMBERS}


@dataclass(frozen=True)
class Counter(Rule):
    """A small signed counter for every weight, whose sign is the packed bit (the default rule).

    The state is `bits - 1` magnitude bit-planes a weight, so training holds exactly `bits` bits a weight. Evidence against a bit (row
    gradient over its rms, less the dead zone, times `lr * eta`) lowers the counter with stochastic rounding; below zero the bit flips. A
    many-bit counter is a latent weight in fixed point, as in straight-through training (arXiv:1308.3432) with row-normalised SGD.

    Few bits cannot average many gradients. With `anneal` they keep the sign of the strongest evidence so far instead: after n updates of
    a row the dead zone is `dead_zone + sqrt(2 ln(1 + n / anneal))`, which grows as the largest of n normal numbers does.

    What is None is looked up when rule and table meet, for the number of bits, the planes and columns of the table and the norm
    (:func:`resolve`).

    Args:
        bits: 1 to 8, the sign included, at least as many as the table has planes; the optimizer keeps the other ones. `bits=1` has no state
            but the row's count: a bit flips with probability `lr * min(1, eta * evidence)`.
        eta: counter levels a unit of evidence is worth at `lr=1`.
        dead_zone: evidence below this many rms of the row is ignored.
        every: see :class:`Rule`.
        anneal: number of updates of a row from which on its dead zone grows (1/64 to 2^22), or 0: it does not grow. None with a `dead_zone`
            of your own is 0.
        center: whether evidence is taken less its mean over the row, which is what the scale of the row is trained by; one plane only. None
            with a `dead_zone` of your own is False.
        norm: what the gradient of a row is divided by: "rms", its root mean square in this update, so that its size does not matter; or
            "adagrad", the root of the sum of its mean squares over all updates of the row (Duchi, Hazan, Singer 2011, JMLR 12), which
            lets the rate of a row fall as it is trained and costs 4 bytes a row.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    bits: int = 8
    eta: float | None = None
    dead_zone: float | None = None
    every: int = 1
    anneal: float | None = None
    center: bool | None = None
    norm: str | None = None

    kind: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bits", check_int("bits", self.bits, low=1, high=MAX_PLANES))
        limits = {"eta": _MAX_ETA, "dead_zone": _MAX_DEAD_ZONE, "anneal": _MAX_ANNEAL}
        for name, high in limits.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_float(name, value, low=0.0, high=high))
        if self.center is not None:
            check_bool("center", self.center)
        if self.norm is not None and not (isinstance(self.norm, str) and self.norm in NORMS):
            msg = f"norm must be one of {', '.join(map(repr, NORMS))} or None, got {self.norm!r}"
            raise ValueError(msg)

    @property
    def counts_rows(self) -> bool:
        return bool(self.anneal)

    @property
    def sums_squares(self) -> bool:
        return self.norm == "adagrad"

    def resolved(self, planes: int, dim: int) -> Counter:
        if planes > self.bits:
            msg = f"bits of Counter must be at least the planes of the table, got {self.bits} bits for a table of {planes} planes"
            raise ValueError(msg)
        if self.center and planes > 1:
            msg = f"center must be False for a table of {planes} planes: it is defined for one plane only"
            raise ValueError(msg)
        norm = self.norm or NORM_DEFAULTS[self.bits, planes]
        tuned = COUNTER_DEFAULTS[self.bits, planes, norm]
        if norm == "adagrad":
            tuned = tuned._replace(eta=min(tuned.eta * math.sqrt(dim), _MAX_ETA))
        if self.dead_zone is not None:
            tuned = CounterDefaults(tuned.eta)
        values = {name: getattr(tuned, name) if getattr(self, name) is None else getattr(self, name) for name in CounterDefaults._fields}
        return replace(self, norm=norm, **values)

    def native(self) -> dict[str, int | float]:
        assert self.eta is not None
        assert self.dead_zone is not None
        assert self.anneal is not None
        zone = math.floor(self.dead_zone * _UNIT + 0.5)
        anneal = max(4, math.floor(self.anneal * _UNIT + 0.5)) if self.anneal > 0 else 0
        own = {"bits": self.bits, "eta": nearest_float32(self.eta), "dead_zone_q8": zone, "anneal_q8": anneal, "center": bool(self.center)}
        return super().native() | own | {"norm": NORMS.index(self.norm or NORMS[0])}


@dataclass(frozen=True)
class Bop(Rule):
    """Flip where the moving average of the normalised gradient exceeds a threshold (Helwegen et al. 2019, arXiv:1906.02107).

    The state is float32 `[V, D]`. The average starts as a running mean: its rate is `max(lr * gamma, 1 / updates of the row)`.

    Args:
        gamma: rate of the moving average at `lr=1`, in (0, 1].
        tau: threshold in rms of the row, at least 0.
        every: see :class:`Rule`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    gamma: float = 0.05
    tau: float = 0.1
    every: int = 1

    kind: ClassVar[int] = 1

    @property
    def counts_rows(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", check_float("gamma", self.gamma, low=0.0, high=1.0))
        object.__setattr__(self, "tau", check_float("tau", self.tau, low=0.0))

    def native(self) -> dict[str, int | float]:
        return super().native() | {"gamma": nearest_float32(self.gamma), "tau": nearest_float32(self.tau)}


@dataclass(frozen=True)
class Sign(Rule):
    """Flip every bit whose weight agrees in sign with its gradient, at every step; no state.

    Kept because bitorch-engine, which this library succeeds, describes it. It trains badly: the bits follow the noise of a single batch.

    Args:
        every: see :class:`Rule`.
    """

    every: int = 1

    kind: ClassVar[int] = 2


def check_rule(rule: object) -> Rule:
    """Return `rule` if it is one of this module's rules, else raise TypeError."""
    if isinstance(rule, (Counter, Bop, Sign)):
        return rule
    msg = f"rule must be a dualbin.rules.Counter, Bop or Sign, got {type(rule).__name__}"
    raise TypeError(msg)


def to_plain(rule: Rule) -> dict[str, dict[str, Any]]:
    """The rule as plain data, `{name: {option: value}}`, for checkpoints that hold nothing else."""
    return {type(check_rule(rule)).__name__: asdict(rule)}  # type: ignore[call-overload]


def from_plain(value: object) -> Rule:
    """The rule that :func:`to_plain` was given; a rule is returned as it is.

    Raises:
        TypeError, ValueError: it is neither, or its options are not allowed.
    """
    if not isinstance(value, Mapping):
        return check_rule(value)
    names = {rule.__name__: rule for rule in (Counter, Bop, Sign)}
    if len(value) != 1 or not names.keys() >= value.keys():
        msg = f"rule must be one of {', '.join(names)} with its options, got {dict(value)}"
        raise ValueError(msg)
    ((name, options),) = value.items()
    check_mapping(f"rule[{name!r}]", options, "options to values")
    return names[name](**options)


def resolve(rule: Rule, planes: int, dim: int) -> Rule:
    """The rule for a table of `planes` planes and `dim` columns, with a value for all that was left open.

    Raises:
        TypeError: rule is none of this module's.
        ValueError: the rule cannot train such a table; the message names both.
    """
    try:
        return _resolve(rule, planes, dim)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _resolve.__wrapped__(rule, planes, dim)  # which names the argument that is none


@lru_cache(maxsize=256, typed=True)  # True and 2.0 are no planes, although they equal 1 and 2
def _resolve(rule: Rule, planes: int, dim: int) -> Rule:
    return check_rule(rule).resolved(check_int("planes", planes, low=1, high=MAX_PLANES), check_dim("dim", dim))


def state_layout(rule: Rule, rows: int, dim: int, *, train_scale: bool, planes: int = 1) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the arrays that an optimizer holds for one table, by name: those of :func:`state_spec` as they lie in memory.

    A trained scale has a `record` int32 `[V, 4]` of the bits of `count`, `squares` and the moments of the scale, one cache line a row.

    Args: as of :func:`state_spec`.
    """
    return dict(_layout(resolve(rule, planes, dim), rows, dim, train_scale, planes))


@lru_cache(maxsize=256)  # every step of an optimizer asks for it
def _layout(rule: Rule, rows: int, dim: int, train_scale: bool, planes: int) -> dict[str, tuple[tuple[int, ...], str]]:
    planes_below = rule.bits - planes if isinstance(rule, Counter) else 0
    needed = {
        "counter": planes_below > 0,
        "ema": isinstance(rule, Bop),
        "record": train_scale,
        "count": rule.counts_rows and not train_scale,
        "squares": rule.sums_squares and not train_scale,
    }
    return {name: (state_shape(name, rows, dim, planes_below), array.dtype) for name, array in STATE_ARRAYS.items() if needed[name]}


def state_spec(rule: Rule, rows: int, dim: int, *, train_scale: bool, planes: int = 1) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the state arrays of one table by name, as files and `export_state` have them.

    All of them start at zero. The step count and the window of `every` are kept beside them by the frontends.

    Args:
        rule: the update rule.
        rows: V, the number of rows.
        dim: D, the number of weights in a row.
        train_scale: whether `scale_lr` is above 0.
        planes: of the table.

    Raises:
        ValueError: the rule cannot train a table of so many planes.
    """
    layout = state_layout(rule, rows, dim, train_scale=train_scale, planes=planes)
    record = layout.pop("record", None)
    return layout | ({name: ((rows,), dtype) for name, dtype in RECORD.items()} if record else {})


__all__ = [
    "COUNTER_DEFAULTS",
    "NORMS",
    "NORM_DEFAULTS",
    "Bop",
    "Counter",
    "CounterDefaults",
    "Rule",
    "Sign",
    "check_rule",
    "from_plain",
    "resolve",
    "state_layout",
    "state_spec",
    "to_plain",
]
