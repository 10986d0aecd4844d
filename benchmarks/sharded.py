"""Time tables over several ranks beside what else there is, and count the bytes that they send.

    python benchmarks/sharded.py --device cuda --out sharded.json            # as many ranks as there are GPUs
    torchrun --nproc-per-node 4 benchmarks/sharded.py --device cuda          # or started by another
    python benchmarks/sharded.py --device cpu --ranks 2 --small              # with gloo, to see that everything works

Every rank looks up its own ids. A time is that of one call in a row of them, on the slowest rank; so it holds what the host needs where the
host is slower than the GPU. Bytes are those of the arrays that are handed to torch.distributed, without what a rank sends to itself.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import dualbin.torch as dbt
from dualbin import rules
from dualbin.torch import _distributed

DIM, BATCHES, WARM_UP, SAMPLES, CALLS = 128, 4, 5, 5, 20

Call = Callable[[int], Any]


def main() -> None:
    options = parse()
    if "RANK" in os.environ:
        rank_main(int(os.environ["RANK"]), options)
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(options.ranks))
    torch.multiprocessing.spawn(spawned, (options,), nprocs=options.ranks)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()), help="default: the number of GPUs")
    parser.add_argument("--rows", type=int, help="of the sharded table (default: 100 million a rank)")
    parser.add_argument("--ids", type=int, help="a rank and call (default: 65536)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name has this text; may be repeated")
    parser.add_argument("--small", action="store_true", help="tiny tables; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", options.ranks))
    options.rows = options.rows or (2_000 if options.small else 100_000_000) * world
    options.ids = options.ids or (512 if options.small else 65_536)
    options.replica_rows = 3_000 if options.small else 2_000_000
    return options


def spawned(rank: int, options: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    rank_main(rank, options)


def rank_main(rank: int, options: argparse.Namespace) -> None:
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"])) if options.device == "cuda" else torch.device("cpu")
    if options.device == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=60))
    run = Run(options, device)
    run.all_cases()
    if rank == 0:
        run.report()
    dist.barrier()
    dist.destroy_process_group()


class Run:
    """What all cases share: the batches of this rank, the clock, the results."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.results: list[dict[str, Any]] = []
        self.start = time.monotonic()
        generator = torch.Generator(device).manual_seed(self.rank)
        self.uniform = self._batches(lambda n: torch.randint(0, options.rows, (n,), device=device, generator=generator))
        self.zipf = self._batches(lambda n: scattered(torch.rand(n, device=device, generator=generator, dtype=torch.float64), options.rows))
        self.replica_ids = [ids % options.replica_rows for ids in self.uniform]
        self.dy = torch.randn(options.ids, DIM, device=device, generator=generator)

    def all_cases(self) -> None:
        for make in (baselines, sharded, bags, replicas, captured):
            make(self)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _batches(self, draw: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        return [draw(self.options.ids) for _ in range(BATCHES)]

    def time(self, name: str, call: Call, *, rows: int = 0, calls: int = CALLS, sent: dict[str, int] | None = None) -> None:
        """Measure a case.

        Args:
            rows: how many fp32 rows would have to travel in its place.
            sent: what a call sends, where that was counted before.
        """
        if self.options.only and not any(text in name for text in self.options.only):
            return
        for index in range(WARM_UP):
            call(index)
        with counted(self.world) as seen:
            call(0)
        sent = sent or seen
        samples = [self._sample(call, calls) for _ in range(SAMPLES)]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, (samples, sent["bytes"]))
        slowest = [max(times) for times in zip(*(times for times, _ in everyone), strict=True)]
        result = {"name": name, "ms": statistics.median(slowest) * 1e3, "samples_ms": [second * 1e3 for second in slowest]}
        result |= {"sent_bytes": max(count for _, count in everyone), "collectives": sent["calls"]}
        if rows:
            dense = rows * DIM * 4 * (self.world - 1) / self.world
            result["share_of_fp32_rows"] = result["sent_bytes"] / dense if dense else 0.0
        self.results.append(result)
        if self.rank == 0:
            share = f", {result['share_of_fp32_rows']:.3f} of fp32 rows" if rows else ""
            print(f"{name:70} {result['ms']:9.3f} ms, sends {result['sent_bytes']:>12,} bytes{share}", flush=True)

    def note(self, name: str, text: str) -> None:
        self.results.append({"name": name, "note": text})
        if self.rank == 0:
            print(f"{name:70} {text}", flush=True)

    def _sample(self, call: Call, calls: int) -> float:
        dist.barrier()
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for index in range(calls):
                call(index)
            return (time.perf_counter() - begin) / calls
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for index in range(calls):
            call(index)
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / calls / 1e3

    def report(self) -> None:
        facts = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or platform.machine(),
            "ranks": self.world,
            "rows": self.options.rows,
            "ids": self.options.ids,
            "replica_rows": self.options.replica_rows,
            "dim": DIM,
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - self.start, 1),
        }
        if self.options.out:
            self.options.out.write_text(json.dumps({"facts": facts, "results": self.results}, indent=1) + "\n")
        print(json.dumps(facts))


