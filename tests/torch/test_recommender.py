"""The example of a recommender, small: on made flights, and on a made log of Criteo's form."""

import numpy as np
import pytest

import _flights
from click_logs import made_line, made_table, write

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def recommender(root):
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "examples" / "torch"))
        import recommender

        yield recommender


def check(found, rows, widths, packed):
    """Names, bytes, and that a model has learned what there is, rounded to 8 bits too."""
    names = [each.name for each in found]
    assert names[0].startswith("fp32, ")
    assert names[1:4] == [f"the same as int{bits} after training" for bits in (8, 4, 2)]
    assert names[4].startswith("fp32, ")
    assert names[5:] == list(packed)
    best = {each.name.split(",")[1].strip(): each for each in (found[0], found[4])}
    floats = sum(4 * count * width for count, width in zip(rows, widths, strict=True))
    assert best["Adagrad"][3:] == (2 * floats, floats)
    assert best["row-wise Adagrad"][3:] == (floats + 4 * sum(rows), floats)
    sizes = {bits: sum(count * (width * bits // 8 + 4) for count, width in zip(rows, widths, strict=True)) for bits in (8, 4, 2)}
    assert [each.served_bytes for each in found[1:4]] == list(sizes.values())
    assert all(each.training_bytes == found[0].training_bytes for each in found[1:4])
    for each, (bits, planes) in zip(found[5:], packed.values(), strict=True):
        assert each[3:] == (sizes[bits] + 16 * sum(rows), sizes[planes])
    assert found[0].chosen_on >= found[4].chosen_on
    assert found[1].auc == pytest.approx(found[0].auc, abs=0.01)


@pytest.mark.slow
def test_flights(recommender, tmp_path, capsys, monkeypatch):
    flights = _flights.prepare(made_table(4000))
    _flights.save(tmp_path / "flights.npz", flights)
    monkeypatch.setitem(recommender.FP32, "Adagrad", (torch.optim.Adagrad, (1e-4, 0.2)))
    monkeypatch.setitem(recommender.FP32, "row-wise Adagrad", (recommender.RowAdagrad, (0.2,)))
    monkeypatch.setattr(recommender, "PACKED", {"Counter(8), 4 planes": (8, 4)})
    found = recommender.main(["--data", str(tmp_path / "flights.npz"), "--batch", "64", "--seeds", "2"])
    rows = _flights.FlightLog(flights, 64).rows
    check(found, rows, [recommender.width(count) for count in rows], recommender.PACKED)
    assert {each.name for each in found} > {"fp32, Adagrad, rate 0.2"}, "a rate at which nothing is learned is not chosen"
    assert all(0.7 < each.auc < 0.9 for each in found), "what can be learned, with two labels of ten being wrong"
    printed = capsys.readouterr().out
    assert all(f"| {each.name} | {each.auc:.4f} | {each.training_bytes / 1e6:.2f} |" in printed for each in found)


@pytest.mark.slow
def test_criteo(recommender, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    path = write(tmp_path / "train.gz", [made_line(generator) for _ in range(1000)])
    monkeypatch.setattr(recommender, "FP32", {name: (kind, (0.2,)) for name, (kind, _) in recommender.FP32.items()})
    found = recommender.main(["--criteo", str(path), "--rows", "500", "--batch", "20"])
    check(found, [248, 128, *[500] * 24, 832], [16, 8, *[16] * 25], recommender.PACKED)
    assert all(each.auc > 0.85 for each in found), "the second category says the label where it is not missing"


def test_a_bag_is_of_the_hours_around(recommender):
    january = [(22, 31, 0, "EWR"), (23, 31, 40, "EWR"), (0, 1, 0, "EWR"), (22, 31, 0, "JFK"), (5, 1, 0, "JFK")]  # the first hours: February
    line = "2013,{},{},,0,{},UA,1,N1,{},BOS,{}".format
    lines = [line(1 if day == 31 else 2, day, delay, airport, hour) for hour, day, delay, airport in january]
    lines.append(line(12, 31, 0, "EWR", 23))
    names = "year,month,day,dep_time,sched_dep_time,arr_delay,carrier,flight,tailnum,origin,dest,hour"
    found = _flights.prepare("\n".join([names, *lines]))
    order = np.random.default_rng(0).permutation(6)
    busy = list(_flights.FIELDS).index(_flights.BUSY)
    row = dict(zip(order.tolist(), found.ids[:, busy].tolist(), strict=True))
    around = {int(place): found.around[at].tolist() for at, place in enumerate(order)}
    assert around == {
        0: [-1, -1, row[1], row[2]],
        1: [-1, row[0], row[2], -1],
        2: [row[0], row[1], -1, -1],
        3: [-1] * 4,
        4: [-1] * 4,
        5: [-1] * 4,
    }
    (batch,) = _flights.FlightLog(found, 4).batches("train")
    first = found.ids[:, busy].min()
    wanted = [[value - first for value in found.around[at] if value >= 0] for at in range(4)]
    assert [batch.bag[start:stop].tolist() for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)] == wanted
    assert (batch.ids.min(0) >= 0).all()


def test_the_example_is_short(root):
    assert len((root / "examples/torch/recommender.py").read_text().splitlines()) < 200


def test_bad_arguments(recommender, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recommender.main(["--data", str(tmp_path), "--seeds", "0"])
    assert "--batch and --seeds must be at least 1, got 2048 and 0" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no\.npz"):
        recommender.main(["--data", str(tmp_path / "no.npz")])
