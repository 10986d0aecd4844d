"""A resolved rule as the text that a file holds beside the state that it made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dualbin._schema import STATE_ARRAYS
from dualbin.rules import Bop, Counter, Rule, Sign, from_plain, resolve, state_spec, to_plain

_MAX_LENGTH = 1000  #: of a text, some five times that of the longest rule
_SHOWN = 80

_OPTIONS = {kind.__name__: {field.name for field in fields(kind)} for kind in (Counter, Bop, Sign)}


def rule_text(rule: Rule) -> str:
    """JSON, `{name: {option: value}}`, of a resolved rule."""
    return json.dumps(to_plain(rule))


def read_rule(where: str, text: str, planes: int, dim: int) -> Rule:
    """The rule of :func:`rule_text`.

    Args:
        where: names file and key in messages.
        text: from a file.
        planes, dim: of the table.

    Raises:
        ValueError: it is no such text, an option is missing, unknown, open or not allowed, or the rule cannot train such a table.
    """
    if len(text) > _MAX_LENGTH:
        msg = f"{where} must be the JSON text of a rule, of at most {_MAX_LENGTH} characters, got {len(text)} characters"
        raise ValueError(msg)
    try:
        plain = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        msg = f"{where} must be the JSON text of a rule, got {_short(text)}: {error}"
        raise ValueError(msg) from None
    name, options = next(iter(plain.items())) if isinstance(plain, dict) and len(plain) == 1 else (None, None)
    if name not in _OPTIONS or not isinstance(options, dict):
        msg = f"{where} must be an object of one rule, {' or '.join(_OPTIONS)}, with its options, got {_short(text)}"
        raise ValueError(msg)
    if options.keys() != _OPTIONS[name]:
        msg = f"{where} must give all options of {name}, {', '.join(sorted(_OPTIONS[name]))}, and no other, got {_short(sorted(options))}"
        raise ValueError(msg)
    try:
        rule = from_plain(plain)
        resolved = resolve(rule, planes, dim)
    except (TypeError, ValueError) as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from None
    if resolved != rule:
        msg = f"{where} must have a value for every option, got {rule}"
        raise ValueError(msg)
    return resolved


def check_rule_made(where: str, rule: Rule, state: Mapping[str, Any], rows: int, dim: int, planes: int) -> None:
    """Raise ValueError unless the arrays of a state are those that a rule has for a table, by names and shapes.

    Args:
        where: names the state in messages.
        rule: resolved.
        state: arrays by the names they have in files, and ints.
        rows, dim, planes: of the table.
    """
    spec = state_spec(rule, rows, dim, train_scale="scale_m" in state, planes=planes)
    expected = {name: list(shape) for name, (shape, _) in spec.items()}
    have = {name: list(value.shape) for name, value in state.items() if name in expected or name in STATE_ARRAYS}
    if have != expected:
        msg = f"{where} is no state of its rule, {rule}: that has {expected} for this table, the state has {have}"
        raise ValueError(msg)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a name occurs twice"
        raise ValueError(msg)
    return found


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
