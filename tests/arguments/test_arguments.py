"""Every argument of every public callable, wrong in every way: it is refused by an error that names it, and nothing has changed.

`make test` runs all cases of PyTorch and of the shared code and a third of those of JAX, which compile; `make fuzz` runs all. With
DUALBIN_TEST_PLATFORM=cuda tables and arrays lie on a GPU, which has to go on computing after every case. On failure the message says what
was accepted, or which error did not name the argument; what is meant to be accepted stands in `meant.txt`.
"""

from __future__ import annotations

import importlib
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from arguments import registry, shared_entries
from arguments.registry import DEVICE
from arguments.run import attempt, cases, run, verdict

FILES = {"dualbin": "shared_entries", "dualbin.torch": "torch_entries", "dualbin.jax": "jax_entries"}
ALL = "DUALBIN_ALL_ARGUMENTS" in os.environ
SHARE = 3  #: of the cases of JAX, one in so many runs in `make test`


def meant() -> dict[tuple[str, str], list[str]]:
    """Kinds of wrong values that are meant to be accepted, by callable and argument."""
    found = {}
    for line in (Path(__file__).parent / "meant.txt").read_text().splitlines():
        if not line.startswith(("#", "cuda ") if DEVICE == "cpu" else "#"):
            where, _, kinds = line.removeprefix("cuda ").partition(": ")
            name, _, argument = where.partition(" ")
            found.setdefault((name, argument), []).extend(kinds.split("; "))
    return found


def entries() -> dict[str, Any]:
    """The entries of the frameworks that are installed."""
    found: dict[str, Any] = {}
    for module, file in FILES.items():
        try:
            own = importlib.import_module(f"arguments.{file}").ENTRIES
        except ImportError as error:
            if error.name not in {"torch", "jax", "flax"}:
                raise
            continue
        found |= {name if name.startswith("dualbin") else f"{module}.{name}": entry for name, entry in own.items()}
    return found


ENTRIES, MEANT = entries(), meant()


def chosen(name: str) -> set[tuple[str, str]]:
    found = cases(ENTRIES[name])
    if ALL or not name.startswith("dualbin.jax"):
        return set(found)
    return {case for case in found if zlib.crc32(repr((name, case)).encode()) % SHARE == 0}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a path that is right writes a file


@pytest.mark.parametrize("name", ENTRIES)
def test_wrong_arguments(name: str) -> None:
    entry = ENTRIES[name]
    entry.call(**entry.good())
    faults = []
    for outcome in run(entry, chosen(name)):
        right = outcome.result == "accepted" and outcome.wrong in MEANT.get((name, outcome.argument), ())
        if outcome.result != "refused" and not right:
            faults.append(f"{outcome.argument} = {outcome.wrong}: {outcome.result} {outcome.text}")
    entry.call(**entry.good())
    assert not faults, "\n".join(faults)


def test_every_public_callable_has_an_entry() -> None:
    known = {*ENTRIES, *registry.NOT_CALLED, *shared_entries.OF_GGUF}
    of_installed = [name for name, _ in registry.public() if name.rpartition(".")[0] in {*FILES, "dualbin.io", "dualbin.rules"}]
    assert not [name for name in of_installed if name not in known]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_argument_has_a_good_value(name: str) -> None:
    entry = ENTRIES[name]
    wanted, got = set(registry.arguments_of(entry.call)), set(entry.good())
    assert wanted <= got, f"{name}: {wanted - got} have no good value"


def test_there_are_thousands() -> None:
    counts = {name: len(cases(entry)) for name, entry in ENTRIES.items()}
    if {"dualbin.torch.XOR", "dualbin.jax.xor"} <= counts.keys():
        assert sum(counts.values()) >= 8000
        assert sum(len(chosen(name)) for name in counts) >= 5000
    assert all(len(kinds) for kinds in MEANT.values())


# ---- negative controls -------------------------------------------------------------------------------------------------------------------


def test_an_error_that_does_not_name_the_argument_is_noticed() -> None:
    assert verdict(TypeError("rows must be an int"), "row") == "does not name the argument"
    assert verdict(TypeError("row must be an int"), "row") == "refused"
    assert verdict(AttributeError("row"), "row") == "another type of error"


def test_what_is_accepted_is_noticed() -> None:
    entry = registry.Entry(lambda number: number, lambda: {"number": 3})
    assert attempt(entry, {"number": object()}, "number") == ("accepted", "")
    assert {outcome.result for outcome in run(entry, set(cases(entry)))} == {"accepted"}


def test_a_change_before_the_error_is_noticed() -> None:
    def call(values: dict[str, Any], number: int) -> None:
        values["x"] += 1
        message = f"number must be an int, got {number}"
        raise TypeError(message)

    import numpy as np

    entry = registry.Entry(call, lambda: {"values": {"x": np.zeros(3)}, "number": 3})
    assert [outcome.result for outcome in run(entry, {("number", "None")})] == ["changed its arguments before it failed"]
