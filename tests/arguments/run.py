"""Calls with one wrong argument each, and what became of them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from arguments.registry import DEVICE, Entry
from arguments.snapshot import snapshot
from arguments.wrong import wrong_values

DOCUMENTED = (TypeError, ValueError, IndexError, NotImplementedError)

#: what a message may name in the place of an argument: where it has another name inside, or where two arguments do not fit each other
ALIASES = {
    "value": ("rule",),  # of from_plain
    "bits": ("scale",),
    "device": ("generator",),
    "qweight": ("embed_scale",),
    "num_embeddings": ("padding_idx",),
    "V": ("padding_idx",),
    "input": ("ids", "id", "per_sample_weights"),
    "ids": ("out",),
    "embeddings": ("w",),
    "names": ("states",),
    "opt_state": ("exported",),
    "params": ("optimizer got an empty parameter list",),  # PyTorch's words, as those below
}

#: errors that others word: of the path of a file, of devices, of arrays that were donated, of functions that the user gives
WORDED_BY_OTHERS = {
    "path": (r"No such file or directory",),
    "segment_ids": (r"a packed table is no array",),
    "device": (
        r"Expected one of cpu, cuda",
        r"Device (index|string) must not be",
        r"Cannot access accelerator device",
        r"Overflow when unpacking",
        r"invalid device ordinal",
    ),
    "context": (r"in lookups since the last check",),  # what a GPU counts are rows of the table
    "shard_state": (r"shard_state=\.\.\.\) needs torch\.distributed",),
    "loss_fn": (r"takes 0 positional arguments", r"Only integer scalar arrays", r"Gradient only defined for scalar-output"),
    "ids": (r"takes 0 positional arguments", r"Only integer scalar arrays", r"inhomogeneous shape"),
    "has_aux": (r"iteration over a 0-d array",),
    "a": (r"too large to convert to int32",),
    "dy": (r"entry not a 2- or 3- tuple",),
}
DELETED = r"Array has been deleted with shape|called on deleted or donated buffer"  # of JAX, of arrays that were donated or deleted


#: in an error that a GPU only counts: rows of NaN are what such a lookup gives
LATER = "since the last check"


class Outcome(NamedTuple):
    """Of one call."""

    argument: str
    wrong: str
    #: "refused", "accepted", or what is wrong with the error
    result: str
    text: str = ""


def cases(entry: Entry) -> list[tuple[str, str]]:
    """(argument, kind of wrong value) of every case of an entry."""
    good = entry.good()
    return [(name, kind) for name in good if name not in entry.free for kind, _ in wrong_values(name, good)]


def run(entry: Entry, chosen: set[tuple[str, str]]) -> Iterator[Outcome]:
    """The outcomes of the chosen cases. What a refused call was given is compared with what it was, and made anew after every other one."""
    good = entry.good()
    kept = snapshot(good)
    for name in list(good):
        if name in entry.free:
            continue
        for kind, value in wrong_values(name, good):
            if (name, kind) not in chosen:
                continue
            result, text = attempt(entry, {**good, name: value}, name)
            if DEVICE == "cuda":
                check_usable()
            if LATER not in text and result != "accepted" and any(snapshot(x) != kept[key] for key, x in good.items() if key != name):
                result = "changed its arguments before it failed"
            if result != "refused" or LATER in text:
                good = entry.good()
                kept = snapshot(good)
            yield Outcome(name, kind, result, text)


def attempt(entry: Entry, arguments: dict[str, Any], name: str) -> tuple[str, str]:
    """What a call does: the result, as in :class:`Outcome`, and the text of its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = entry.call(**arguments)
            if DEVICE == "cuda":
                await_device(result)
        except Exception as error:
            return verdict(error, name), f"{type(error).__name__}: {error}"
    return "accepted", ""


def await_device(result: Any) -> None:
    """Wait for a GPU and raise what a call could only count there."""
    import jax

    from dualbin._errors import check_errors

    jax.block_until_ready(result)
    check_errors()


def check_usable() -> None:
    """Raise unless the GPU still computes: a fault of a kernel makes everything fail that comes after it in the process."""
    import torch

    from dualbin._errors import check_errors

    torch.cuda.synchronize()
    with contextlib.suppress(IndexError):
        check_errors()  # of lookups before the error of a call that was refused
    assert torch.arange(100, device="cuda").sum().item() == 4950


def verdict(error: Exception, name: str) -> str:
    """Whether an error is a documented one that names the argument."""
    text = str(error)
    if any(re.search(pattern, text) for pattern in (*WORDED_BY_OTHERS.get(name, ()), DELETED)):
        return "refused"
    if not isinstance(error, DOCUMENTED):
        return "another type of error"
    names = (name, *ALIASES.get(name, ()))
    return "refused" if any(re.search(rf"(?<![a-z]){re.escape(each)}(?![a-z])", text) for each in names) else "does not name the argument"
