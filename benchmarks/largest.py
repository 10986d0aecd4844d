"""Train the largest table that all GPUs of a host hold together: memory a rank, time a step, a checkpoint for another number of ranks.

    python benchmarks/largest.py --device cuda --rows 800000000 --folder /tmp/largest --out largest.json
    python benchmarks/largest.py --device cpu --ranks 4 --rows 100000 --folder /tmp/largest      # with gloo, to see that everything works

Half as many ranks (at least one) read the checkpoint and compare fingerprints of every block of rows with those of the ranks that wrote it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import dualbin.torch as dbt
from dualbin import rules

BLOCK = 1 << 22  #: rows of a fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="default: the number of GPUs")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--bits", type=int, default=2, help="of Counter (default: %(default)s)")
    parser.add_argument("--ids", type=int, default=65_536, help="a rank and step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written, and removed again; without it there is none")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    facts: dict[str, Any] = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "weights": options.rows * options.dim,
    }
    written = launch(options.ranks, options, "train")
    facts["train"] = {key: value for key, value in written.items() if key != "fingerprints"}
    if options.folder:
        read = launch(max(1, options.ranks // 2), options, "read")
        facts["read"] = {key: value for key, value in read.items() if key != "fingerprints"}
        facts["checkpoint_GB"] = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file()) / 1e9
        shutil.rmtree(options.folder)
        facts["equal"] = written["fingerprints"] == read["fingerprints"]
    print(json.dumps(facts, indent=1))
    if options.out:
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    if not facts.get("equal", True):
        sys.exit("the checkpoint that was read is not the table that was written")


def launch(ranks: int, options: argparse.Namespace, task: str) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(rank_main, (options, task, results), nprocs=ranks)
    return results.get()


def rank_main(rank: int, options: argparse.Namespace, task: str, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if options.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=300))
    module = dbt.ShardedBinaryEmbedding(options.rows, options.dim, device=device)
    optimizer = dbt.XOR([module.weight], rule=rules.Counter(options.bits))
    state = {"table": module, "xor": dbt.XORCheckpoint(module, optimizer)}
    found: dict[str, Any] = {"ranks": dist.get_world_size()}
    if task == "train":
        found |= train(options, module, optimizer)
        if options.folder:
            found["save_s"] = seconds(lambda: dcp.save(state, checkpoint_id=options.folder))
    else:
        found["load_s"] = seconds(lambda: dcp.load(state, checkpoint_id=options.folder))
    if device.type == "cuda":
        found["memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, fingerprints(module, optimizer)))
    if rank == 0:
        found = {key: max(each[key] for each, _ in everyone) for key in found}
        merged: dict[int, list[Any]] = {}
        for _, parts in everyone:
            for block, part in parts.items():
                merged.setdefault(block, []).extend(part)
        results.put(found | {"fingerprints": {block: sums(parts) for block, parts in merged.items()}})
    dist.barrier()
    dist.destroy_process_group()


def train(options: argparse.Namespace, module: Any, optimizer: dbt.XOR) -> dict[str, Any]:
    device = module.weight.device
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    dy = torch.randn(options.ids, options.dim, device=device, generator=generator)
    times = []

    def step(ids: torch.Tensor) -> None:
        module(ids).backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(options.steps):
        ids = torch.randint(0, options.rows, (options.ids,), device=device, generator=generator)
        dist.barrier()
        times.append(seconds(lambda ids=ids: step(ids)))
    return {"step_ms": sorted(times)[len(times) // 2] * 1e3, "first_step_ms": times[0] * 1e3, "steps": options.steps}


def seconds(call: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def arrays(module: Any, optimizer: dbt.XOR) -> list[torch.Tensor]:
    """What has a row for every row of this shard: bits, scale, and the state."""
    rows = module.weight.shape[0]
    state = optimizer.state[module.weight]
    kept = [value for _, value in sorted(state.items()) if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows]
    return [module.weight.bits, module.weight.scale, *kept]


def fingerprints(module: Any, optimizer: dbt.XOR) -> dict[int, list[tuple[int, str]]]:
    """Of every block of rows the parts that lie here: (first row, sums of every array with weights by position)."""
    table, found = module.weight, {}
    first, last = table.first_row, table.first_row + table.shape[0]
    for begin in range(first - first % BLOCK, last, BLOCK):
        low, high = max(first, begin), min(last, begin + BLOCK)
        parts = []
        for array in arrays(module, optimizer):
            data = array[low - first : high - first].contiguous().view(torch.uint8).reshape(high - low, -1)
            place = torch.arange(low, high, device=data.device).mul_(0x9E3779B97F4A7C15 - 2**64)  # wraps, as all of these do
            column = torch.arange(1, data.shape[1] + 1, device=data.device).mul_(0x2545F4914F6CDD1D)
            parts.append(int(((data.to(torch.int64) + 1) * column).sum(1).mul_(place | 1).sum()))
        found[begin] = [parts]
    return found


def sums(parts: list[list[int]]) -> str:
    """The fingerprint of a block: its parts added up, however many ranks had them."""
    return hashlib.sha256(str([sum(each) % 2**64 for each in zip(*parts, strict=True)]).encode()).hexdigest()


if __name__ == "__main__":
    main()
