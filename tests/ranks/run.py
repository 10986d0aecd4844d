"""What several processes do together: `python -m ranks.run WORLD FOLDER cpu|cuda [CHECK...]`, with tests/ on the path.

Runs the checks of `replicas` and `shards` on WORLD ranks of gloo, or of NCCL with a GPU each, and then the example scripts. Ranks of
gloo are forked before any thread exists, which saves imports. Every rank leaves a report in FOLDER, which `launch` reads.
"""

from __future__ import annotations

import datetime
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # (optimizers import it; once for all ranks)
import torch.distributed as dist

from ranks import bags, benchmark, divided, graphs, replicas, shards
from ranks.support import device

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "torch"

CHECKS = (
    replicas.ddp_fifty_steps,
    replicas.an_infinity_on_one_rank_skips_on_all,
    replicas.a_rank_without_lookups_takes_part,
    replicas.no_sync_accumulates,
    replicas.half_precision_tied_and_frozen_tables,
    replicas.fsdp_leaves_tables_to_us,
    replicas.prepare_ddp_refuses_different_tables,
    divided.divided_state_gives_the_bits_of_sync_row_grads,
    divided.divided_state_goes_on_from_what_was_saved,
    divided.divided_state_loads_with_another_number_of_ranks,
    divided.a_bad_gradient_on_one_rank_raises_on_all,
    shards.shards_become_the_unsharded_table,
    bags.sharded_bags_are_those_of_the_unsharded_table,
    bags.bad_bags_on_one_rank_raise_on_all,
    shards.what_has_no_slot_is_nan_and_counted,
    shards.a_rank_needs_memory_for_its_share,
    shards.a_bad_id_on_one_rank_raises_on_all,
    shards.a_collection_is_one_exchange,
    shards.ranks_that_disagree_raise_on_all,
    shards.bits_of_a_new_table_depend_on_the_seed_only,
    shards.mixed_precision_agrees_on_infinities,
    shards.checkpoints_load_with_another_number_of_ranks,
    shards.a_shard_loads_an_unsharded_table,
    benchmark.the_benchmark_measures_and_counts,
)
CUDA_CHECKS = (graphs.captured_steps_are_those_of_eager_mode, graphs.nothing_waits_for_the_device_but_one_reading_of_numbers)
SCRIPTS = ("ddp.py", "sharded.py")  # of examples/torch


def checks_of(kind: str) -> tuple[Callable[[int, int], None], ...]:
    return (*CHECKS, *CUDA_CHECKS) if kind == "cuda" else CHECKS


Note = Callable[[str, str], None]  #: (name, outcome) into this rank's report


def all_checks(rank: int, world: int, note: Note, only: list[str]) -> None:
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=60))
    for check in checks_of(device().type):
        if not only or check.__name__ in only:
            note(check.__name__, "not finished")
            check(rank, world)  # if it fails, the ranks are no longer in step: no further check then
            note(check.__name__, "ok")
    if cuda:
        dist.destroy_process_group()


def script(name: str, note: Note) -> None:
    note(name, "not finished")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    note(name, "ok")


def job(name: str, rank: int, world: int, only: list[str]) -> None:
    """The checks, or one of the scripts, on this rank; the outcomes go into its report."""
    file = Path(os.environ["RANKS_FOLDER"], f"{rank}.json")
    report = json.loads(file.read_text()) if file.exists() else {}

    def note(check: str, outcome: str) -> None:
        report[check] = outcome
        file.write_text(json.dumps(report))

    try:
        script(name, note) if name in SCRIPTS else all_checks(rank, world, note, only)
    except BaseException:
        note(f"failure of {name}", traceback.format_exc())


def fork_ranks(world: int, name: str, only: list[str]) -> None:
    """A job on new ranks, which find each other through the environment. The parent must have no threads here."""
    done, go = os.pipe(), os.pipe()
    children = [child for rank in range(world) if (child := _fork(name, rank, world, only, done[1], go))]
    os.close(done[1])
    for _ in children:
        os.read(done[0], 1)
    os.close(go[1])
    for child in children:
        os.waitpid(child, 0)


def _fork(name: str, rank: int, world: int, only: list[str], done: int, go: tuple[int, int]) -> int:
    """The child ends when `go` is closed: a rank that went away while others still connect or close would leave them hanging."""
    child = os.fork()
    if child:
        return child
    os.close(go[1])
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    job(name, rank, world, only)
    os.write(done, b".")
    os.read(go[0], 1)
    os._exit(0)


def start_ranks(world: int, name: str, only: list[str]) -> None:
    """A job on new ranks that share nothing with this process: CUDA does not survive a fork."""
    command = [sys.executable, "-m", "ranks.run", str(world), os.environ["RANKS_FOLDER"], "cuda", *only]
    environments = [os.environ | {"RANKS_JOB": name, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    for process in [subprocess.Popen(command, env=environment) for environment in environments]:
        process.wait()


def main() -> None:
    world, only = int(sys.argv[1]), sys.argv[4:]
    os.environ["RANKS_FOLDER"], os.environ["RANKS_DEVICE"] = sys.argv[2:4]
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))  # where torchrun would look for what a script imports
    if "RANKS_JOB" in os.environ:
        job(os.environ["RANKS_JOB"], int(os.environ["RANK"]), world, only)
        return
    Path(sys.argv[2], "names").write_text("\n".join([*(check.__name__ for check in checks_of(sys.argv[3])), *SCRIPTS]))
    for name in ("checks", *SCRIPTS):
        if only and name != "checks" and name not in only:
            continue
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        (start_ranks if sys.argv[3] == "cuda" else fork_ranks)(world, name, only)


if __name__ == "__main__":
    main()
