"""What the task "clicks" compares. Families and candidates are those of the text tasks; a loss is 1 - AUC."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from _quality.variants import ADAGRAD, BASELINES, BYTES, PROJECTION, RULES, Family, Variant

TASK = "clicks"
SPARSE_ADAM = "fp32, SparseAdam"
DEFAULTS, RATES, PASSES = "defaults", "rates", "passes"

SCALE_LR = 0.01  # of a table whose rows say nothing else
_SCALE_LRS = (0.003, 0.01)  # to choose from
_FP32_RATES = {"adagrad": (0.1, 0.2, 0.4), "sparse adam": (0.03, 0.1, 0.3)}

#: What a 1-bit table is made with, and the `eta` to choose from. Every option of `Counter` and of `BinaryEmbedding` may stand here.
_COUNTERS: tuple[tuple[dict[str, Any], tuple[float, ...]], ...] = (
    ({"bits": 8, "planes": 4}, (24.0, 48.0, 96.0)),
    ({"bits": 8, "planes": 2}, (24.0, 48.0, 96.0)),
    ({"bits": 4, "planes": 4, "dead_zone": 0.0}, (1.5, 3.0, 6.0)),
    ({"bits": 8}, (24.0, 48.0, 96.0)),
    ({"bits": 4, "planes": 2, "dead_zone": 0.0}, (2.0, 4.0, 8.0)),
    ({"bits": 4, "norm": "adagrad"}, (1.5, 3.0, 6.0)),
    ({"bits": 4, "norm": "rms"}, (1.0, 2.0, 4.0)),
    ({"bits": 2}, (0.5, 1.0, 2.0)),
    ({"bits": 1}, (1.0, 4.0, 16.0)),
    ({"bits": 6, "planes": 2}, (6.0, 12.0, 24.0)),
)

#: Tables of which nothing but bits and planes is given.
_DEFAULTS: tuple[dict[str, Any], ...] = (
    {"bits": 8, "planes": 4},
    {"bits": 8, "planes": 2},
    {"bits": 4, "planes": 4},
    {"bits": 8},
    {"bits": 4},
    {"bits": 2},
    {"bits": 1},
)

#: The same of wide rows behind a projection to the width of the model, in multiples of that width.
_WIDE: tuple[tuple[int, dict[str, Any], tuple[float, ...]], ...] = (
    (4, {"bits": 8}, (32.0, 64.0, 128.0)),
    (4, {"bits": 4}, (2.0, 4.0, 8.0)),
    (2, {"bits": 8, "planes": 4}, (32.0, 64.0, 128.0)),
    (1, {"bits": 8}, (24.0, 48.0, 96.0)),
)

#: Widths of fp32 rows. Two numbers take the bytes that 16 bits with a scale take served (6, rounded up), three those of 64 bits with a
#: scale, and four, with Adagrad's sums, those that `Counter(8)` takes in training.
_NARROW = (2, 3, 4)


def click_families(width: int) -> list[Family]:
    """All families, most important first.

    Args:
        width: of the rows that the model takes.
    """
    adagrad, counters = _fp32("adagrad", ADAGRAD, reference=True), [_counter(options, etas, RULES) for options, etas in _COUNTERS]
    return [
        adagrad,
        _fp32("sparse adam", SPARSE_ADAM, reference=True),
        _family("random bits, never trained", BASELINES, [{"bits": 1, "eta": 0.0, "scale_lr": SCALE_LR}]),
        *counters,
        *(_counter({**options, "width": times * width, "projection": width}, etas, PROJECTION) for times, options, etas in _WIDE),
        *_narrow(width),
        *(_family(f"{_name(of)}, nothing given", DEFAULTS, [of]) for of in _DEFAULTS),
        _family("Counter(8), rates of the scales", RATES, ({"bits": 8, "scale_lr": rate} for rate in (0.003, 0.01, 0.03)), "scale_lr", 1),
        *(_twice(family) for family in (adagrad, *(family for family in counters if family.name == "Counter(8)"))),
    ]


def _family(
    name: str, group: str, settings: Iterable[dict[str, Any]], grid: str | None = None, seeds: int = 3, kind: str = "xor", **options: Any
) -> Family:
    return Family(TASK, name, group, tuple(Variant(kind, setting) for setting in settings), grid, seeds, **options)


def _fp32(optimizer: str, name: str, group: str = BASELINES, reference: bool = False, **options: Any) -> Family:
    settings = ({"optimizer": optimizer, **options, "lr": rate} for rate in _FP32_RATES[optimizer])
    return _family(name, group, settings, "lr", kind="fp32", reference=reference)


def _counter(options: dict[str, Any], etas: tuple[float, ...], group: str) -> Family:
    settings = ({"scale_lr": scale_lr, **options, "eta": eta} for eta in etas for scale_lr in _SCALE_LRS)
    return _family(_name(options), group, settings, "eta")


def _name(options: dict[str, Any]) -> str:
    """All options that are the same in a family, but the rate of the scales."""
    more = {name: value for name, value in options.items() if name not in ("bits", "scale_lr", "width", "projection")}
    shown = [f"Counter({', '.join([str(options['bits']), *(f'{name}={value}' for name, value in more.items())])})"]
    if "width" in options:
        shown.append(f"{options['width']} x {options['projection']} projection")
    return " + ".join(shown)


def _narrow(width: int) -> list[Family]:
    found = []
    for narrow in _NARROW:
        if narrow < width:
            found.append(_fp32("adagrad", f"fp32 rows of width {narrow}", BYTES, width=narrow))
            found.append(_fp32("adagrad", f"fp32 rows of width {narrow}, projected", BYTES, width=narrow, projection=width))
    return found


def _twice(family: Family) -> Family:
    """The same over two passes."""
    candidates = tuple(Variant(variant.kind, {**variant.options, "passes": 2}) for variant in family.candidates)
    return Family(TASK, f"{family.name}, two passes", PASSES, candidates, family.grid, seeds=1)
