"""What an eager call costs on tiny inputs: BinaryEmbedding beside nn.Embedding, in the same loop.

    python benchmarks/overhead.py [--device cuda] [--json FILE]

Prints medians in microseconds and the ratio. The two modules take turns, so that other work on the machine slows both. The table has few
rows, because the backward of nn.Embedding fills a dense gradient, which is slow for a large one. On a CPU the time is processor time:
the wall time of an idle machine, whatever else runs on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dualbin.torch as dbt

ROWS, DIM, IDS = 100, 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=300, help="rounds; each module runs `--calls` times a round")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(torch.device(options.device), options.rounds, options.calls)
    print(f"{ROWS} rows of {DIM}, {IDS} ids, {options.device}, torch {torch.__version__}: median microseconds a call")
    print(f"{'':26}{'nn.Embedding':>14}{'BinaryEmbedding':>17}{'ratio':>7}")
    for name, (dense, binary) in results.items():
        print(f"{name:26}{dense:14.1f}{binary:17.1f}{binary / dense:7.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(device: torch.device, rounds: int, calls: int) -> dict[str, tuple[float, float]]:
    """Case -> median microseconds of nn.Embedding and of BinaryEmbedding."""
    modules = (nn.Embedding(ROWS, DIM, device=device), dbt.BinaryEmbedding(ROWS, DIM, device=device))
    ids, dy = torch.randint(0, ROWS, (IDS,), device=device), torch.randn(IDS, DIM, device=device)
    cases: dict[str, Callable[[nn.Module], object]] = {
        "forward + backward": lambda module: module(ids).backward(dy),
        "forward": lambda module: module(ids),
        "forward, no_grad": torch.no_grad()(lambda module: module(ids)),
    }
    results = {}
    for name, call in cases.items():
        times: tuple[list[float], list[float]] = ([], [])
        for round_ in range(rounds + 2):
            for module, taken in zip(modules, times, strict=True):
                took = _seconds(module, call, calls, device)
                if round_ >= 2:  # the first rounds warm up
                    taken.append(took / calls * 1e6)
        results[name] = (statistics.median(times[0]), statistics.median(times[1]))
    return results


def _seconds(module: nn.Module, call: Callable[[nn.Module], object], calls: int, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    for _ in range(calls):
        module.weight.grad = None
        call(module)
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