def scattered(uniform: torch.Tensor, rows: int) -> torch.Tensor:
    """Ids by 1/rank, from numbers in [0, 1): the hot rows are scattered over the table, as by a hash."""
    ranks = torch.exp(uniform * torch.log(torch.tensor(float(rows)))).long().clamp(max=rows) - 1
    return ranks * 2_654_435_761 % rows


@contextmanager
def counted(world: int) -> Iterator[dict[str, int]]:
    """The bytes that this rank hands to collectives for other ranks, and how many collectives there are."""
    sent = {"bytes": 0, "calls": 0}
    rank, all_to_all, all_gather = dist.get_rank(), dist.all_to_all_single, _distributed._all_gather

    def count_all_to_all(out: torch.Tensor, array: torch.Tensor, received: Any = None, split: Any = None, **options: Any) -> Any:
        own = array.nbytes // world if split is None else sum(split) and array.nbytes * split[rank] // sum(split)
        sent["bytes"] += array.nbytes - own
        sent["calls"] += 1
        return all_to_all(out, array, received, split, **options)

    def count_all_gather(out: torch.Tensor, array: torch.Tensor, **options: Any) -> Any:
        sent["bytes"] += array.nbytes * (world - 1)
        sent["calls"] += 1
        return all_gather(out, array, **options)

    dist.all_to_all_single, _distributed._all_gather = count_all_to_all, count_all_gather
    try:
        yield sent
    finally:
        dist.all_to_all_single, _distributed._all_gather = all_to_all, all_gather


# ---- cases -------------------------------------------------------------------------------------------------------------------------------


