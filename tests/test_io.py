"""dualbin.io: what is written comes back, and damaged files are refused with the file's and the key's name."""

import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dualbin import io
from dualbin._schema import packed_width
from dualbin.rules import Bop, Counter, Sign, state_spec


def make_table(rows=5, dim=9, seed=0, planes=1):
    rng = np.random.default_rng(seed)
    bits = [np.packbits(rng.integers(0, 2, (rows, dim), np.uint8), axis=1, bitorder="little") for _ in range(planes)]
    return io.Table(np.concatenate(bits, axis=1), rng.uniform(0.1, 2.0, (rows, 1)).astype(np.float32), dim, planes)


def make_state(rows, dim, rule, *, train_scale=True, seed=0, planes=1):
    rng = np.random.default_rng(seed)
    spec = state_spec(rule, rows, dim, train_scale=train_scale, planes=planes)
    state = {name: rng.integers(0, 100, shape).astype(dtype) for name, (shape, dtype) in spec.items()}
    if "counter" in state and dim % 8:
        state["counter"][:, packed_width(dim) - 1 :: packed_width(dim)] &= (1 << dim % 8) - 1
    state["step"] = 2**40 + 3
    if rule.every > 1:
        ids = np.sort(rng.choice(rows, rng.integers(0, rows + 1), replace=False)).astype(np.int64)
        state |= {"pending_ids": ids, "pending_rows": rng.normal(size=(ids.size, dim)).astype(np.float32), "pending_steps": 1}
    return state


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, int):
            assert type(b[name]) is int
            assert b[name] == value
        else:
            assert b[name].dtype == value.dtype
            np.testing.assert_array_equal(b[name], value)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__")


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.dictionaries(names, st.tuples(st.integers(1, 40), st.integers(1, 70)), max_size=4),
    rule=st.sampled_from([Counter(8), Counter(1), Counter(3, every=4), Bop(), Bop(every=2), Sign()]),
    train_scale=st.booleans(),
    with_state=st.booleans(),
    planes=st.integers(1, 8),
)
def test_round_trip(tmp_path_factory, sizes, rule, train_scale, with_state, planes):
    path = tmp_path_factory.mktemp("io") / "tables.safetensors"
    planes = min(planes, rule.bits) if isinstance(rule, Counter) else 1
    tables = {name: make_table(*size, seed=n, planes=planes) for n, (name, size) in enumerate(sizes.items())}
    state = {name: make_state(*size, rule, train_scale=train_scale, planes=planes) for name, size in sizes.items()} if with_state else {}
    io.save(path, tables, state)
    loaded, loaded_state = io.load(path)
    assert loaded.keys() == tables.keys()
    for name, table in tables.items():
        assert_same(table._asdict(), loaded[name]._asdict())
    assert loaded_state.keys() == state.keys()
    for name, entries in state.items():
        assert_same(entries, loaded_state[name])


def test_keys_and_metadata(tmp_path):
    path = tmp_path / "t.safetensors"
    io.save(path, {"model.emb.weight": make_table()}, {"model.emb.weight": {"step": 3}})
    assert set(load_file(path)) == {"model.emb.weight.bits", "model.emb.weight.scale", "model.emb.weight.step"}
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"] == {
        "format": "dualbin",
        "format_version": "2",
        "model.emb.weight.dim": "9",
        "model.emb.weight.planes": "1",
    }


def test_loaded_arrays_can_be_written_to(tmp_path):
    io.save(tmp_path / "t", {"emb": make_table()})
    (table,) = io.load(tmp_path / "t")[0].values()
    table.bits[0, 0] ^= 1
    table.scale[0] = 2.0


def test_torch_table(tmp_path):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    embedding = dbt.BinaryEmbedding(7, 13, padding_idx=2)
    io.save(tmp_path / "t", {"emb": embedding.weight}, {"emb": {"scale_m": torch.ones(7)}})
    tables, state = io.load(tmp_path / "t")
    np.testing.assert_array_equal(tables["emb"].bits, embedding.weight.bits.detach().numpy())
    np.testing.assert_array_equal(tables["emb"].scale, embedding.weight.scale.detach().numpy())
    assert tables["emb"].dim == 13
    np.testing.assert_array_equal(state["emb"]["scale_m"], np.ones(7, np.float32))


