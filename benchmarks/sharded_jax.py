"""Time JAX tables whose rows are sharded over all devices, and say what crosses devices, beside a float table sharded alike.

    python benchmarks/sharded_jax.py --out sharded_jax.json                                       # all GPUs of this host
    python benchmarks/sharded_jax.py --devices 2 --global-ids 262144                              # a fixed batch over fewer of them
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/sharded_jax.py --small

A time is that of one call in a row of them, so it holds what the host needs where the host is slower than the GPU. What crosses devices is
read from the compiled program: the results of its collectives.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dualbin.jax as dbj
from dualbin import rules

DIM, BATCHES, WARM_UP, SAMPLES, CALLS = 128, 4, 3, 5, 20
_COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"\w+\[[\d,]*\]")


def main() -> None:
    options = parse()
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
    run = Run(options, mesh)
    run.cases()
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "rows": options.rows,
        "ids": options.ids,
        "dim": DIM,
        "jax": jax.__version__,
    }
    if options.out:
        options.out.write_text(json.dumps({"facts": facts, "results": run.results}, indent=1) + "\n")
    print(json.dumps(facts))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, help="default: all")
    parser.add_argument("--rows", type=int, help="of the table (default: 100 million a device)")
    parser.add_argument("--ids", type=int, help="a device and call (default: 65536)")
    parser.add_argument("--global-ids", type=int, help="a call, over all devices, in the place of --ids")
    parser.add_argument("--small", action="store_true", help="tiny tables; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    options.devices = options.devices or jax.device_count()
    options.rows = options.rows or (2_000 if options.small else 100_000_000) * options.devices
    options.float_rows = (2_000 if options.small else 2_000_000) * options.devices
    options.ids = (options.global_ids or 0) // options.devices or options.ids or (512 if options.small else 65_536)
    return options


class Run:
    """What all cases share: the mesh, the batches, the results."""

    def __init__(self, options: argparse.Namespace, mesh: Any) -> None:
        self.options, self.mesh = options, mesh
        self.results: list[dict[str, Any]] = []
        self.random = np.random.default_rng(0)

    def over_rows(self, x: Any) -> Any:
        return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec("rows")))

    def batches(self, rows: int, *, zipf: bool = False) -> list[jax.Array]:
        """Ids of all devices, uniform or by 1/rank with the hot rows scattered over the table."""
        count = self.options.ids * self.options.devices

        def draw() -> np.ndarray:
            if not zipf:
                return self.random.integers(0, rows, count)
            ranks = np.exp(self.random.random(count) * np.log(rows)).astype(np.int64).clip(max=rows) - 1
            return ranks * 2_654_435_761 % rows

        return [self.over_rows(draw().astype(np.int32)) for _ in range(BATCHES)]

    def time(self, name: str, call: Callable[[int], Any], program: str) -> None:
        for index in range(WARM_UP):
            jax.block_until_ready(call(index))
        samples = []
        for _ in range(SAMPLES):
            begin = time.perf_counter()
            for index in range(CALLS):
                last = call(index)
            jax.block_until_ready(last)
            samples.append((time.perf_counter() - begin) / CALLS * 1e3)
        crossing = [f"{kind} {' '.join(_ARRAY.findall(shapes))}" for shapes, kind in _COLLECTIVE.findall(program)]
        self.results.append({"name": name, "ms": statistics.median(samples), "samples_ms": samples, "collectives": crossing})
        print(f"{name:50} {statistics.median(samples):9.3f} ms   {'; '.join(crossing)}", flush=True)

    def cases(self) -> None:
        options = self.options
        sharding = NamedSharding(self.mesh, PartitionSpec("rows"))
        floats = jax.jit(lambda: jnp.zeros((options.float_rows, DIM), jnp.float32), out_shardings=sharding)()
        take = jax.jit(lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"), out_shardings=sharding)
        batches = self.batches(options.float_rows)
        program = take.lower(floats, batches[0]).compile().as_text()
        self.time("jnp.take from float32, sharded alike", lambda i, floats=floats: take(floats, batches[i % BATCHES]), program)
        del floats

        table = jax.jit(lambda key: dbj.BinaryTable.create(key, options.rows, DIM), out_shardings=sharding)(jax.random.key(0))
        lookup = jax.jit(lambda table, ids: table[ids], out_shardings=sharding)
        kinds = {"uniform": self.batches(options.rows), "1/rank": self.batches(options.rows, zipf=True)}
        for name, batches in kinds.items():
            program = lookup.lower(table, batches[0]).compile().as_text()
            self.time(f"lookup, {name}", lambda i, batches=batches: lookup(table, batches[i % BATCHES]), program)

        target = self.over_rows(self.random.standard_normal((options.ids * options.devices, DIM), np.float32))
        tx = dbj.xor(1.0, rule=rules.Counter(8))
        run = dbj.value_and_grad(lambda table, ids, target: jnp.mean((table[ids] - target) ** 2), ids=lambda _, ids, __: ids)

        def step(table: Any, state: Any, ids: jax.Array, target: jax.Array) -> Any:
            loss, grads = run(table, ids, target)
            updates, state = tx.update(grads, state, table)
            return optax.apply_updates(table, updates), state, loss

        jitted = jax.jit(step, donate_argnums=(0, 1))
        carry = [table, tx.init(table)]
        program = jitted.lower(*carry, kinds["uniform"][0], target).compile().as_text()
        for name, batches in kinds.items():

            def call(index: int, batches: list[jax.Array] = batches) -> Any:
                *carry[:], loss = jitted(*carry, batches[index % BATCHES], target)
                return loss

            self.time(f"forward, backward and step, {name}", call, program)


if __name__ == "__main__":
    main()
