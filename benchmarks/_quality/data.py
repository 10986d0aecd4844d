"""The two tasks: their sizes, batches, held-out text and initial values. NumPy only, so that both frontends start and read the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INITIAL_SCALE = 0.3  # of a row of a 1-bit table
SCALE_RATE = 3.0  # rate of the scales, relative to the base rate of the dense weights
_WARM_UP = 0.03  # of the steps
_REACH = 5  # skip-gram: a context word is at most this far from its centre

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Task:
    """A model, its text windows and its schedule.

    Attributes:
        name: "lm" is a causal transformer, "sg" skip-gram with a full softmax.
        vocabulary, width: V and D of the input table. The output layer has its own weights.
        context: tokens of a text window; 1 for skip-gram.
        batch: windows of a step.
        layers, dropout: of the transformer.
        lr: base rate of AdamW.
        held_out_batches: at most this many batches of each half of the held-out text.
    """

    name: str
    vocabulary: int
    width: int
    context: int
    batch: int
    layers: int
    dropout: float
    lr: float
    steps: int = 2500
    held_out_batches: int = 32

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)

    @property
    def scale_lr(self) -> float:
        """Rate of the scales where the rate of the rule is the schedule itself."""
        return SCALE_RATE * self.lr


def tasks(small: bool = False, steps: int | None = None) -> dict[str, Task]:
    """The tasks by name; `small` is for a smoke run on a CPU."""
    found = {
        "lm": Task("lm", 24000, 256, context=64, batch=64, layers=2, dropout=0.2, lr=1.5e-3),
        "sg": Task("sg", 24000, 256, context=1, batch=4096, layers=0, dropout=0.0, lr=3e-3),
    }
    if small:
        cut = {"vocabulary": 300, "width": 32, "steps": 20, "held_out_batches": 2}
        found = {
            "lm": replace(found["lm"], context=16, batch=8, layers=1, **cut),
            "sg": replace(found["sg"], batch=128, **cut),
        }
    return {name: replace(task, steps=steps) for name, task in found.items()} if steps else found


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids: `train` and `valid`, int32. Texts are the same only if they are the same object."""

    train: NDArray[np.int32]
    valid: NDArray[np.int32]


def load(path: Path, vocabulary: int) -> Text:
    """Read `train` and `valid` from an .npz file; ids that the vocabulary has not become 0.

    Raises:
        ValueError: an array is missing, not one-dimensional, not of integers, negative somewhere, or too short.
    """
    with np.load(path) as file:
        parts = {}
        for name in ("train", "valid"):
            array = file[name] if name in file.files else None
            if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or array.size < 2000 or array.min() < 0:
                msg = f"{path} must hold {name!r}: at least 2000 integers of 0 or more in one dimension"
                raise ValueError(msg)
            parts[name] = np.where(array < vocabulary, array, 0).astype(np.int32)
    return Text(**parts)


def schedule(steps: int) -> NDArray[np.float32]:
    """Share of the full rate at every step: a short warm-up, then linear to 0."""
    step = np.arange(steps)
    return (np.minimum(1.0, (step + 1) / max(1, int(_WARM_UP * steps))) * (1 - step / steps)).astype(np.float32)


@dataclass(frozen=True)
class Windows:
    """Where windows start in a text, int32 `[steps, batch]`: those that are read, and those that are predicted."""

    source: NDArray[np.int32]
    target: NDArray[np.int32]


@lru_cache(maxsize=6)  # a worker runs the same task and seed many times
def training_windows(task: Task, length: int, seed: int) -> Windows:
    """Every batch of a run over a text of `length` tokens."""
    return _random_windows(task, 0, length, task.steps, np.random.default_rng([77, seed]))