def test_jax_table(tmp_path):
    jax, dbj = pytest.importorskip("jax"), pytest.importorskip("dualbin.jax")
    table = dbj.BinaryTable.create(jax.random.key(0), 7, 13)
    io.save(tmp_path / "t", {"emb": table}, {"emb": {"step": jax.numpy.int32(4)}})
    tables, state = io.load(tmp_path / "t")
    np.testing.assert_array_equal(tables["emb"].bits, np.asarray(table.bits))
    assert tables["emb"].dim == 13
    assert state == {"emb": {"step": 4}}


@pytest.mark.parametrize(
    ("tables", "state", "error", "message"),
    [
        ({"emb": np.zeros((3, 2))}, None, TypeError, r"tables\['emb'\] must have .bits, .scale and .dim"),
        ({"": make_table()}, None, TypeError, "non-empty str"),
        ({"emb": make_table()._replace(dim=20)}, None, ValueError, r"tables\['emb'\]: bits must have shape"),
        ({"emb": make_table()._replace(dim=8.5)}, None, TypeError, r"tables\['emb'\].dim must be an integer"),
        ({"emb": make_table()._replace(dim=lambda: 9)}, None, TypeError, r"dim must be an integer"),
        ({"emb": make_table()._replace(scale=np.ones((5, 1)))}, None, ValueError, "scale must be float32, got float64"),
        ({"emb": make_table()._replace(scale=np.ones(5, np.float32))}, None, ValueError, r"scale must have shape \[5, 1\]"),
        ({"emb": make_table()._replace(bits=np.full((5, 2), 255, np.uint8))}, None, ValueError, "bits has bits set beyond column"),
        ({"emb": make_table()}, {"other": {}}, ValueError, r"state\['other'\] belongs to no table"),
        ({"emb": make_table()}, {"emb": {"bits": np.zeros(3)}}, ValueError, "other than bits and scale"),
        ({"emb": make_table()}, {"emb": {"a.b": np.zeros(3)}}, ValueError, "without a dot"),
        ({"emb": make_table()}, {"emb": {"count": np.zeros(5)}}, ValueError, r"state\['emb'\]\['count'\] must be int32 .* got float64"),
        ({"emb": make_table()}, {"emb": {"count": np.zeros(4, np.int32)}}, ValueError, "5 rows"),
        ({"emb": make_table()}, {"emb": {"step": 1.5}}, ValueError, "must be int64"),
        ({"emb": make_table()}, {"emb": {"counter": np.zeros((5, 13), np.uint8)}}, ValueError, r"'counter'.* at most 14, "),
        ({"emb": make_table(planes=2)}, {"emb": {"counter": np.zeros((5, 14), np.uint8)}}, ValueError, r"at most 12, .*planes=2, got 14"),
        ({"emb": make_table()}, {"emb": {"record": np.zeros((5, 4), np.int32)}}, ValueError, r"'record'.* give what export_state returns"),
    ],
)
def test_save_refuses(tmp_path, tables, state, error, message):
    path = tmp_path / "t"
    path.write_bytes(b"before")
    with pytest.raises(error, match=message):
        io.save(path, tables, state)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_save_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "t"
    for seed in (1, 2):
        io.save(path, {"emb": make_table(seed=seed)})
    np.testing.assert_array_equal(io.load(path)[0]["emb"].bits, make_table(seed=2).bits)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_save_gives_the_mode_of_the_umask_and_keeps_that_of_a_file(tmp_path, mask):
    path, before = tmp_path / "t", os.umask(mask)
    try:
        io.save(path, {"emb": make_table()})
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        for mode in (0o600, 0o664):
            path.chmod(mode)
            io.save(path, {"emb": make_table()})
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_save_keeps_a_symbolic_link_and_replaces_its_target(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, dangling = tmp_path / "folder" / "t", tmp_path / "latest", tmp_path / "new"
    io.save(target, {"emb": make_table(seed=1)})
    link.symlink_to(target)
    dangling.symlink_to("folder/u")
    for each in (link, dangling):
        io.save(each, {"emb": make_table(seed=2)})
        assert each.is_symlink()
    for file in (target, tmp_path / "folder" / "u"):
        np.testing.assert_array_equal(io.load(file)[0]["emb"].bits, make_table(seed=2).bits)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("length", [230, 255])
def test_save_under_a_long_name(tmp_path, length):
    io.save(tmp_path / ("x" * length), {"emb": make_table()})
    assert [len(path.name) for path in tmp_path.iterdir()] == [length]


def test_save_removes_what_a_killed_process_left(tmp_path):
    code = f"""
import os, signal, sys
from dualbin import _replace_file
def write(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
_replace_file.replace_file(_replace_file.Path({str(tmp_path / "t")!r}), write)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1  # each removes what the one before left
    used = tmp_path / ".dualbin-used.tmp"
    used.mkdir()
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another process that saves now
    try:
        io.save(tmp_path / "t", {"emb": make_table()})
        assert set(tmp_path.iterdir()) == {tmp_path / "t", used}
    finally:
        os.close(handle)
    io.save(tmp_path / "t", {"emb": make_table()})
    assert list(tmp_path.iterdir()) == [tmp_path / "t"]


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t"
    io.save(path, {"emb": make_table(seed=1)})
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.save(path, {"emb": make_table(seed=2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_to_a_folder_that_is_missing(tmp_path):
    with pytest.raises(OSError, match="none"):
        io.save(tmp_path / "none" / "t", {"emb": make_table()})


def test_load_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.load(tmp_path / "none")


GOOD = {"format": "dualbin", "format_version": "2", "emb.dim": "9", "emb.planes": "1"}


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({}, None, "metadata 'format' is None, expected 'dualbin'"),
        ({}, GOOD | {"format": "pt"}, "metadata 'format' is 'pt', expected 'dualbin'"),
        ({}, GOOD | {"format_version": "3"}, "metadata 'format_version' is '3', expected '1' or '2'"),
        ({}, GOOD | {"emb.dim": "nine"}, "metadata 'emb.dim' is 'nine'"),
        ({}, GOOD | {"emb.dim": "17"}, r"emb: bits must have shape \[V, 3\]"),
        ({}, GOOD | {"emb.dim": "0"}, "emb: dim"),
        ({}, GOOD | {"other.dim": "9", "other.planes": "1"}, "key 'other.bits' is missing"),
        ({}, GOOD | {"other.dim": "9"}, "metadata 'other.planes' is missing"),
        ({}, GOOD | {"emb.dim": "9" * 5000}, "metadata 'emb.dim' is '9+', expected"),
        ({}, GOOD | {"emb.planes": "two"}, "metadata 'emb.planes' is 'two'"),
        ({}, GOOD | {"emb.planes": "2"}, r"emb: bits must have shape \[V, 4\] with V >= 1 for dim 9 and 2 planes"),
        ({}, GOOD | {"emb.planes": "9"}, "emb: planes must be between 1 and 8, got 9"),
        ({}, GOOD | {"format_version": "1"}, "metadata 'emb.planes' is '1', expected '<table>.dim'"),
        ({"emb.counter": np.zeros((5, 13), np.uint8)}, GOOD, "emb.counter must have rows of a multiple of 2 bytes"),
        ({}, {"format": "dualbin", "format_version": "2"}, "key 'emb.bits' belongs to no table"),
        ({"emb.scale": None}, GOOD, "key 'emb.scale' is missing"),
        ({"emb.bits": None}, GOOD, "key 'emb.bits' is missing"),
        ({"emb.bits": np.zeros((5, 2), np.int8)}, GOOD, "emb: bits must be uint8, got int8"),
        ({"emb.bits": np.full((5, 2), 255, np.uint8)}, GOOD, "bits has bits set beyond column"),
        ({"emb.scale": np.ones((4, 1), np.float32)}, GOOD, r"scale must have shape \[5, 1\]"),
        ({"emb.step": np.zeros(2, np.int64)}, GOOD, "emb.step must be int64"),
        ({"emb.counter": np.zeros((4, 14), np.uint8)}, GOOD, "emb.counter must be uint8 .* 5 rows"),
        ({"stray": np.zeros(2)}, GOOD, "key 'stray' belongs to no table"),
    ],
)
def test_load_refuses(tmp_path, change, metadata, message):
    path = tmp_path / "t.safetensors"
    table = make_table()
    arrays = {"emb.bits": table.bits, "emb.scale": table.scale} | change
    save_file({key: array for key, array in arrays.items() if array is not None}, path, metadata)
    with pytest.raises(ValueError, match=message) as error:
        io.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_load_truncated(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    io.save(path, {"emb": make_table()})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.safetensors: not a complete safetensors file"):
        io.load(path)
