"""The speed benchmark from end to end, with tiny tables, and the bytes it reckons with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TORCH = [
    ("forward", "dualbin.torch.lookup"),
    ("forward", "dualbin.torch.lookup, 4 planes"),
    ("forward", "F.embedding"),
    ("forward", "packed gather + unpack, torch.compile"),
    ("forward, out=", "dualbin.torch.lookup(out=)"),
    ("forward, out=", "torch.index_select(out=)"),
    ("backward + update", "dualbin.torch.XOR.step, Counter(8)"),
    ("backward + update", "dualbin.torch.XOR.step, Counter(1)"),
    ("backward + update", "dualbin.torch.XOR.step, Counter(8), 4 planes"),
    ("backward + update", "embedding_dense_backward (no update)"),
    ("backward + update", "sparse gradient, coalesce, SGD step"),
]
JAX = [
    ("forward", "dualbin.jax.lookup"),
    ("forward", "jnp.take"),
    ("backward + update", "dualbin.jax.xor_update, Counter(8)"),
    ("backward + update", "dualbin.jax.xor_update, Counter(1)"),
    ("backward + update", "SGD by scatter-add into the table, donated"),
]
COMPILED = TORCH[3][1]


@pytest.fixture
def speed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import speed
    from _speed import report, timing, workloads

    return type("Speed", (), {"main": speed, "report": report, "timing": timing, "workloads": workloads})


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Run the command; returns speed.md and speed.json."""

    def call(*arguments: str) -> tuple[str, dict[str, Any]]:
        command = [sys.executable, root / "benchmarks" / "speed.py", "--small", "--out", tmp_path, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return (tmp_path / "speed.md").read_text(), json.loads((tmp_path / "speed.json").read_text())

    return call


def check(speed: Any, text: str, summary: dict[str, Any]) -> None:
    """Every row is there, with positive times, its ratios, and the bytes that have to move."""
    rows = {(row["workload"], row["direction"], row["operation"], row["dtype"]): row for row in summary["rows"]}
    small = speed.workloads.workloads(summary["command"].split("--device ")[1].split()[0], small=True)
    assert set(rows) == {(str(size), *case, dtype) for size in small for case in TORCH + JAX for dtype in ("fp32", "bf16")}
    copied = summary["copy"]["gb_s"] * 1e3  # bytes a microsecond
    for (_, direction, operation, dtype), row in rows.items():
        assert f"| {row['frontend']} | {direction} | {operation} |" in text
        if operation == COMPILED and row["error"]:  # there may be no compiler
            assert f"- {row['workload']}, torch, forward, {dtype}: {operation}: FAILED: " in text
            continue
        assert row["error"] is None, row
        assert row["median_us"] > 0
        assert row["floor_us"] == pytest.approx(row["bytes"] / copied)
        assert row["floor_ratio"] == pytest.approx(row["median_us"] / row["floor_us"])
        peers = [other for other in rows.values() if other["peer"] and other["median_us"] and same_job(row, other)]
        assert row["peer_ratio"] == pytest.approx(row["median_us"] / min(peer["median_us"] for peer in peers))
    for size in small:
        sizes = {key[1:]: row["bytes"] for key, row in rows.items() if key[0] == str(size)}
        check_bytes(size, sizes)


def same_job(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("workload", "frontend", "direction", "dtype"))


def check_bytes(size: Any, sizes: dict[tuple[str, str, str], float]) -> None:
    packed = {64: 8, 40: 5}[size.dim]
    unique = sum(len(set(ids.tolist())) for ids in size.draw()) / 8
    for dtype, value in (("fp32", 4), ("bf16", 2)):
        rows = size.count * size.dim * value
        assert sizes[*TORCH[0], dtype] == rows + size.count * (packed + 4 + 8)
        assert sizes[*TORCH[1], dtype] == rows + size.count * (4 * packed + 4 + 8)
        assert sizes[*JAX[0], dtype] == rows + size.count * (packed + 4 + 4)
        for name, id_bytes in ((TORCH, 8), (JAX, 4)):
            eight, one = (next(case for case in name if f"Counter({bits})" in case[1]) for bits in (8, 1))
            read = rows + size.count * id_bytes
            assert sizes[*eight, dtype] == read + 2 * 8 * packed * unique
            assert sizes[*one, dtype] == read + 2 * packed * unique


@pytest.mark.slow
def test_cpu(speed: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch", "jax"):
        pytest.importorskip(module)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text, summary = run("--device", "cpu")
    check(speed, text, summary)
    assert summary["driver"] is None
    assert {"dualbin", "torch", "jax", "numpy"} <= set(summary["versions"])


@pytest.mark.cuda
@pytest.mark.slow
def test_cuda(speed: Any, run: Callable[..., Any]) -> None:
    for module in ("torch", "jax"):
        pytest.importorskip(module)
    text, summary = run("--device", "cuda")
    check(speed, text, summary)
    assert summary["driver"]
    assert summary["device"] in text


def test_bytes_of_the_full_workloads(speed: Any) -> None:
    wide, zipf, tall = speed.workloads.workloads("cuda", small=False)[:3]
    assert wide.forward_bytes(4, 8) == 268_435_456 + 8_388_608 + 65_536 + 131_072
    assert zipf.forward_bytes(2, 4, 4) == 100_663_296 + 4 * 6_291_456 + 262_144 + 262_144
    assert wide.update_bytes(4, 8, 1, 15_000) == 268_435_456 + 131_072 + 15_360_000
    assert tall.update_bytes(2, 4, 8, 250_000) == 67_108_864 + 1_048_576 + 64_000_000
    assert speed.workloads.Workload(10, 9, 3).forward_bytes(2, 4) == 3 * (18 + 2 + 4 + 4)  # 9 bits take 2 bytes


def test_ids(speed: Any) -> None:
    uniform, zipf = speed.workloads.workloads("cpu", small=True)
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
    assert "| torch | forward | ours | 5.0 | 2.50 | 0.50 |" in text
    assert "| torch | forward | gone | failed |" in text
    assert "- jax: broken\n- w, torch, forward, fp32: gone: FAILED: why not\n" in text


def test_a_failed_measurement_becomes_a_line(speed: Any) -> None:
    def prepare() -> Any:
        msg = "no memory\nand more"
        raise ValueError(msg)

    run = speed.main.Run("cpu", small=True)
    run.facts["copy"] = {"gb_s": 10.0}
    case = speed.workloads.Case("forward", "broken", 1e4, prepare)
    row = run._row(case, speed.timing.Clock(), speed.workloads.Workload(1, 8, 1), "torch", "fp32")
    assert (row.error, row.median_us, row.floor_us) == ("ValueError: no memory", None, 1.0)


def test_a_plug_outlasts_the_launches(speed: Any) -> None:
    assert speed.timing._plug_length(3e-3, 1e-3) == 6
    assert speed.timing._plug_length(1.0, 1e-3) == speed.timing._MAX_PLUG
    assert speed.timing._plug_length(1.0, 0.0) == 0
    assert speed.timing._MAX_PLUG + speed.timing._CALLS < 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        ([], "required: --device"),
        (["--device", "cpu", "--frontend", "numpy"], "--frontend: invalid choice: 'numpy'"),
        (["--device", "cuda"], "--device cuda: dualbin is built without CUDA"),
        (["--device", "cpu", "--out", __file__], "--out: "),
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
