"""The speed benchmark from end to end, with tiny tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TORCH = [
    ("forward", "dualbin.torch.lookup"),
    ("forward", "dualbin.torch.lookup, 2 planes"),
    ("forward", "dualbin.torch.lookup, 4 planes"),
    ("forward", "dualbin.torch.lookup, 8 planes"),
    ("forward", "F.embedding"),
    ("forward", "packed gather + unpack, torch.compile"),
    ("forward, out=", "dualbin.torch.lookup(out=)"),
    ("forward, out=", "torch.index_select(out=)"),
    ("backward + update", "dualbin.torch.XOR.step, Counter(8)"),
    ("backward + update", "dualbin.torch.XOR.step, Counter(1)"),
    ("backward + update", "dualbin.torch.XOR.step, Counter(8), 4 planes"),
    ("backward + update", 'dualbin.torch.XOR.step, Counter(8, norm="rms")'),
    ("backward + update", "dualbin.torch.XOR.step, Counter(4), 4 planes"),
    ("backward + update", "dualbin.torch.XOR.step, Bop()"),
    ("backward + update", "embedding_dense_backward (no update)"),
    ("backward + update", "sparse gradient, coalesce, SGD step"),
    ("backward + update", "sparse gradient, SparseAdam"),
    ("backward + update", "sparse gradient, coalesce, row-wise Adagrad"),
]
JAX = [
    ("forward", "dualbin.jax.lookup"),
    ("forward", "jnp.take"),
    ("backward + update", "dualbin.jax.xor_update, Counter(8)"),
    ("backward + update", "dualbin.jax.xor_update, Counter(1)"),
    ("backward + update", "dualbin.jax.grad, xor, optax.apply_updates, Counter(8)"),
    ("backward + update", "SGD by scatter-add into the table, donated"),
]
COMPILED = "packed gather + unpack, torch.compile"
FBGEMM = "FBGEMM's TBE"  # where it is installed

BOTH = ("fp32", "bf16")
GRAPH = ("forward + backward + update, replayed CUDA graph", "dualbin.torch, Counter(8)")
GROUPING = ("grouping", "grouping of XOR.step, its kernels alone")
SPARSE = ("forward + backward, time of the host", "nn.Embedding(sparse=True)")  # CPUs alone
CALLS = [
    ("update, time of the host", "dualbin.torch.XOR.step, Counter(8)"),
    ("update, time of the host", "sparse gradient, coalesce, SGD step"),
    ("forward, time of the host", "dualbin.torch.lookup, no_grad"),
    ("forward, time of the host", "dualbin.torch.BinaryEmbedding, no_grad"),
    ("forward, time of the host", "F.embedding, no_grad"),
    ("forward + backward, time of the host", "dualbin.torch.BinaryEmbedding"),
    ("forward + backward, time of the host", "nn.Embedding"),
    SPARSE,
    GRAPH,
]
BAGS = [
    ("bags, forward", "dualbin.torch.BinaryEmbeddingBag"),
    ("bags, forward", "dualbin.torch.BinaryEmbeddingBag, 2 planes"),
    ("bags, forward", "F.embedding_bag"),
]
STEPS = [
    ("forward + backward + update", "dualbin.torch, Counter(8)"),
    ("forward + backward + update", "nn.Embedding, AdamW"),
    ("forward + backward + update", "nn.Embedding(sparse=True), SparseAdam"),
]
LOW_BIT_BAGS = [("bags, forward", f"quantized embedding_bag, {bits} bits") for bits in (8, 4, 2)]  # fp32 alone


def huge_cases(bits: int) -> list[tuple[str, str]]:
    return [
        ("forward + backward + update", f"dualbin.torch, Counter({bits})"),
        ("forward + backward + update", f"dualbin.torch, Counter({bits}), a gradient that the caller holds"),
        ("backward + update", f"dualbin.torch.XOR.step, Counter({bits})"),
        ("forward", "dualbin.torch.lookup"),
    ]


def expected(speed: Any, *, cuda: bool) -> set[tuple[str, ...]]:
    """Workload, direction, operation and dtype of every row of a small run."""
    sizes = speed.workloads
    tables = {(str(size), *case, dtype) for size in sizes.workloads("cpu", small=True) for case in TORCH + JAX for dtype in BOTH}
    bags = {(str(size), *case, dtype) for size in sizes.bags("cpu", small=True) for case in BAGS for dtype in BOTH}
    huge = {(str(size), *case, dtype) for size, bits in sizes.huge(small=True) for case in huge_cases(bits) for dtype in BOTH}
    calls = {(str(size), *case, "fp32") for size in sizes.small_calls(small=True) for case in CALLS if not (cuda and case == SPARSE)}
    steps = {(str(size), *case, "fp32") for size in sizes.workloads("cpu", small=True) for case in STEPS}
    return tables | bags | huge | calls | steps | {(str(size), *GROUPING, "fp32") for size in sizes.groupings(small=True)}


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
    cuda = summary["driver"] is not None
    rows = {(row["workload"], row["direction"], row["operation"], row["dtype"]): row for row in summary["rows"]}
    low = set() if cuda else {(str(size), *case, "fp32") for size in speed.workloads.bags("cpu", small=True) for case in LOW_BIT_BAGS}
    assert {key for key in rows if not key[2].startswith(FBGEMM)} == expected(speed, cuda=cuda) | low
    copied = summary["copy"]["gb_s"] * 1e3  # bytes a microsecond
    for (_, direction, operation, dtype), row in rows.items():
        assert f"| {row['workload']} | {row['frontend']} | {operation} |" in text
        if operation == COMPILED and row["error"]:  # there may be no compiler
            assert f"- {row['workload']}, torch, forward, {dtype}: {operation}: FAILED: " in text
            continue
        if (direction, operation) in (GRAPH, GROUPING) and not cuda:
            assert row["skipped"]
            continue
        assert row["error"] is None, row
        assert row["median_us"] > 0
        assert row["floor_us"] == pytest.approx(row["bytes"] / copied)
        if row["bytes"]:
            assert row["floor_ratio"] == pytest.approx(row["median_us"] / row["floor_us"])
        peers = [other for other in rows.values() if other["peer"] and other["median_us"] and same_job(row, other)]
        assert not peers or row["peer_ratio"] == pytest.approx(row["median_us"] / min(peer["median_us"] for peer in peers))
    for size in speed.workloads.workloads("cpu", small=True):
        sizes = {key[1:]: row["bytes"] for key, row in rows.items() if key[0] == str(size)}
        check_bytes(size, sizes)
    assert "### JAX beside PyTorch, optax beside the fused update" in text
    assert ("### Launches of XOR.step" in text) is cuda


def same_job(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("workload", "frontend", "direction", "dtype"))


def check_bytes(size: Any, sizes: dict[tuple[str, str, str], float]) -> None:
    packed = 5
    assert size.dim == 40
    unique = sum(len(set(ids.tolist())) for ids in size.draw()) / 8
    for dtype, value in (("fp32", 4), ("bf16", 2)):
        rows = size.count * size.dim * value
        assert sizes[*TORCH[0], dtype] == rows + size.count * (packed + 4 + 8)
        assert sizes[*TORCH[2], dtype] == rows + size.count * (4 * packed + 4 + 8)
        assert sizes[*JAX[0], dtype] == rows + size.count * (packed + 4 + 4)
        for name, id_bytes in ((TORCH, 8), (JAX, 4)):
            eight, one = (next(case for case in name if f"Counter({bits})" in case[1]) for bits in (8, 1))
            read = rows + size.count * id_bytes
            assert sizes[*eight, dtype] == read + 2 * 8 * packed * unique
            assert sizes[*one, dtype] == read + 2 * packed * unique
        bop = next(case for case in TORCH if "Bop" in case[1])
        assert sizes[*bop, dtype] == rows + size.count * 8 + 2 * unique * (packed + 4 * size.dim)


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
