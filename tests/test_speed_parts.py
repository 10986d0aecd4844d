"""The parts of the speed benchmark: what must move, ids, clocks, what becomes of measurements, and what the command takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def test_bytes_of_the_full_workloads(speed: Any) -> None:
    wide, zipf, tall = speed.workloads.workloads("cuda", small=False)[:3]
    assert wide.forward_bytes(4, 8) == 268_435_456 + 8_388_608 + 65_536 + 131_072
    assert zipf.forward_bytes(2, 4, 4) == 100_663_296 + 4 * 6_291_456 + 262_144 + 262_144
    assert wide.update_bytes(4, 8, 1, 15_000) == 268_435_456 + 131_072 + 15_360_000
    assert tall.update_bytes(2, 4, 8, 250_000) == 67_108_864 + 1_048_576 + 64_000_000
    assert speed.workloads.Workload(10, 9, 3).forward_bytes(2, 4) == 3 * (18 + 2 + 4 + 4)  # 9 bits take 2 bytes


def test_ids(speed: Any) -> None:
    (zipf,), uniform = speed.workloads.workloads("cpu", small=True), speed.workloads.Workload(3000, 64, 500)
    for size in (uniform, zipf):
        sets = size.draw()
        assert all(ids.shape == (size.count,) and ids.dtype == np.int64 for ids in sets)
        assert all(ids.min() >= 0 and ids.max() < size.rows for ids in sets)
        assert not np.array_equal(sets[0], sets[1])
    counts = np.bincount(np.concatenate(zipf.draw()), minlength=zipf.rows)
    assert counts.argmax() == 0
    assert counts[0] / counts.sum() == pytest.approx(1 / (1 / np.arange(1, zipf.rows + 1)).sum(), rel=0.1)


def test_laws(speed: Any) -> None:
    workload, laws = speed.workloads.Workload, speed.workloads
    assert set(np.concatenate(workload(100, 8, 50, laws.ONE_ROW).draw()).tolist()) == {7}
    ids = np.concatenate(workload(4096, 8, 5000, laws.POWER_LAW).draw())
    counts = np.sort(np.bincount(ids, minlength=4096))[::-1]
    assert ids.min() >= 0
    assert ids.max() < 4096
    assert counts[0] / counts[9] == pytest.approx(10**1.05, rel=0.4)  # rank 1 of a law cut into whole ranks has more than its share
    assert (counts > 0).sum() > 1000  # scattered over the rows
    with pytest.raises(ValueError, match=r"law must be one of uniform, zipf, one row, power law 1\.05, got 'even'"):
        workload(10, 8, 5, "even").draw()


def test_the_fastest_peer_counts(speed: Any) -> None:
    def row(name: str, peer: bool, times: list[float], error: str | None = None) -> Any:
        return speed.report.Row("w", "torch", "forward", name, "fp32", peer, 100.0, 2.0, times, error=error)

    rows = [row("ours", False, [9.0, 4.0, 5.0]), row("slow", True, [20.0]), row("fast", True, [10.0]), row("gone", True, [], "why not")]
    speed.report.compare(rows)
    assert (rows[0].median_us, rows[0].floor_ratio, rows[0].peer_ratio, rows[0].fastest_peer) == (5.0, 2.5, 0.5, "fast")
    facts = {"device": "d", "driver": None, "python": "3", "versions": {}, "command": "c", "fallbacks": []}
    text = speed.report.markdown(rows, ["jax: broken"], facts)
    assert "### Forward\n" in text
    assert "| w | torch | ours | 5.0 | 2.50 | 0.50 |" in text
    assert "| w | torch | gone | failed |" in text
    assert "Not among the peers, as it is not installed: FBGEMM." in text
    assert "- jax: broken\n- w, torch, forward, fp32: gone: FAILED: why not\n" in text


def test_a_failed_measurement_becomes_a_line(speed: Any, tmp_path: Path) -> None:
    def prepare() -> Any:
        msg = "no memory\nand more"
        raise ValueError(msg)

    run = speed.main.Run("cpu", True, (), (), tmp_path, {"copy": {"gb_s": 10.0}})
    group = speed.cases.Group("w", "fp32", [speed.cases.Case("forward", "broken", 1e4, prepare)])
    row = run._row(group.cases[0], speed.timing.Clock(), group, "torch")
    assert (row.error, row.median_us, row.floor_us, row.failed) == ("ValueError: no memory", None, 1.0, True)
    assert str(row) == "w, torch, forward, fp32: broken: FAILED: ValueError: no memory"


def test_a_plug_outlasts_the_launches(speed: Any) -> None:
    assert speed.timing._plug_length(3e-3, 1e-3) == 6
    assert speed.timing._plug_length(1.0, 1e-3) == speed.timing._MAX_PLUG
    assert speed.timing._plug_length(1.0, 0.0) == 0
    assert speed.timing._MAX_PLUG + speed.timing._CALLS < 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        ([], "one of the arguments --device --plot is required"),
        (["--device", "cpu", "--frontend", "numpy"], "--frontend: invalid choice: 'numpy'"),
        (["--device", "cuda"], "--device cuda: dualbin is built without CUDA"),
        (["--device", "cpu", "--out", __file__], "--out: "),
        (["--device", "cpu", "--what", "bags,tables"], "--what: tables: not among updates, lookups, steps, calls, bags, grouping, huge"),
        (["--plot", "nothing.json"], "--plot: there is no file nothing.json"),
        (["--plot", __file__, "--device", "cpu"], "not allowed with argument"),
    ],
)
def test_bad_arguments(
    speed: Any, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed.main.dualbin, "backends", lambda: {"cuda": {"built": False, "devices": 0}})
    with pytest.raises(SystemExit) as stop:
        speed.main.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bytes_of_bags(speed: Any) -> None:
    wide, narrow = speed.workloads.bags("cuda", small=False)
    assert wide.bytes(4) == 65536 * (128 * 4 + 8) + 65536 * 20 * (32 + 32 + 8)  # 16 bytes of bits take a sector
    assert narrow.bytes(2, 8) == 65536 * (64 * 2 + 8) + 65536 * 20 * (64 + 32 + 8)


def test_sums_of_kernels(speed: Any) -> None:
    sums = speed.timing.sums_by_call
    events = [("sort<1>", 1.0), ("other", 9.0), ("count", 2.0)] * 3
    assert sums(events, ("sort", "count"), 3) == [3.0, 3.0, 3.0]
    for names in (("sort",), ("nothing",)):
        with pytest.raises(RuntimeError, match=r"kernels named .* in 2 calls, which launched: count, other, sort<1>"):
            sums(events, names, 2)


def test_ranges_that_code_has_named_are_no_launches(speed: Any) -> None:
    annotation = speed.timing.is_annotation
    assert annotation(SimpleNamespace(name="mine", is_user_annotation=True))
    assert annotation(SimpleNamespace(name="Optimizer.step#XOR.step"))
    assert not annotation(SimpleNamespace(name="Memset (Device)", is_user_annotation=False))


def test_launches(speed: Any) -> None:
    pytest.importorskip("torch")
    from _speed.torch_calls import launches, summarise

    kernel = "void dualbin::kernels::(anonymous namespace)::update_words<(bool)1, 3>(dualbin::RowArgs)"
    found = summarise(["Memcpy HtoD (Pinned -> Device)", kernel, "void cub::Scan<int>(x)"] * 2, 2)
    assert found == {"kernels": 2.0, "copies": 1.0, "names": ["Memcpy HtoD (Pinned -> Device)", "update_words", "Scan"]}
    with pytest.raises(speed.timing.Skip, match="those on a GPU"):
        launches("cpu", True)
    facts = {"device": "d", "driver": None, "python": "3", "versions": {}, "command": "c", "fallbacks": []}
    text = speed.report.markdown([], [], {**facts, "launches": [{"workload": "w", **found}]})
    assert "| w | 2 | 1 | Memcpy HtoD (Pinned -> Device), update_words, Scan |" in text


def test_a_slow_call_is_made_less_often(speed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(speed.timing.time, "perf_counter", lambda: now[0])

    def trial(seconds: float) -> int:
        made: list[int] = []

        def call(index: int) -> None:
            made.append(index)
            now[0] += seconds

        calls, host = speed.timing._trial(call, lambda _: None)
        assert host == pytest.approx(calls * seconds)
        assert len(made) == speed.timing._WARM_UP + calls
        return calls

    assert [trial(seconds) for seconds in (1e-4, 0.011, 0.4)] == [16, 4, 1]


def test_a_table_that_does_not_fit_is_skipped(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from _speed import torch_huge

    monkeypatch.setattr(torch_huge.os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name])
    group = next(torch_huge.groups("cpu", True))
    run = speed.main.Run("cpu", True, (), (), tmp_path, {"copy": {"gb_s": 10.0}})
    for case in group.cases:
        row = run._row(case, speed.timing.Clock(), group, "torch")
        assert row.skipped
        assert not row.failed
        assert row.error == "needs 0.0 GB, and 0.0 GB are free"


def test_memory_is_a_column(speed: Any) -> None:
    row = speed.report.Row("w", "torch", "whole", "ours", "fp32", False, 100.0, 2.0, [4.0], memory=41_360_000_000)
    facts = {"device": "d", "driver": None, "python": "3", "versions": {"fbgemm_gpu": "1"}, "command": "c", "fallbacks": []}
    text = speed.report.markdown([row], [], facts)
    assert "| workload | frontend | operation | fp32 | / floor | / peer | GB |\n" in text
    assert "| w | torch | ours | 4.0 | 2.00 |  | 41.4 |" in text
    assert "not installed" not in text


def test_jax_is_set_beside_pytorch(speed: Any) -> None:
    def row(frontend: str, name: str, dtype: str, time: float) -> Any:
        return speed.report.Row("w", frontend, "d", name, dtype, False, 0, 0, [time])

    rows = [
        row("torch", "dualbin.torch.XOR.step, Counter(8)", "fp32", 10.0),
        row("torch", "dualbin.torch.lookup", "bf16", 3.0),
        row("jax", "dualbin.jax.xor_update, Counter(8)", "fp32", 12.0),
        row("jax", "dualbin.jax.xor_update, Counter(8)", "bf16", 12.0),
        row("jax", "dualbin.jax.grad, xor, optax.apply_updates, Counter(8)", "fp32", 24.0),
        row("jax", "dualbin.jax.lookup", "bf16", 2.0),
        row("jax", "jnp.take", "bf16", 1.0),
    ]
    found = [(one.operation, one.dtype, other.frontend, one.median_us / other.median_us) for one, other in speed.report.pairs(rows)]
    assert found == [
        ("dualbin.jax.xor_update, Counter(8)", "fp32", "torch", 1.2),
        ("dualbin.jax.grad, xor, optax.apply_updates, Counter(8)", "fp32", "jax", 2.0),
        ("dualbin.jax.lookup", "bf16", "torch", pytest.approx(2 / 3)),
    ]


class Broken:
    """A frontend of which one topic fails after its first group, with a clock for which every call takes a microsecond."""

    def __init__(self, cases: Any) -> None:
        self._cases, self.released = cases, 0

    def start(self, _device: str) -> str:
        return "a device"

    def clock(self, _device: str, _copy_bytes: int) -> Any:
        return SimpleNamespace(bandwidth=1e9, times=lambda _: [1e-6])

    def release(self) -> None:
        self.released += 1

    def peak_memory(self) -> int:
        return 5 * self.released

    def groups(self, topic: str, _device: str, _small: bool) -> Any:
        case = self._cases.Case("forward", f"{topic} case", 2000, lambda: lambda _: None)
        yield self._cases.Group("w", "fp32", [case, self._cases.Case("forward", "unwanted", 0, lambda: 1 / 0)], memory=True)
        if topic == "bags":
            msg = "no bags"
            raise OSError(msg)


def test_a_run_keeps_what_it_has(speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written after each group, a topic that fails is a line, and --only leaves cases out."""
    module, written = Broken(speed.cases), []
    monkeypatch.setattr(speed.main.importlib, "import_module", lambda _: module)
    facts = {"driver": None, "python": "3", "versions": {}, "command": "c", "fallbacks": []}
    run = speed.main.Run("cpu", True, ("bags", "huge"), ("CASE",), tmp_path, facts)
    real = run.write
    run.write = lambda: written.append(len(run.rows)) or real()
    run.measure("torch")
    assert written == [1, 1, 2, 2]
    summary = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["operation"], row["floor_us"], row["median_us"], row["memory"]) for row in summary["rows"]] == [
        ("bags case", 2.0, 1.0, 0),
        ("huge case", 2.0, 1.0, 0),
    ]
    assert summary["device"] == "a device"
    assert summary["failures"] == run.failures == ["torch, bags: OSError: no bags"]
    assert "- torch, bags: OSError: no bags\n" in (tmp_path / "speed.md").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_topics_run_in_their_order(speed: Any, tmp_path: Path) -> None:
    assert speed.main.topics("bags,updates") == ("updates", "bags")
    with pytest.raises(argparse.ArgumentTypeError):
        speed.main.topics("")
    parse = speed.main.parse
    assert parse(["--device", "cpu", "--out", str(tmp_path)]).what == ("updates", "lookups", "steps", "bags")
    assert parse(["--device", "cpu", "--small", "--out", str(tmp_path)]).what == speed.cases.TOPICS


def test_picture(speed: Any, root: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from _speed.picture import plot

    def row(workload: str, direction: str, name: str, ratio: float | None, dtype: str = "fp32", peer: bool = False) -> dict[str, Any]:
        return {"workload": workload, "direction": direction, "operation": name, "floor_ratio": ratio, "dtype": dtype, "peer": peer}

    rows = [row("a", "forward", "dualbin.torch.lookup", 1.2), row("a", "forward", "F.embedding", 3.4, peer=True)]
    rows += [row("a", "forward", "gone", None), row("a", "grouping", "x", 2.0), row("a", "forward", "dualbin.torch.lookup", 1.2, "bf16")]
    rows += [row("b", "forward", "dualbin.torch.lookup", 2.0), row("b", "forward + backward + update", "dualbin.torch", 9.0)]
    source, target = tmp_path / "speed.json", tmp_path / "made" / "speed.png"
    source.write_text(json.dumps({"device": "d", "rows": rows}))
    assert plot(source, target) == 4
    assert target.read_bytes().startswith(b"\x89PNG")
    source.write_text(json.dumps({"device": "d", "rows": rows[2:5]}))
    with pytest.raises(ValueError, match="no measurement in fp32 with a floor"):
        plot(source, target)