def held_out_windows(task: Task, length: int) -> tuple[Windows, Windows]:
    """The batches on which hyper-parameters are chosen (first half of the text) and those that are reported (second half)."""
    halves = ((0, length // 2), (length // 2, length))
    if task.name == "sg":
        generator = np.random.default_rng(5)
        first, second = (_random_windows(task, low, high, task.held_out_batches, generator) for low, high in halves)
        return first, second
    first, second = (_consecutive_windows(task, low, high) for low, high in halves)
    return first, second


def _random_windows(task: Task, low: int, high: int, steps: int, generator: np.random.Generator) -> Windows:
    shape = (steps, task.batch)
    if task.name == "lm":
        source = generator.integers(low, high - task.context, shape, dtype=np.int32)
        return Windows(source, source + 1)
    source = generator.integers(low + _REACH, high - _REACH, shape, dtype=np.int32)
    distance = generator.integers(1, _REACH + 1, shape, dtype=np.int32)
    return Windows(source, np.where(generator.integers(0, 2, shape, dtype=np.int8) == 1, source + distance, source - distance))


def _consecutive_windows(task: Task, low: int, high: int) -> Windows:
    batches = min(task.held_out_batches, (high - low - 1) // (task.context * task.batch))
    if batches == 0:
        msg = f"the held-out text is too short for a batch of {task.batch} windows of {task.context} tokens in each half"
        raise ValueError(msg)
    source = low + task.context * np.arange(batches * task.batch, dtype=np.int32).reshape(batches, task.batch)
    return Windows(source, source + 1)


def unigram_log_probabilities(task: Task, text: Text) -> NDArray[np.float32]:
    """float32 `[V]`, with one more occurrence of every token than the text has."""
    counts = np.bincount(text.train, minlength=task.vocabulary) + 1.0
    return np.log(counts / counts.sum()).astype(np.float32)


@lru_cache(maxsize=6)
def initial_weights(task: Task, text: Text, seed: int) -> Arrays:
    """All dense weights by name; matrices are `[out, in]`. The arrays are shared by the callers: copy them before changing them."""
    generator = np.random.default_rng([1000, seed])
    values: Arrays = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        bound = 1 / math.sqrt(inputs)
        values[f"{name}.weight"] = generator.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
        values[f"{name}.bias"] = generator.uniform(-bound, bound, outputs).astype(np.float32)

    def norm(name: str) -> None:
        values[f"{name}.weight"] = np.ones(task.width, np.float32)
        values[f"{name}.bias"] = np.zeros(task.width, np.float32)

    width = task.width
    values["out.weight"] = 0.02 * generator.standard_normal((task.vocabulary, width), dtype=np.float32)
    if task.name == "sg":
        return values | {"out.bias": unigram_log_probabilities(task, text)}
    values["out.bias"] = np.zeros(task.vocabulary, np.float32)
    values["position"] = 0.02 * generator.standard_normal((task.context, width), dtype=np.float32)
    norm("norm")
    for layer in range(task.layers):
        for name, inputs, outputs in (("qkv", 1, 3), ("mix", 1, 1), ("up", 1, 4), ("down", 4, 1)):
            linear(f"blocks.{layer}.{name}", inputs * width, outputs * width)
        norm(f"blocks.{layer}.norm1")
        norm(f"blocks.{layer}.norm2")
    return values


def initial_bits(task: Task, seed: int, spread: float = 0.5, planes: int = 1) -> NDArray[np.uint8]:
    """Random packed planes `[V, planes * D / 8]`: signs, and magnitudes that are uniform below half of their range.

    Each sign differs with probability `spread` from a pattern that all rows have in common.
    """
    signs = _initial_signs(task, seed, spread)
    if planes == 1:
        return signs
    lower = np.random.default_rng([4, seed]).integers(0, 256, (task.vocabulary, (planes - 2) * task.width // 8), dtype=np.uint8)
    return np.concatenate([signs, np.zeros_like(signs), lower], axis=1)


def _initial_signs(task: Task, seed: int, spread: float) -> NDArray[np.uint8]:
    bits = np.random.default_rng([1, seed]).integers(0, 256, (task.vocabulary, task.width // 8), dtype=np.uint8)
    if spread == 0.5:
        return bits
    different = np.random.default_rng([3, seed]).random((task.vocabulary, task.width), dtype=np.float32) < spread
    return bits[:1] ^ np.packbits(different, axis=1)


def initial_floats(shape: tuple[int, ...], deviation: float, seed: int, stream: int) -> NDArray[np.float32]:
    """Normal numbers; `stream` keeps the tables of a run apart."""
    return np.float32(deviation) * np.random.default_rng([2, stream, seed]).standard_normal(shape, dtype=np.float32)
