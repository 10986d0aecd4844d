"""The quality benchmark from end to end, with tiny models, and its choice of runs."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WIDTH = 32  # of the small models
SCALE_BITS = 5.0  # 20 bytes of a row of 32 weights
VOCABULARY = 300


@pytest.fixture
def quality(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.syspath_prepend(str(root / "examples" / "torch"))
    from _quality import data, plan, report, variants

    return type("Quality", (), {"data": data, "plan": plan, "report": report, "variants": variants})


@pytest.fixture
def torch_tables(quality: Any) -> Any:
    """The module of the input tables in PyTorch."""
    pytest.importorskip("torch")
    from _quality import torch_tables

    return torch_tables


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the command on a text in which every token mostly follows from the one before; returns the output folder."""
    generator = np.random.default_rng(0)
    text = generator.integers(0, VOCABULARY, 14000)
    for n in np.flatnonzero(generator.random(text.size) < 0.7)[1:]:
        text[n] = (7 * text[n - 1] + 3) % VOCABULARY
    np.savez(tmp_path / "text.npz", train=text[:12000].astype(np.uint16), valid=text[12000:])

    def call(*arguments: str) -> Path:
        command = [sys.executable, root / "benchmarks" / "quality.py", "--device", "cpu", "--data", tmp_path / "text.npz", "--small"]
        result = subprocess.run([*command, "--out", tmp_path / "out", *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return tmp_path / "out"

    return call


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """quality.json, and the lines of results.jsonl."""
    return json.loads((out / "quality.json").read_text()), [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_torch(run: Callable[..., Path]) -> None:
    for module in ("torch", "matplotlib"):
        pytest.importorskip(module)
    out = run("--seeds", "2", "--only", r"lm (Counter\((8|4, every=16)\)$|Counter\(8\) \+|Bop|random|straight-through, Adam$|int4)")
    summary, records = read(out)
    rows = {row["name"]: row for row in summary["rows"]}
    assert summary["complete"]
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"| {name} |" in (out / "quality.md").read_text() for name in rows)

    assert (rows["Counter(8)"]["state_bits"], rows["Counter(8)"]["scale_bits"]) == (7, SCALE_BITS)
    assert rows["Counter(8)"]["training_bits"] == 8 + SCALE_BITS
    assert rows["Bop"]["state_bits"] == 32
    matrix = 32 * WIDTH**2 / (VOCABULARY * WIDTH)  # bits a weight
    assert rows["Counter(8) + projection"]["training_bits"] == pytest.approx(8 + SCALE_BITS + 3 * matrix)
    assert rows["Counter(8) + projection"]["served_bytes"] == rows["Counter(8)"]["served_bytes"] + 4 * WIDTH**2
    assert rows["random bits, never trained"]["state_bits"] == 0
    assert (rows["fp32, Adam"]["state_bits"], rows["fp32, Adam"]["scale_bits"]) == (95, 0)
    assert (rows["fp32, Adagrad"]["state_bits"], rows["fp32, Adagrad"]["scale_bits"]) == (63, 0)
    assert rows["straight-through, Adam"]["state_bits"] == 95
    window = rows["Counter(4, every=16)"]["state_bits"] - 3
    assert 0 < window <= 2 * 32 * (1 + 2 / WIDTH)  # float rows and int64 ids; memory for up to twice the rows is kept
    packed = VOCABULARY * (WIDTH // 8 + 4)
    assert {rows[name]["served_bytes"] for name in ("Counter(8)", "Bop", "signs of the finished fp32 table")} == {packed}
    for bits in (8, 4):
        assert rows[f"int{bits} of the finished fp32 table"]["served_bytes"] == VOCABULARY * (bits * WIDTH // 8 + 4)
    assert rows["int8 of the finished fp32 table"]["ratio"] == pytest.approx(1, abs=0.01)
    assert rows["int4 rows of width 8, projected"]["served_bytes"] == VOCABULARY * (8 // 2 + 4) + 4 * 8 * WIDTH

    fp32 = min((rows["fp32, Adam"], rows["fp32, Adagrad"]), key=lambda row: row["selection"])
    assert fp32["ratio"] == fp32["second_half"] == pytest.approx(1)
    assert all(row["runs"] == 2 and row["ratio"] == pytest.approx(row["perplexity"] / fp32["perplexity"]) for row in rows.values())
    assert rows["signs of the finished fp32 table"]["options"] == f"{fp32['name']}, {fp32['options']}"
    assert fp32["options"] == min((r for r in records if r["family"] == fp32["name"]), key=lambda r: r["selection"])["variant"]
    start = math.log(VOCABULARY)
    assert all(record["report"] < start for record in records if record["family"] == "Counter(8)")
    untrained = {record["seed"]: record for record in records if record["family"] == "random bits, never trained"}
    assert all(untrained[seed]["last_update"]["flipped"] == 0 for seed in (0, 1))
    assert all(record["last_update"]["flipped"] > 0 for record in records if record["family"] == "Bop")


@pytest.mark.slow
def test_every_default_beats_bits_that_are_never_trained(run: Callable[..., Path]) -> None:
    """In short runs with a small vocabulary, too."""
    for module in ("torch", "matplotlib"):
        pytest.importorskip(module)
    summary, _ = read(run("--seeds", "1", "--steps", "60", "--only", r"lm (Counter\(\d\)|random bits, never trained)$"))
    rows = {row["name"]: row["perplexity"] for row in summary["rows"]}
    assert all(rows[f"Counter({bits})"] < 0.95 * rows["random bits, never trained"] for bits in range(1, 9))


@pytest.mark.slow
def test_jax_adds_to_the_results(run: Callable[..., Path]) -> None:
    for module in ("torch", "jax", "optax", "matplotlib"):
        pytest.importorskip(module)
    run("--seeds", "1", "--only", r"sg Counter\(8\)$")
    out = run("--seeds", "1", "--only", r"sg Counter\(8\)$", "--frontend", "jax")
    rows = {(row["frontend"], row["name"]): row for row in read(out)[0]["rows"]}
    for name in ("fp32, Adam", "fp32, Adagrad"):
        assert rows["jax", name]["perplexity"] == pytest.approx(rows["torch", name]["perplexity"], rel=1e-3)
        assert rows["jax", name]["training_bits"] == rows["torch", name]["training_bits"]
    in_torch, in_jax = (rows[frontend, "Counter(8)"] for frontend in ("torch", "jax"))
    for name in ("state_bits", "scale_bits", "served_bytes"):
        assert in_torch[name] == in_jax[name]
    assert in_jax["state_bits"] == 7
    assert in_jax["perplexity"] == pytest.approx(in_torch["perplexity"], rel=1e-3)  # the same batches, weights and random numbers

    summary, records = read(run("--seeds", "1", "--only", r"sg Bop$"))
    names = [(row["frontend"], row["name"]) for row in summary["rows"]]
    assert {("torch", "Bop"), ("torch", "Counter(8)"), ("jax", "Counter(8)")} < set(names)
    assert len(names) == len(set(names))
    runs = [(r["frontend"], r["family"], r["variant"], r["seed"]) for r in records]
    assert len(runs) == len(set(runs)), "the runs of fp32 replace those before"


LOSSES = {  # (family, variant, seed) -> loss on the first half, on the second
    ("fp32, Adam", "lr 5", 0): (4.00, 4.00),
    ("fp32, Adam", "lr 10", 0): (4.10, 3.00),
    ("fp32, Adam", "lr 5", 1): (4.02, 4.10),
    ("fp32, Adagrad", "lr 0.2", 0): (3.90, 4.20),
    ("fp32, Adagrad", "lr 0.2", 1): (4.00, 4.10),
    ("Counter(8)", "bits 8, every 1", 0): (3.96, 4.24),
    ("Counter(8)", "bits 8, every 1", 1): (4.08, 4.12),
}


def test_the_reference_is_the_fp32_table_that_is_better_on_the_first_half(quality: Any) -> None:
    sizes = quality.data.tasks(small=True)
    families = quality.variants.ordered({name: task.width for name, task in sizes.items()}, jax=False)
    memory = dict.fromkeys(("weights_bytes", "rule_bytes", "scale_bytes", "served_bytes"), 0)
    records = [
        {"frontend": "torch", "task": "lm", "family": family, "variant": variant, "seed": seed, "seconds": 1.0, "options": {"lr": 1.0}}
        | {"selection": first, "report": second, "finished": {"signs": {"selection": 6.0, "report": 6.0, "served_bytes": 1}}}
        | memory
        for (family, variant, seed), (first, second) in LOSSES.items()
    ]
    rows = {row.name: row for row in quality.report.make_rows(records, families, sizes)}
    whole = math.exp((3.90 + 4.20 + 4.00 + 4.10) / 4)
    assert rows["fp32, Adagrad"].perplexity == pytest.approx(whole)
    assert (rows["fp32, Adagrad"].ratio, rows["fp32, Adagrad"].second_half) == (pytest.approx(1), pytest.approx(1))
    adam = rows["fp32, Adam"]
    assert adam.spread == pytest.approx((math.exp(4.06) - math.exp(4.00)) / math.sqrt(2))
    assert adam.options == "lr 5", "the second half chooses nothing"
    assert adam.ratio == pytest.approx(math.exp((4.00 + 4.00 + 4.02 + 4.10) / 4) / whole)
    assert adam.second_half == pytest.approx(math.exp((4.00 + 4.10) / 2 - (4.20 + 4.10) / 2))
    row = rows["Counter(8)"]
    assert row.ratio == pytest.approx(math.exp((3.96 + 4.24 + 4.08 + 4.12) / 4) / whole)
    assert row.spread == pytest.approx(0, abs=1e-9), "both seeds have the same mean of both halves"
    assert row.second_half == pytest.approx(math.exp((4.24 + 4.12) / 2 - (4.20 + 4.10) / 2))
    assert rows["signs of the finished fp32 table"].options == "fp32, Adagrad, lr 0.2"
    assert rows["signs of the finished fp32 table"].ratio == pytest.approx(math.exp(6.0) / whole)


def test_adagrad_is_that_of_pytorch(quality: Any, torch_tables: Any) -> None:
    import torch

    task = quality.data.tasks(small=True)["lm"]
    rates = torch_tables.Rates(torch.zeros(()), torch.zeros(()))
    table = torch_tables.make_table(task, quality.variants.Variant("fp32", {"optimizer": "adagrad", "lr": 0.3}), 0, rates)
    weight = table.lookup(torch.arange(task.vocabulary)).detach().clone().requires_grad_()
    other = torch.optim.Adagrad([weight], lr=0.3)
    generator = torch.Generator().manual_seed(0)
    for share in (0.5, 1.0, 0.25):
        ids = torch.randint(task.vocabulary // 2, (50,), generator=generator)
        rates.share.fill_(share)
        other.param_groups[0]["lr"] = 0.3 * share
        for rows in (table.lookup(ids), torch.nn.functional.embedding(ids, weight)):
            (rows * torch.linspace(-1, 1, task.width)).sum().backward()
        table.step(share)
        other.step()
        table.zero_grad()
        other.zero_grad()
    torch.testing.assert_close(table.lookup(torch.arange(task.vocabulary)), weight)


def drain(plan: Any, loss: Callable[[Any], float]) -> list[tuple[str, str, int]]:
    """Do all runs of a plan one after the other."""
    done = []
    while (job := plan.next()) is not None:
        done.append((job.family.name, job.variant.describe(), job.seed))
        plan.finished(job, loss(job))
    return done


def grid_family(quality: Any) -> Any:
    candidates = tuple(quality.variants.Variant("fp32", {"lr": rate}) for rate in (1.0, 3.0, 9.0))
    return quality.variants.Family("lm", "grid", quality.variants.BASELINES, candidates, "lr")


@pytest.mark.parametrize(("optimum", "tried"), [(3.0, []), (30.0, [27.0, 81.0]), (0.4, [0.333, 0.111])])
def test_plan_extends_a_grid_until_its_best_is_inside(quality: Any, optimum: float, tried: list[float]) -> None:
    plan = quality.plan.Plan([grid_family(quality)], seeds=3)
    done = drain(plan, lambda job: abs(math.log(job.variant.options["lr"] / optimum)))
    rates = [1.0, 3.0, 9.0, *tried]
    assert done[: len(rates)] == [("grid", f"lr {rate:g}", 0) for rate in rates]
    best = min(rates, key=lambda rate: abs(math.log(rate / optimum)))
    assert done[len(rates) :] == [("grid", f"lr {best:g}", seed) for seed in (1, 2)]


def test_plan_goes_on_with_others_while_it_cannot_choose(quality: Any) -> None:
    single = quality.variants.Family("lm", "single", quality.variants.RULES, (quality.variants.counter(8, 8.0, 0.0),), seeds=2)
    plan = quality.plan.Plan([grid_family(quality), single], seeds=3)
    jobs = [plan.next() for _ in range(6)]
    assert [None if job is None else (job.family.name, job.seed) for job in jobs] == [
        *[("grid", 0)] * 3,
        ("single", 0),
        ("single", 1),
        None,
    ]
    for job, loss in zip(jobs[:3], (2.0, 1.0, float("inf")), strict=True):
        plan.finished(job, loss)
    job = plan.next()
    assert (job.family.name, job.variant.options["lr"], job.seed) == ("grid", 3.0, 1)


def test_families_have_distinct_names_and_candidates(quality: Any) -> None:
    sizes = quality.data.tasks()
    families = quality.variants.ordered({name: task.width for name, task in sizes.items()}, jax=False)
    names = [(family.task, family.name) for family in families]
    assert len(names) == len(set(names))
    for family in families:
        described = [variant.describe() for variant in family.candidates]
        assert len(described) == len(set(described))
    kept = [variant.rule() for family in families if family.task == "lm" for variant in family.candidates if variant.kind == "xor"]
    counters = {(rule.bits, rule.every) for rule in kept if hasattr(rule, "bits")}
    assert counters >= {(bits, every) for bits in (8, 6, 4, 3, 2, 1) for every in (1, 8, 32, 64)} | {(5, 1), (7, 1)}


def test_held_out_halves_do_not_overlap(quality: Any) -> None:
    for task in quality.data.tasks(small=True).values():
        first, second = quality.data.held_out_windows(task, 2000)
        assert max(first.source.max(), first.target.max()) + task.context <= 1000
        assert min(second.source.min(), second.target.min()) >= 1000
        assert max(second.source.max(), second.target.max()) + task.context <= 2000


@pytest.mark.parametrize("arrays", [{"train": np.zeros(3000, int)}, {"train": np.zeros(3000), "valid": np.zeros(3000, int)}])
def test_bad_text(quality: Any, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"must hold '(train|valid)'"):
        quality.data.load(tmp_path / "bad.npz", 300)
