"""The n-gram memory of a language model: what it does for perplexity, packed and as floats of as many bytes.

The demo's transformer is trained on the documentation of Python, with and without a memory of bigrams and trigrams that is added to its
token embeddings. Everything but the memory is the same in all runs: initial values, batches and rates.

    python examples/torch/ngram.py                                       # seven runs of 300 steps, some minutes on a CPU
    python examples/torch/ngram.py --device cuda --sweep --rows-sweep --out ngram.json      # rates of all memories, and their rows
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dualbin.torch as dbt
from dualbin.rules import Counter

sys.path.insert(0, str(Path(__file__).parents[1]))
from _setup import Settings, batches, evaluation_steps
from _text import END, Corpus, file_documents, make_corpus, python_documents
from _torch_model import LanguageModel, loss_of, perplexity, table_bytes

RATES = {"Adam": (0.03, 0.1, 0.3), "Adagrad": (0.1, 0.3, 1.0, 3.0)}  # of an fp32 memory
NORMS = ("rms", "adagrad")  # of a packed one, whose rate is 1
SIZES = (13, 15, 19, 21)  # of packed memories: rows, as powers of two
TOKEN_LR = 0.5  # AdamW, of the token embeddings: their rows are rarely met, as in the demo


@dataclass(frozen=True)
class Variant:
    """A memory and how it is trained; without rows there is none."""

    name: str
    rows: int = 0
    dim: int = 0
    planes: int = 0  # 0: fp32
    optimizer: str = "Adagrad"
    lr: float = 0.3
    norm: str = "rms"


@dataclass
class Result:
    """Of one run. The settings of a variant are chosen on the first half of the held-out text, `perplexity` is that of the second."""

    variant: Variant
    served_bytes: int  # of the rows: a projection is as large in all memories
    chosen_on: float = math.nan
    perplexity: float = math.nan
    step_ms: float = math.nan  # forward, backward and updates: median
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, perplexity of both halves on some batches


class WithMemory(nn.Module):
    """Token embeddings, and the memory's rows of the n-grams that end at the token."""

    def __init__(self, memory: dbt.NGramEmbedding | None, settings: Settings) -> None:
        super().__init__()
        self.tokens, self.memory = nn.Embedding(settings.vocabulary, settings.width), memory

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return x if self.memory is None else x + self.memory(ids)


def make_memory(variant: Variant, boundary: int, width: int) -> dbt.NGramEmbedding | None:
    shape: Any = {"orders": (2, 3), "boundary": boundary, "projection": width}
    if variant.planes:
        return dbt.NGramEmbedding(variant.rows, variant.dim, planes=variant.planes, **shape)
    if not variant.rows:
        return None
    embed = nn.Embedding(variant.rows, variant.dim)
    nn.init.normal_(embed.weight, std=0.3)  # a packed one starts with this scale
    return dbt.NGramEmbedding.from_embedding(embed, **shape)


