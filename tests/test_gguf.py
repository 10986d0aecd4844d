"""Tables in GGUF files, read by others than :mod:`dualbin`: Q4_1 by the package gguf, Q1_0 by what ggml's source says of it."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualbin
from dualbin import io, reference

gguf = pytest.importorskip("gguf")


def make(rows=7, dim=256, planes=1, seed=0):
    rng = np.random.default_rng(seed)
    bits = dualbin.pack(rng.standard_normal((rows, dim)).astype(np.float32), planes)
    scale = np.exp(2 * rng.standard_normal((rows, 1))).astype(np.float32)
    scale[-1] *= -1
    scale[rows // 2] = 0  # a padding row
    return io.Table(bits, scale, dim, planes)


def values(table):
    """The float table, `[V, D]`."""
    rows = np.arange(len(table.bits))
    return reference.lookup(table.bits, table.scale, rows, dim=table.dim, planes=table.planes)


def dequantized_q1_0(data, dim):
    """As `dequantize_row_q1_0` in ggml-quants.c does it: 128 weights are a half d and 16 bytes, weight j is bit j % 8 of byte j / 8."""
    block = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    out = np.empty((len(data), dim), np.float32)
    for row, blocks in enumerate(np.ascontiguousarray(data).view(block)):
        for i, each in enumerate(blocks):
            d = np.float32(each["d"])
            for j in range(128):
                out[row, 128 * i + j] = d if each["qs"][j // 8] >> j % 8 & 1 else -d
    return out


def read(path):
    (tensor,) = gguf.GGUFReader(path).tensors
    return tensor


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_bits_come_back_and_scales_are_those_of_float16(tmp_path_factory, rows, blocks, planes, seed):
    table = make(rows, 128 * blocks, planes, seed)
    path = tmp_path_factory.getbasetemp() / "table.gguf"
    io.to_gguf(path, {"t": table})
    (loaded,) = io.from_gguf(path).values()
    assert (loaded.dim, loaded.planes) == (table.dim, planes)
    assert np.array_equal(loaded.bits, table.bits)
    step = 2.0 ** (2 - planes) if planes > 1 else 1
    assert np.array_equal(loaded.scale, (table.scale * np.float32(step)).astype(np.float16).astype(np.float32) / np.float32(step))
    np.testing.assert_allclose(loaded.scale, table.scale, rtol=2**-11)
    io.to_gguf(path, {"t": loaded})  # which loses nothing more
    assert np.array_equal(io.from_gguf(path)["t"].scale, loaded.scale)


def test_one_plane_is_q1_0_as_ggml_reads_it(tmp_path):
    table = make()
    io.to_gguf(tmp_path / "t.gguf", {"token_embd.weight": table})
    tensor = read(tmp_path / "t.gguf")
    assert (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) == ("token_embd.weight", "Q1_0", [256, 7])
    assert tensor.n_bytes == 7 * 256 // 128 * 18
    blocks = np.asarray(tensor.data).reshape(7, 2, 18)
    assert np.array_equal(blocks[:, :, 2:].reshape(7, -1), table.bits)  # the same bytes
    halves = table._replace(scale=table.scale.astype(np.float16).astype(np.float32))
    assert np.array_equal(dequantized_q1_0(tensor.data, 256), values(halves))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_more_planes_are_q4_1_as_the_package_reads_it(tmp_path, planes):
    table = make(dim=96, planes=planes)
    io.to_gguf(tmp_path / "t.gguf", {"t": table})
    tensor = read(tmp_path / "t.gguf")
    assert (tensor.tensor_type.name, tensor.shape.tolist(), tensor.n_bytes) == ("Q4_1", [96, 7], 7 * 3 * 20)
    found, loaded = gguf.dequantize(tensor.data, tensor.tensor_type), io.from_gguf(tmp_path / "t.gguf")["t"]
    # beside the scale, the minimum is rounded: by half a step of float16 at most
    assert (abs(found - values(loaded)) <= 2**-11 * abs(loaded.scale) * (2 - 2.0 ** (1 - planes))).all()
    assert (found[3] == 0).all()
    exact = table._replace(scale=np.full((7, 1), 0.25, np.float32))  # powers of two have no rounding
    io.to_gguf(tmp_path / "t.gguf", {"t": exact})
    tensor = read(tmp_path / "t.gguf")
    assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), values(exact))


def test_a_table_joins_the_tensors_of_a_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch="llama")
    writer.add_tensor("output.weight", np.ones((4, 256), np.float32))
    io.to_gguf(writer, {"token_embd.weight": make(), "per_layer_token_embd.weight": make(planes=4, seed=1)})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert set(io.from_gguf(tmp_path / "model.gguf")) == {"token_embd.weight", "per_layer_token_embd.weight"}
    assert set(io.from_gguf(tmp_path / "model.gguf", ["token_embd.weight"])) == {"token_embd.weight"}
    with pytest.raises(ValueError, match=r"there is no tensor 'x', these are \['output.weight'"):
        io.from_gguf(tmp_path / "model.gguf", ["x"])
    with pytest.raises(ValueError, match=r"output.weight must be a matrix of the type Q1_0 or Q4_1, got F32 of shape \[4, 256\]"):
        io.from_gguf(tmp_path / "model.gguf", ["output.weight"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (make(dim=192), r"tables\['t'\] must have a multiple of 128 columns, the block of Q1_0, got 192"),
        (make(dim=80, planes=4), "a multiple of 32 columns, the block of Q4_1, got 80"),
        (make(planes=5), r"must have 1 to 4 planes, .* got 5: with_planes\(4\)"),
        (make()._replace(scale=np.full((7, 1), 7e4, np.float32)), "cannot hold that of row 0, 70000"),
        (make()._replace(scale=np.full((7, 1), 1e-9, np.float32)), "cannot hold that of row 0, 1e-09"),
        (make(planes=4)._replace(scale=np.full((7, 1), 4e4, np.float32)), "cannot hold that of row 0, 40000"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_a_file_is_there(tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        io.to_gguf(tmp_path / "t.gguf", {"t": table})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Q1_0", "Q4_1"])
def test_a_matrix_that_others_quantised_is_refused(tmp_path, kind):
    w = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    if kind == "Q4_1":
        data = gguf.quantize(w, gguf.GGMLQuantizationType.Q4_1)
    else:
        data = np.zeros((3, 36), np.uint8)
        data[0, :2] = 7
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", arch="llama")
    writer.add_tensor("t", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ValueError, match=r"t\.gguf: t is no packed table: .*BinaryTable\.from_float packs its values"):
        io.from_gguf(tmp_path / "t.gguf")


def test_a_table_of_padding_alone_has_the_planes_that_there_can_be(tmp_path):
    io.to_gguf(tmp_path / "t.gguf", {"t": make(planes=2)._replace(scale=np.zeros((7, 1), np.float32))})
    loaded = io.from_gguf(tmp_path / "t.gguf")["t"]
    assert (loaded.planes, loaded.scale.any()) == (4, False)


def test_damaged_files_and_missing_ones(tmp_path):
    io.to_gguf(tmp_path / "t.gguf", {"t": make()})
    whole = (tmp_path / "t.gguf").read_bytes()
    for length in (3, 10, 40, 90, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: not a complete GGUF file"):
            io.from_gguf(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError):
        io.from_gguf(tmp_path / "none.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (lambda: io.to_gguf(tmp_path / "t.gguf", {"t": make()}), lambda: io.from_gguf(tmp_path / "t.gguf")):
        with pytest.raises(ImportError, match=r"needs the package gguf: pip install 'gguf>=0\.19'"):
            call()
