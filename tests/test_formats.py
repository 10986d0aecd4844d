"""Files of every format version ever written load for ever, with the contents that were written.

`formats/v<N>` holds what the code of that version wrote, and `contents.json` the digests of its arrays: of a counter those of its levels,
which do not depend on the order of planes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dualbin import io

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
    return {"dim": table.dim, "bits": digest(table.bits), "scale": digest(table.scale), "state": found}


def test_versions_are_kept():
    assert io.FORMAT_VERSION in {version.removeprefix("v") for version in CONTENTS}


@pytest.mark.parametrize(("version", "name"), TABLES)
def test_tables_and_states_load(version, name):
    tables, states = io.load(FOLDER / version / name)
    assert {key: contents(table, states.get(key, {})) for key, table in tables.items()} == CONTENTS[version][name]


@pytest.mark.parametrize("version", CONTENTS)
def test_module_state_loads(version):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    saved = torch.load(FOLDER / version / "module.pt", weights_only=True)
    assert {name: digest(value.numpy()) for name, value in saved.items()} == CONTENTS[version]["module.pt"]
    embedding = dbt.BinaryEmbedding(7, 13, padding_idx=2)
    embedding.load_state_dict(saved)
    assert digest(embedding.weight.bits.numpy()) == CONTENTS[version]["module.pt"]["weight.bits"]
    assert digest(embedding.weight.scale.numpy()) == CONTENTS[version]["module.pt"]["weight.scale"]


@pytest.mark.parametrize("version", CONTENTS)
def test_states_continue_in_both_frontends(version):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    jax, dbj = pytest.importorskip("jax"), pytest.importorskip("dualbin.jax")
    from dualbin.rules import Counter

    tables, states = io.load(FOLDER / version / "counter.safetensors")
    for bits in range(1, 9):
        name, rule = f"bits{bits}", Counter(bits)
        parameter = torch.nn.Parameter(dbt.BinaryTable(torch.from_numpy(tables[name].bits), torch.from_numpy(tables[name].scale), 13))
        optimizer = dbt.XOR([parameter], rule=rule)
        optimizer.import_state({name: states[name]}, {name: parameter})
        again = optimizer.export_state({name: parameter})[name]
        table = dbj.BinaryTable(jax.numpy.array(tables[name].bits), jax.numpy.array(tables[name].scale), 13)
        fresh = dbj.xor(1.0, rule=rule).init({name: table})
        other = dbj.export_state(dbj.import_state(fresh, {name: states[name]}))[name]
        assert again.keys() == other.keys() == states[name].keys()
        for key, value in states[name].items():
            np.testing.assert_array_equal(again[key], value)
            np.testing.assert_array_equal(other[key], value)