def baselines(run: Run) -> None:
    ids, share = run.options.ids, run.options.rows // run.world
    local = dbt.BinaryEmbedding(share, DIM, device=run.device).requires_grad_(False)
    batches = [batch % share for batch in run.uniform]
    run.time("lookup in a table of this rank alone", lambda i: local(batches[i % BATCHES]))
    for name, width, dtype in (("fp32 rows", DIM, torch.float32), ("packed rows and scales", DIM // 8 + 4, torch.uint8)):
        rows = torch.zeros(ids // run.world * run.world, width, dtype=dtype, device=run.device)
        out = torch.empty_like(rows)
        run.time(f"all-to-all of {name}", lambda _, rows=rows, out=out: dist.all_to_all_single(out, rows), rows=ids)
    dense = nn.Embedding(run.options.replica_rows, DIM, device=run.device)
    ddp = nn.parallel.DistributedDataParallel(dense)
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.1)

    def step(index: int) -> None:
        ddp(run.replica_ids[index % BATCHES]).backward(run.dy)
        sgd.step()
        sgd.zero_grad()

    run.time("nn.Embedding under DDP (replica), SGD step", step, calls=min(CALLS, 5))
    run.note("torchrec, row-wise", "not measured here" if importlib.util.find_spec("torchrec") else "not installed")


def step_of(module: Any, optimizer: dbt.XOR, batches: list[Any], dy: torch.Tensor) -> Call:
    def step(index: int) -> None:
        module(batches[index % BATCHES]).backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sharded(run: Run) -> None:
    ids = run.options.ids
    module = dbt.ShardedBinaryEmbedding(run.options.rows, DIM, device=run.device)
    optimizer = dbt.XOR([module.weight], rule=rules.Counter(8))
    for name, batches in (("uniform", run.uniform), ("1/rank", run.zipf)):
        run.time(f"sharded forward, eager, {name}", lambda i, b=batches: forward(module, b[i % BATCHES]), rows=ids)

        def ahead(index: int, batches: list[torch.Tensor] = batches, early: list[Any] = []) -> None:  # noqa: B006
            forward(module, early.pop() if early else batches[index % BATCHES])
            early.append(module.prefetch(batches[(index + 1) % BATCHES]))

        run.time(f"sharded forward, eager, prefetched, {name}", ahead, rows=ids)
        run.time(f"sharded step, eager, {name}", step_of(module, optimizer, batches, run.dy), rows=2 * ids)
    run.time("sharded step, eager, backward here, uniform", here(step_of(module, optimizer, run.uniform, run.dy)), rows=2 * ids)
    module.grad_dtype = torch.bfloat16
    run.time("sharded step, eager, bf16 gradients, uniform", step_of(module, optimizer, run.uniform, run.dy), rows=2 * ids)


def here(step: Call) -> Call:
    """The same with the backward pass in this thread: by default PyTorch has one for each GPU, which has to wake up."""

    def call(index: int) -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return step(index)

    return call


def forward(module: Any, ids: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(ids)


def bags(run: Run) -> None:
    length = 16
    module = dbt.ShardedBinaryEmbeddingBag(run.options.rows, DIM, mode="sum", device=run.device)
    optimizer = dbt.XOR([module.weight], rule=rules.Counter(8))
    batches = [ids.view(-1, length) for ids in run.uniform]
    count = len(batches[0])
    run.time(f"sharded bags of {length}, forward, eager", lambda i: forward(module, batches[i % BATCHES]), rows=run.options.ids)
    run.time(f"sharded bags of {length}, step, eager", step_of(module, optimizer, batches, run.dy[:count]), rows=2 * run.options.ids)


def replicas(run: Run) -> None:
    options, ids = {"device": run.device, "generator": torch.Generator(run.device).manual_seed(1)}, run.replica_ids
    for name in ("local step", "step with sync_row_grads", "step with shard_state"):
        module = dbt.BinaryEmbedding(run.options.replica_rows, DIM, **options)
        dbt.prepare_ddp(module)
        optimizer = dbt.XOR([module.weight], rule=rules.Counter(8), shard_state=name.endswith("shard_state"))

        def step(index: int, module: Any = module, optimizer: dbt.XOR = optimizer, synced: bool = name.endswith("grads")) -> None:
            module(ids[index % BATCHES]).backward(run.dy)
            if synced:
                dbt.sync_row_grads([module.weight])
            optimizer.step()
            optimizer.zero_grad()

        run.time(f"replicas, {name}", step, rows=run.options.ids)
        run.time(f"replicas, {name}, backward here", here(step), rows=run.options.ids)


def slots_for(run: Run, batches: list[torch.Tensor]) -> int:
    """A capacity that holds these batches on every rank, with 3 % to spare, as a multiple of 4."""
    share = -(-run.options.rows // run.world)
    most = torch.stack([(ids.unique() // share).bincount(minlength=run.world).max() for ids in batches]).max()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return min(share, -(-int(int(most) * 1.03) // 4) * 4)


def captured(run: Run) -> None:
    if run.device.type != "cuda":
        run.note("captured", "needs a GPU")
        return
    for name, batches in (("uniform", run.uniform), ("1/rank", run.zipf)):
        captured_with(run, name, batches)
        torch.cuda.empty_cache()


def captured_with(run: Run, kind: str, batches: list[torch.Tensor]) -> None:
    module = dbt.ShardedBinaryEmbedding(run.options.rows, DIM, device=run.device, capacity=slots_for(run, batches))
    optimizer = dbt.XOR([module.weight], rule=rules.Counter(8), capturable=True)
    ids = batches[0].clone()
    step = step_of(module, optimizer, [ids] * BATCHES, run.dy)
    run.time(f"sharded forward, capacity, eager, {kind}", lambda _: forward(module, ids), rows=run.options.ids)
    run.time(f"sharded step, capacity, eager, {kind}", step, rows=2 * run.options.ids)
    for name, call in (("forward", lambda _: forward(module, ids)), ("step", step)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call(0)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with counted(run.world) as sent, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call(0)

        def replay(index: int, graph: Any = graph) -> None:
            ids.copy_(batches[index % BATCHES])
            graph.replay()

        run.time(f"sharded {name}, captured, {kind}", replay, rows=(1 + (name == "step")) * run.options.ids, sent=sent)
        torch.cuda.synchronize()
        dist.barrier()
    dbt.check_errors()  # no id was without a slot


if __name__ == "__main__":
    main()
