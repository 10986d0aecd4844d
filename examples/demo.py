"""Train a small language model with an fp32 and with 1-bit input tables, in PyTorch and in JAX, and compare.

    python examples/demo.py                    # on the text of Python's own documentation
    python examples/demo.py --text book.txt    # on yours

Writes curves.png and table.safetensors to the output folder. The exit status is not 0 if the 1-bit table does not beat the one that was
never trained, if the two frontends disagree, or if they look up different bits from the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too, where both use one GPU

import matplotlib as mpl
import numpy as np
import torch

import _jax_model
import _torch_model
import dualbin
import dualbin.io
import dualbin.jax as dbj
import dualbin.torch as dbt
from _setup import Run, Settings, initial_table
from _text import Corpus, file_documents, make_corpus, python_documents

mpl.use("Agg")
from matplotlib import pyplot as plt

STEPS, RUNS = 200, 4
OVERHEAD = 1.5  # of a run with its evaluations and compilation over its steps alone
ENOUGH_STEPS = 100  # below, the runs are too short to compare
MIN_GAIN = 1.05  # perplexity of the untrained table / of the trained one
# Of the two frontends' perplexities: float arithmetic outside the table rounds differently, and 200 steps amplify that. Four seeds of XOR
# in PyTorch alone spread over 1.6 %; on a GPU, where JAX's products were in TF32, the frontends differed by up to 3.5 %.
MAX_DIFFERENCE = 0.05


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = read(options.text)
    print(f"text: {corpus.train.size:,} words to train on, {corpus.held_out.size:,} held out, {len(corpus.words):,} different ones")
    settings = Settings(vocabulary=len(corpus.words), steps=options.steps or STEPS)
    if options.steps is None:
        settings = replace(settings, steps=fitting_steps(corpus, settings, options))
    runs, table, optimizer = train_all(corpus, settings, options.device)
    print_table(runs, settings)
    plot(runs, options.out / "curves.png")
    checkpoint = options.out / "table.safetensors"
    dualbin.io.save(checkpoint, {"embedding": table}, optimizer.export_state({"embedding": table}))
    problems = check_checkpoint(table, checkpoint) + (check_runs(runs) if settings.steps >= ENOUGH_STEPS else [])
    if settings.steps < ENOUGH_STEPS:
        print(f"{settings.steps} steps are too few to compare the runs (at least {ENOUGH_STEPS})")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    print(f"{options.out / 'curves.png'}, {checkpoint}; {time.perf_counter() - start:.0f} s in all")
    return 1 if problems else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to train on (default: Python's documentation)")
    parser.add_argument(
        "--steps", type=int, help=f"steps of each run (default: {STEPS}, or what fits --minutes on this machine, at least {ENOUGH_STEPS})"
    )
    parser.add_argument("--minutes", type=float, default=3, help="how long the runs may take together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the PyTorch runs; JAX uses its default")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.text is not None and not options.text.is_file():
        parser.error(f"--text: there is no file {options.text}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    return options


def fitting_steps(corpus: Corpus, settings: Settings, options: argparse.Namespace) -> int:
    """As many steps as all runs can make in the time there is: fewer than usual where the machine is slow, or busy with something else."""
    table = dbt.BinaryEmbedding.from_float(torch.from_numpy(initial_table(settings))).to(options.device)
    seconds = _torch_model.seconds_of_a_step(table, corpus, settings, options.device) * OVERHEAD
    steps = min(STEPS, max(ENOUGH_STEPS, int(60 * options.minutes / (RUNS * seconds))))
    if steps < STEPS:
        print(
            f"a step takes {seconds:.2f} s here now: {steps} steps a run in place of {STEPS}, to keep to some {options.minutes:g} minutes"
        )
    return steps


def read(text: Path | None) -> Corpus:
    try:
        return make_corpus(python_documents() if text is None else file_documents(text))
    except ValueError as error:
        sys.exit(f"error: {error}")


def train_all(corpus: Corpus, settings: Settings, device: str) -> tuple[list[Run], dbt.BinaryTable, dbt.XOR]:
    """The four runs; also the table that PyTorch trained, and its optimizer."""
    w = initial_table(settings)

    def binary() -> dbt.BinaryEmbedding:
        return dbt.BinaryEmbedding.from_float(torch.from_numpy(w)).to(device)

    dense = torch.nn.Embedding.from_pretrained(torch.from_numpy(w.copy()), freeze=False).to(device)
    trained = binary()
    fp32, _ = _torch_model.train("fp32, PyTorch", dense, corpus, settings, device)
    one_bit, optimizer = _torch_model.train("1-bit, PyTorch", trained, corpus, settings, device)
    one_bit_jax = _jax_model.train("1-bit, JAX", dbj.BinaryTable.from_float(w), corpus, settings)
    frozen, _ = _torch_model.train("1-bit, bits never trained", binary(), corpus, settings, device, train_bits=False)
    return [fp32, one_bit, one_bit_jax, frozen], trained.weight, optimizer


def print_table(runs: list[Run], settings: Settings) -> None:
    weights = settings.vocabulary * settings.width
    print()
    print(f"{'':27}{'held-out':>11}{'bytes of':>12}{'bytes a weight in training':>34}{'':>9}")
    print(f"{'input table':27}{'perplexity':>11}{'the table':>12}{'table + optimizer':>20}{'gradient':>14}{'seconds':>9}")
    for run in runs:
        print(
            f"{run.name:27}{run.perplexity:11.1f}{run.table_bytes:12,}{run.kept_bytes / weights:20.3f}"
            f"{run.gradient_bytes / weights:14.3f}{run.seconds:9.1f}"
        )
    print(f"\n{weights:,} weights. The gradient of a 1-bit table grows with the ids of a batch, the one of an fp32 table with the table.")
    print("Perplexity here is that of the whole held-out text. Progress bars and curves.png, made during the runs, show that of a few")
    print(f"batches of it. Runs of {settings.steps} steps compare how fast the tables learn, not how good they get: the README has")
    print("perplexities after 2500 steps on another, larger text, relative to an fp32 table: no number of this run is to be found there.\n")


def plot(runs: list[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run, style in zip(runs, ("-", "-", "--", ":"), strict=True):
        axes.plot(*zip(*run.curve, strict=True), style, label=f"{run.name}: ends at {run.curve[-1][1]:.1f}")
    axes.set(xlabel="step", ylabel="perplexity on 8 batches of held-out text", yscale="log", title="The same model with four input tables")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:.0f}")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_checkpoint(table: dbt.BinaryTable, path: Path) -> list[str]:
    """Load PyTorch's checkpoint into JAX and look every row up in both."""
    tables, _ = dualbin.io.load(path)
    loaded = dbj.BinaryTable(**tables["embedding"]._asdict())
    ids = np.arange(table.shape[0])
    in_torch = dbt.lookup(table, torch.from_numpy(ids).to(table.device)).detach().cpu().numpy()
    in_jax = np.asarray(dbj.lookup(loaded, ids.astype(np.int32)))
    if not np.array_equal(in_torch.view(np.uint32), in_jax.view(np.uint32)):
        return [f"PyTorch and JAX look up different values from {path}"]
    print(f"checked: from {path}, written by PyTorch, JAX looks up the same bits as PyTorch in all {ids.size:,} rows")
    return []


def check_runs(runs: list[Run]) -> list[str]:
    _, one_bit, one_bit_jax, frozen = (run.perplexity for run in runs)
    problems = []
    gain = frozen / max(one_bit, one_bit_jax)
    if not gain >= MIN_GAIN:
        problems.append(f"the untrained table should be at least {MIN_GAIN} times worse than the trained one, but it is {gain:.3f} times")
    difference = abs(one_bit_jax / one_bit - 1)
    if not difference <= MAX_DIFFERENCE:
        problems.append(f"perplexities of PyTorch and JAX differ by {difference:.1%}, allowed are {MAX_DIFFERENCE:.0%}")
    if not problems:
        print(f"checked: training the bits lowers perplexity {gain:.2f} times; PyTorch and JAX differ by {difference:.2%}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
