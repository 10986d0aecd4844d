"""The reader of Criteo's logs, on files made in their form."""

import itertools
import math

import numpy as np
import pytest

from _clicks import PARTS
from _criteo import LEVELS, CriteoLog
from click_logs import made_line, write


@pytest.fixture(scope="module")
def lines():
    generator = np.random.default_rng(0)
    return [made_line(generator) for _ in range(205)]


def level(value):
    return 0 if value < 0 else min(LEVELS - 1, 1 + math.floor(2 * math.log2(1 + value)))


def read(log):
    """[(label, ids of the fields, bag)] of every example, by part."""
    return {
        part: [
            (bool(positive), ids.tolist(), batch.bag[start:stop].tolist())
            for batch in log.batches(part)
            for positive, ids, start, stop in zip(batch.positive, batch.ids, batch.offsets[:-1], batch.offsets[1:], strict=True)
        ]
        for part in PARTS
    }


@pytest.mark.parametrize(("name", "end"), [("train.txt", "\n"), ("day_0.gz", "\n"), ("train.tsv", "\r\n")])
def test_every_field_becomes_its_row(tmp_path, lines, name, end):
    log = CriteoLog([write(tmp_path / name, lines, end)], batch=10, most_rows=1000)
    found = read(log)
    assert [len(found[part]) for part in PARTS] == [160, 20, 21], "160 of 164 fill batches to train on"
    assert (log.lines, log.steps, len(log.rows)) == (205, 16, 27)
    assert log.rows[:3] == [248, 128, 1000], "8 rows for each of 30 values and the missing one; the least; the most"
    kept = lines[:160] + lines[164:]
    for (positive, ids, bag), line in zip(itertools.chain(*found.values()), kept, strict=True):
        assert positive == (line[0] == "1")
        assert ids == [1 + int(value, 16) % (rows - 1) if value else 0 for value, rows in zip(line[14:], log.rows[:-1], strict=True)]
        assert bag == [LEVELS * place + level(int(value)) for place, value in enumerate(line[1:14]) if value]
        assert all(0 <= row < rows for row, rows in zip(ids, log.rows, strict=False))
        assert all(0 <= row < log.rows[-1] for row in bag)


def test_every_pass_reads_the_files_anew_and_in_their_order(tmp_path, lines):
    whole = CriteoLog([write(tmp_path / "whole.txt", lines)], batch=10)
    parts = CriteoLog([write(tmp_path / "1.txt", lines[:77]), write(tmp_path / "2.gz", lines[77:])], batch=10)
    first = read(whole)
    assert read(whole) == first
    assert read(parts) == first


@pytest.mark.parametrize("value", [-3, 0, 1, 2, 3, 7, 8, 2**31, 10**17])
def test_levels_of_integers(tmp_path, lines, value):
    line = ["1", *[""] * 12, str(value), *[""] * 26]
    (batch, *_) = CriteoLog([write(tmp_path / "a.txt", [line, line])], batch=1).batches("train")
    assert batch.bag.tolist() == [12 * LEVELS + level(value)]
    assert not batch.ids.any(), "row 0 is the missing value"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda line: line[:-1],
            r"label, 13 integers and 26 categories between tabs, got 39 fields \(the challenge's test set has no labels",
        ),
        (lambda line: [*line, ""], "got 41 fields$"),
        (lambda _: [""], "got 1 fields$"),
        (lambda line: ["2", *line[1:]], "field 1 must be 0 or 1, got '2'"),
        (lambda line: ["", *line[1:]], "field 1 must be 0 or 1, got ''"),
        (lambda line: [*line[:5], "1.5", *line[6:]], "field 6 must be an integer or empty, got '1.5'"),
        (lambda line: [*line[:5], "1_0", *line[6:]], "field 6 must be an integer or empty, got '1_0'"),
        (lambda line: [*line[:39], "68fd1e6"], "field 40 must be 8 hexadecimal digits or empty, got '68fd1e6'"),
        (lambda line: [*line[:14], "é8fd1e64", *line[15:]], "field 15 must be 8 hexadecimal digits or empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, change, message):
    good, bad = write(tmp_path / "good.txt", lines[:50]), write(tmp_path / "bad.txt", [*lines[:3], change(lines[3]), *lines[4:]])
    with pytest.raises(ValueError, match=rf"bad\.txt, line 4: .*{message}"):
        CriteoLog([good, bad], batch=10)


def test_a_bad_line_beyond_the_sample_is_named_when_it_is_reached(tmp_path, lines, monkeypatch):
    monkeypatch.setattr("_criteo.SAMPLE", 100)
    log = CriteoLog([write(tmp_path / "a.txt", [*lines[:150], ["1"], *lines[151:]])], batch=10)
    batches = log.batches("train")
    assert len([next(batches) for _ in range(15)]) == 15
    with pytest.raises(ValueError, match=r"a\.txt, line 151: .* got 1 fields"):
        next(batches)


def test_bad_files(tmp_path, lines):
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        CriteoLog([tmp_path / "no.txt"], batch=10)
    with pytest.raises(ValueError, match="at least 10 lines to train on, got 8 of 11"):
        CriteoLog([write(tmp_path / "short.txt", lines[:11])], batch=10)
    with pytest.raises(ValueError, match="most_rows must be at least 2, got 1"):
        CriteoLog([write(tmp_path / "a.txt", lines)], batch=10, most_rows=1)
    whole = write(tmp_path / "day.gz", lines).read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"cut\.gz: the compressed file is damaged after line \d+"):
        CriteoLog([tmp_path / "cut.gz"], batch=10)
    (tmp_path / "text.gz").write_bytes(b"1\t2\n")
    with pytest.raises(OSError, match=r"[Nn]ot a gzipped file"):
        CriteoLog([tmp_path / "text.gz"], batch=10)
