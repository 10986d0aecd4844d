"""A memory of 51.2 * 10^9 weights in training beside a transformer on one GPU: time a step with and without it, GB, share of the step.

320,000,000 rows of 160 weights, `Counter(2)`, and a transformer of 12 layers of 768 in bfloat16, whose 32,768 tokens a step look 262,144
rows up. In fp32 such a table takes 205 GB, and with Adam 614. The text is made up: a token is mostly a function of the two before it, which
a small vocabulary (`--small`) repeats often enough to be learned; here it decides that the rows of every step are others, as fast as they
can be made.

    python examples/torch/ngram_large.py --device cuda --out ngram_large.json
    python examples/torch/ngram_large.py --small                                  # the same in a few seconds on a CPU
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualbin.torch as dbt
from dualbin.rules import Counter

SMALL = {"rows": 20_000, "dim": 20, "width": 32, "layers": 1, "batch": 16, "context": 32, "vocabulary": 48, "steps": 60}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A causal transformer; with a memory, whose rows go through a matrix of its own and are added to the embeddings of the tokens."""

    def __init__(self, options: argparse.Namespace, memory: dbt.NGramEmbedding | None) -> None:
        super().__init__()
        width = options.width
        self.tokens, self.position = nn.Embedding(options.vocabulary, width), nn.Parameter(torch.zeros(options.context, width))
        self.blocks = nn.Sequential(*[Block(width, max(1, width // 64)) for _ in range(options.layers)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, options.vocabulary)
        self.memory = memory
        if memory is not None:
            self.project = nn.Linear(len(memory.ngrams.parts) * options.dim, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.position
        if self.memory is not None:
            x = x + self.project(self.memory(ids))
        return self.out(self.norm(self.blocks(x)))


@dataclass
class Result:
    """Of one training; `memory_gb` is all that was allocated at once, and a CPU does not tell it."""

    step_ms: float  # forward, backward and updates: median
    losses: list[float]
    parameters: int
    memory_gb: float | None
    build_s: float = 0.0  # to make the table
    table_bytes: int = 0  # bits and scales
    state_bytes: int = 0  # what the optimizer keeps for it
    rows_a_step: int = 0
    flips: int = 0  # in the last step


def make_text(options: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """int64 [batch, context + 1]: three tokens of four follow from the two before them, the others are random."""
    shape, size = (options.context + 1, options.batch), options.vocabulary
    device = generator.device
    text = torch.randint(0, size, shape, generator=generator, device=device)
    follows = torch.rand(shape, generator=generator, device=device) < 0.75
    for n in range(2, options.context + 1):
        text[n] = torch.where(follows[n], (31 * text[n - 1] + 17 * text[n - 2] + 7) % size, text[n])
    return text.T.contiguous()


def train(options: argparse.Namespace, *, with_memory: bool) -> Result:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    memory, build_s = None, 0.0
    if with_memory:
        begin = clock(device)
        # on the device and packed from the start: no float of the table ever exists
        memory = dbt.NGramEmbedding(options.rows, options.dim, heads=options.heads, device=device, dtype=torch.bfloat16)
        build_s = clock(device) - begin
    torch.manual_seed(1)
    with device:
        model = LanguageModel(options, memory)
    dense = [p for p in model.parameters() if not isinstance(p, dbt.BinaryTable)]
    optimizers: list[Any] = [torch.optim.AdamW(dense, lr=options.lr, fused=cuda)]
    if memory is not None:
        optimizers.append(dbt.XOR([memory.embed.weight], rule=Counter(2)))
    generator, times, losses = torch.Generator(device).manual_seed(2), [], []
    for _ in range(options.steps):
        text = make_text(options, generator)
        begin = clock(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(clock(device) - begin)
        losses.append(loss.item())
    warm = times[min(5, len(times) - 1) :]
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    result = Result(statistics.median(warm) * 1e3, losses, sum(p.numel() for p in dense), peak)
    if memory is not None:
        table, xor = memory.embed.weight, optimizers[1]
        kept = [value.nbytes for value in xor.state[table].values() if isinstance(value, Tensor)]
        result.build_s, result.table_bytes, result.state_bytes = build_s, table.bits.nbytes + table.scale.nbytes, sum(kept)
        result.rows_a_step, result.flips = memory.rows(text[:, :-1]).unique().numel(), xor.stats()["flips"]
    return result


def clock(device: torch.device) -> float:
    """Seconds, when the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help=f"other defaults: {SMALL}")
    for name, default in {"rows": 320_000_000, "dim": 160, "heads": 4, "width": 768, "layers": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"batch": 32, "context": 1024, "vocabulary": 32_000, "steps": 25}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    if parser.parse_known_args(arguments)[0].small:
        parser.set_defaults(**SMALL, lr=3e-3)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    options = parse(arguments)
    results = {"without": train(options, with_memory=False), "with": train(options, with_memory=True)}
    without, memory = results["without"], results["with"]
    share = 1 - without.step_ms / memory.step_ms
    weights = options.rows * options.dim
    print(f"{weights:,} weights: {memory.table_bytes / 1e9:.3g} GB served, {(memory.table_bytes + memory.state_bytes) / 1e9:.3g} GB in")
    print(f"training (fp32 with Adam: {weights * 12 / 1e9:.3g}), made in {memory.build_s:.2f} s; {memory.rows_a_step:,} rows a step\n")
    print(f"{'transformer':20}{'parameters':>14}{'time, ms/step':>15}{'GB, all':>9}{'loss':>7}")
    for name, each in results.items():
        gb = "-" if each.memory_gb is None else f"{each.memory_gb:.1f}"
        print(f"{name + ' memory':20}{each.parameters:>14,}{each.step_ms:>15.2f}{gb:>9}{each.losses[-1]:>7.3f}")
    print(f"\nthe memory's share of the time of a step: {share:.1%} (hash, lookup, projection, backward, update)")
    if not all(math.isfinite(loss) for each in results.values() for loss in each.losses):
        msg = "a loss is not finite"
        raise RuntimeError(msg)
    if options.out:
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        report = {"options": vars(options), "device": device, "share": share, **{name: asdict(each) for name, each in results.items()}}
        options.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return results


if __name__ == "__main__":
    main()