def make_optimizers(model: nn.Module, variant: Variant, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for the model, and for the rows of a memory one of their own."""
    tokens, memory = model.embedding.tokens.weight, model.embedding.memory
    rows = None if memory is None else memory.embed.weight
    groups = [{"params": [p for p in model.parameters() if p is not rows and p is not tokens]}, {"params": [tokens], "lr": TOKEN_LR}]
    found: list[Any] = [torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=tokens.is_cuda)]
    if variant.planes:
        found.append(dbt.XOR([rows], lr=settings.table_lr, rule=Counter(8, norm=variant.norm), scale_lr=settings.scale_lr))
    elif rows is not None:
        found.append(getattr(torch.optim, variant.optimizer)([rows], lr=variant.lr))
    return found


def train(variant: Variant, corpus: Corpus, settings: Settings, options: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    device = options.device
    memory = make_memory(variant, corpus.words.index(END), settings.width)
    model = LanguageModel(WithMemory(memory, settings), settings).to(device)
    optimizers = make_optimizers(model, variant, settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate) for optimizer in optimizers]
    dense = [p for group in optimizers[0].param_groups for p in group["params"]]
    middle = corpus.held_out.size // 2
    halves = [replace(corpus, held_out=part) for part in (corpus.held_out[:middle], corpus.held_out[middle:])]
    result = Result(variant, 0 if memory is None else table_bytes(memory.embed.weight))
    marks, times = evaluation_steps(settings), []
    for step, tokens in enumerate(batches(corpus, settings), 1):
        begin = time.perf_counter()
        loss = loss_of(model, torch.from_numpy(tokens).long().to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()  # gradients of rows add up until then
        loss.item()  # waits for the device
        times.append(time.perf_counter() - begin)
        for schedule in schedules:
            schedule.step()
        if step in marks:
            result.curve.append((step, *(perplexity(model, half, settings, device, limit=8) for half in halves)))
    result.chosen_on, result.perplexity = (perplexity(model, half, settings, device, limit=1000) for half in halves)
    result.step_ms = float(np.median(times)) * 1e3
    print(line(result), flush=True)
    return result


def alternatives(packed: Variant) -> list[Variant]:
    """fp32 memories with as many bytes as a packed one, with the rates that were best in small: of as wide rows, and of as many."""
    row = packed.planes * -(-packed.dim // 8) + 4
    fewer = replace(packed, name="fp32, fewer rows", planes=0, rows=packed.rows * row // (4 * packed.dim))
    return [fewer, replace(packed, name="fp32, narrower rows", planes=0, dim=max(1, row // 4), lr=3.0)]


def line(result: Result) -> str:
    v = result.variant
    how = "" if not v.rows else f"Counter(8, norm={v.norm!r})" if v.planes else f"{v.optimizer}, lr={v.lr:g}"
    shape = f"{v.rows:,} x {v.dim}" if v.rows else "-"
    return f"{v.name:20}{shape:>15}{result.served_bytes:>13,}  {how:25}{result.perplexity:>11.1f}{result.step_ms:>14.1f}"


def candidates(variant: Variant, sweep: bool) -> list[Variant]:
    """The same memory with all settings that are tried."""
    if not sweep or not variant.rows:
        return [variant]
    if variant.planes:
        return [replace(variant, norm=norm) for norm in NORMS]
    return [replace(variant, optimizer=optimizer, lr=lr) for optimizer, rates in RATES.items() for lr in rates]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="of every run (default: 300 on a CPU, 450 on a GPU)")
    parser.add_argument("--rows", type=int, default=1 << 13, help="of the packed memories (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="weights in a row (default: %(default)s)")
    parser.add_argument("--words", type=int, default=10_000, help="the most words in the vocabulary (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to train on (default: Python's documentation)")
    parser.add_argument("--planes", type=int, nargs="+", default=[1, 4], help="of the packed memories (default: 1 and 4)")
    parser.add_argument("--sweep", action="store_true", help="try optimizers and rates of fp32 memories and norms of packed ones")
    parser.add_argument("--rows-sweep", action="store_true", help=f"memories of 2^{SIZES[0]} to 2^{SIZES[-1]} rows, too")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (300 if options.device == "cpu" else 450)
    return options


def main(arguments: list[str] | None = None) -> list[Result]:
    options = parse(arguments)
    corpus = make_corpus(python_documents() if options.text is None else file_documents(options.text), max_words=options.words)
    settings = Settings(vocabulary=len(corpus.words), steps=options.steps, evaluations=5)
    passes = options.steps * settings.batch * settings.context / corpus.train.size
    print(f"{corpus.train.size:,} words to train on, {passes:.1f} times; {len(corpus.words):,} different ones")
    print(f"{'memory':20}{'rows':>15}{'bytes served':>13}  {'':25}{'perplexity':>11}{'time, ms/step':>14}")
    memories = [Variant(f"planes: {planes}", options.rows, options.dim, planes) for planes in options.planes]
    results, chosen = [], []
    for variant in [Variant("none"), *(each for memory in memories for each in (memory, *alternatives(memory)))]:
        tried = [train(each, corpus, settings, options) for each in candidates(variant, options.sweep)]
        results += tried
        chosen.append(min(tried, key=lambda result: result.chosen_on))
    for packed, *floats in [chosen[n : n + 3] for n in range(1, len(chosen), 3)] if options.rows_sweep else []:
        best = min(floats, key=lambda result: result.chosen_on).variant
        for each in [replace(packed.variant, rows=1 << n) for n in SIZES]:
            others = [replace(other, optimizer=best.optimizer, lr=best.lr) for other in alternatives(each) if other.name == best.name]
            results += [train(variant, corpus, settings, options) for variant in (each, *others)]
    print("\nthe best of each on the first half of the held-out text; perplexity is of the second half:")
    for result in chosen:
        print(f"{line(result)}  {result.perplexity / chosen[0].perplexity:.3f} of none")
    if options.out:
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        report = {"device": device, "options": vars(options), "results": list(map(asdict, results)), "chosen": list(map(asdict, chosen))}
        options.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return chosen


if __name__ == "__main__":
    main()
