"""Update rules: what turns a row gradient into flipped bits.

A rule is a frozen dataclass shared by both frontends. It holds hyper-parameters only; its state is described by :func:`state_spec` and
lives in the optimizer. `docs/design.md` and :mod:`dualbin.reference` define every arithmetic step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from dualbin._checks import check_bool, check_float, check_int
from dualbin._schema import STATE_ARRAYS, state_shape


class CounterDefaults(NamedTuple):
    """Tuned hyper-parameters of :class:`Counter` for one number of bits."""

    eta: float
    dead_zone: float
    anneal: float
    center: bool


#: What :class:`Counter` uses where nothing is given, by number of bits. `docs/quality.md` tells how they were chosen.
COUNTER_DEFAULTS: Mapping[int, CounterDefaults] = MappingProxyType(
    {
        8: CounterDefaults(8.0, 0.0, 0.0, center=False),
        7: CounterDefaults(4.0, 0.0, 0.0, center=False),
        6: CounterDefaults(3.0, 0.0, 1000.0, center=False),
        5: CounterDefaults(3.0, 0.0, 300.0, center=False),
        4: CounterDefaults(2.0, 0.0, 100.0, center=False),
        3: CounterDefaults(2.0, 0.0, 20.0, center=False),
        2: CounterDefaults(2.0, 0.0, 8.0, center=False),
        1: CounterDefaults(1000.0, 0.0, 3.0, center=False),
    }
)

#: dead zones are counted in 1/256 of the row's rms, `anneal` in 1/256 of an update
_UNIT = 256

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

    def __post_init__(self) -> None:
        check_int("every", self.every, low=1)

    def native(self) -> dict[str, int | float]:
        """The arguments of `_native.Rule` and the attributes of the XLA targets."""
        none = {"bits": 1, "eta": 0.0, "dead_zone_q8": 0, "anneal_q8": 0, "center": False, "gamma": 0.0, "tau": 0.0}
        return {"kind": self.kind, **none}


@dataclass(frozen=True)
class Counter(Rule):
    """A small signed counter for every weight, whose sign is the packed bit (the default rule).

    The state is `bits - 1` magnitude bit-planes a weight, so training holds exactly `bits` bits a weight. Evidence against a bit (row
    gradient over its rms, less the dead zone, times `lr * eta`) lowers the counter with stochastic rounding; below zero the bit flips. A
    many-bit counter is a latent weight in fixed point, as in straight-through training (arXiv:1308.3432) with row-normalised SGD.

    Few bits cannot average many gradients. With `anneal` they keep the sign of the strongest evidence so far instead: after n updates of
    a row the dead zone is `dead_zone + sqrt(2 ln(1 + n / anneal))`, which grows as the largest of n normal numbers does.

    Args:
        bits: 1 to 8, the sign included. `bits=1` has no state but the row's count: a bit flips with probability
            `lr * min(1, eta * evidence)`.
        eta: counter levels a unit of evidence is worth at `lr=1`; None takes the tuned value for `bits`.
        dead_zone: evidence below this many rms of the row is ignored; None takes the tuned values of this and of the two below.
        every: see :class:`Rule`.
        anneal: number of updates of a row from which on its dead zone grows (1/64 to 2^22), or 0: it does not grow. None:
            the tuned value, or 0 with a `dead_zone` of your own.
        center: whether evidence is taken less its mean over the row, which is what the scale of the row is trained by. None: as tuned, or
            False with a `dead_zone` of your own.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    bits: int = 8
    eta: float | None = None
    dead_zone: float | None = None
    every: int = 1
    anneal: float | None = None
    center: bool | None = None

    kind: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("bits", self.bits, low=1, high=8)
        tuned = COUNTER_DEFAULTS[self.bits]
        if self.dead_zone is not None:
            tuned = CounterDefaults(tuned.eta, 0.0, 0.0, center=False)
        limits = {"eta": _MAX_ETA, "dead_zone": _MAX_DEAD_ZONE, "anneal": _MAX_ANNEAL}
        for name, high in limits.items():
            value = getattr(self, name)
            object.__setattr__(self, name, getattr(tuned, name) if value is None else check_float(name, value, low=0.0, high=high))
        object.__setattr__(self, "center", tuned.center if self.center is None else check_bool("center", self.center))

    @property
    def counts_rows(self) -> bool:
        return bool(self.anneal)

    def native(self) -> dict[str, int | float]:
        assert self.eta is not None
        assert self.dead_zone is not None
        assert self.anneal is not None
        zone = math.floor(self.dead_zone * _UNIT + 0.5)
        anneal = max(4, math.floor(self.anneal * _UNIT + 0.5)) if self.anneal > 0 else 0
        own = {"bits": self.bits, "eta": float(self.eta), "dead_zone_q8": zone, "anneal_q8": anneal, "center": bool(self.center)}
        return super().native() | own


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
        return super().native() | {"gamma": self.gamma, "tau": self.tau}


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
    return {type(rule).__name__: asdict(rule)}  # type: ignore[call-overload]


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
    return names[name](**options)


def state_spec(rule: Rule, rows: int, dim: int, *, train_scale: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the state arrays of one table, by name.

    All of them start at zero. The step count and the window of `every` are kept beside them by the frontends.

    Args:
        rule: the update rule.
        rows: V, the number of rows.
        dim: D, the number of weights in a row.
        train_scale: whether `scale_lr` is above 0.
    """
    planes = rule.bits - 1 if isinstance(rule, Counter) else 0
    needed = {
        "counter": planes > 0,
        "ema": isinstance(rule, Bop),
        "count": train_scale or rule.counts_rows,
        "scale_m": train_scale,
        "scale_v": train_scale,
    }
    return {name: (state_shape(name, rows, dim, planes), array.dtype) for name, array in STATE_ARRAYS.items() if needed[name]}


__all__ = ["COUNTER_DEFAULTS", "Bop", "Counter", "CounterDefaults", "Rule", "Sign", "check_rule", "from_plain", "state_spec", "to_plain"]
