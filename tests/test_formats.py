"""Files of every format version ever written load for ever, with the contents that were written.

`formats/v<N>` holds what the code of that version wrote, and `contents.json` the digests of its arrays: of a counter those of its levels,
which do not depend on the order of planes.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dualbin import io, reference
from dualbin.rules import Bop, Counter, Sign, to_plain

FOLDER = Path(__file__).parent / "formats"
CONTENTS = {folder.name: json.loads((folder / "contents.json").read_text()) for folder in sorted(FOLDER.iterdir())}
TABLES = [(version, name) for version, files in CONTENTS.items() for name in files if name.endswith(".safetensors")]


def digest(array):
    array = np.asarray(array)
    return hashlib.sha256(str(array.dtype).encode() + str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def levels(counter, dim):
    """Of planes as they are loaded, most significant first."""
    planes = counter.reshape(len(counter), -1, (dim + 7) // 8)[:, ::-1]
    return sum(np.unpackbits(planes[:, p], axis=1, count=dim, bitorder="little").astype(np.int64) << p for p in range(planes.shape[1]))


def contents(table, state):
    entries = {"counter": levels(state["counter"], table.dim)} if "counter" in state else {}
    found = {name: value if isinstance(value, int) else digest(value) for name, value in (state | entries).items()}
    planes = {} if table.planes == 1 else {"planes": table.planes}
    rule = {} if getattr(state, "rule", None) is None else {"rule": to_plain(state.rule)}
    return {"dim": table.dim, **planes, "bits": digest(table.bits), "scale": digest(table.scale), "state": found, **rule}


def test_versions_are_kept():
    assert io.FORMAT_VERSION in {version.removeprefix("v") for version in CONTENTS}


@pytest.mark.parametrize(("version", "name"), TABLES)
def test_tables_and_states_load(version, name):
    tables, states = io.load(FOLDER / version / name)
    assert {key: contents(table, states.get(key, {})) for key, table in tables.items()} == CONTENTS[version][name]


MODULES = [(version, name) for version, files in CONTENTS.items() for name in files if name.endswith(".pt")]


@pytest.mark.parametrize(("version", "name"), MODULES)
def test_module_state_loads(version, name):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    saved, written = torch.load(FOLDER / version / name, weights_only=True), CONTENTS[version][name]
    assert {key: digest(value.numpy()) for key, value in saved.items()} == written
    embedding = dbt.BinaryEmbedding(7, 13, padding_idx=2, planes=2 if "planes" in name else 1)
    embedding.load_state_dict(saved)
    assert digest(embedding.weight.bits.numpy()) == written["weight.bits"]
    assert digest(embedding.weight.scale.numpy()) == written["weight.scale"]


def rule_of(version, file, name):
    """The rule whose state it is. Version 1 knew one norm."""
    norm = "rms" if version == "v1" or "rms" in file + name else None
    window = {"counter2": Counter(2, every=3), "bop": Bop(every=2), "closed": Counter(8, every=2, norm=norm), "window": Counter(2, every=3)}
    window["counter8_planes2"] = Counter(8, every=3)
    if file.startswith("window") or name == "window":
        return window[name]
    if name in ("bop", "sign"):
        return {"bop": Bop(), "sign": Sign()}[name]
    return Counter(int(re.search(r"\d", name)[0]), norm=norm)


STATES = [(version, file, name) for version, file in TABLES for name, entry in CONTENTS[version][file].items() if entry["state"]]


def loaded(version, file, name):
    """Table, state and rule, the state as it is written today: of a trained scale with sums of squares."""
    tables, states = io.load(FOLDER / version / file)
    state = states[name] | (
        {"squares": np.zeros(len(tables[name].bits), np.float32)} if version == "v1" and "scale_m" in states[name] else {}
    )
    return tables[name], states[name], state, states[name].rule or rule_of(version, file, name)


@pytest.mark.parametrize(("version", "file", "name"), STATES)
def test_states_continue_in_torch(version, file, name):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    table, saved, state, rule = loaded(version, file, name)
    scale_lr = 3e-3 if "scale_m" in saved else 0.0
    bits, scale = (torch.from_numpy(array.copy()) for array in (table.bits, table.scale))
    parameter = torch.nn.Parameter(dbt.BinaryTable(bits, scale, 13, planes=table.planes))
    optimizer = dbt.XOR([parameter], rule=rule, scale_lr=scale_lr)
    optimizer.import_state({name: saved}, {name: parameter})
    assert_same(optimizer.export_state({name: parameter})[name], state)
    ids, dy = np.array([1, 5, 1, 2]), np.random.default_rng(0).normal(size=(4, 13)).astype(np.float32)
    parameter.grad = dbt.RowGrad(torch.from_numpy(ids), torch.from_numpy(dy), (7, 13))
    optimizer.step()
    options = {"planes": table.planes, "scale_lr": scale_lr, "rule": rule, "dim": 13}
    reference.update(table.bits, table.scale, state, ids, dy, **options)
    np.testing.assert_array_equal(parameter.bits.numpy(), table.bits)
    np.testing.assert_array_equal(parameter.scale.numpy(), table.scale)
    assert_same(optimizer.export_state({name: parameter})[name], state)


@pytest.mark.parametrize("file", ["counter.safetensors", "counter_frozen_scale.safetensors"])
def test_states_of_version_1_have_no_squares(file):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    tables, states = io.load(FOLDER / "v1" / file)
    parameter = torch.nn.Parameter(dbt.BinaryTable(torch.from_numpy(tables["bits8"].bits), torch.from_numpy(tables["bits8"].scale), 13))
    optimizer = dbt.XOR([parameter], rule=Counter(8), scale_lr=0.0 if "frozen" in file else 3e-3)
    with pytest.raises(ValueError, match=r'norm="adagrad" divides by: use Counter\(norm="rms"\)'):
        optimizer.import_state({"0": states["bits8"]}, {"0": parameter})
    assert not optimizer.state


@pytest.mark.parametrize(("version", "file", "name"), STATES)
def test_states_continue_in_jax(version, file, name):
    jax, dbj = pytest.importorskip("jax"), pytest.importorskip("dualbin.jax")
    table, saved, state, rule = loaded(version, file, name)
    packed = dbj.BinaryTable(jax.numpy.array(table.bits), jax.numpy.array(table.scale), 13, planes=table.planes)
    optimizer = dbj.xor(1.0, rule=rule, scale_lr=3e-3 if "scale_m" in saved else 0.0)
    continued = dbj.import_state(optimizer.init({name: packed}), {name: saved})
    assert_same(dbj.export_state(continued)[name], state)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value, err_msg=key)
