"""Tables and state from elsewhere: DLPack, files, and what importing the package brings along."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dualbin
import dualbin.torch as dbt
from dualbin import io


def source():
    w = np.random.default_rng(0).standard_normal((6, 11)).astype(np.float32)
    return SimpleNamespace(bits=dualbin.pack(w), scale=np.abs(w).mean(axis=1, keepdims=True), dim=11)


@pytest.mark.parametrize("copy", [False, True])
def test_from_jax_takes_whatever_speaks_dlpack(copy):
    other = source()
    table = dbt.from_jax(other, copy=copy)
    assert (table.shape, table.dim) == ((6, 11), 11)
    np.testing.assert_array_equal(table.dequantize().numpy(), dualbin.unpack(other.bits, 11) * other.scale)
    assert (table.bits.data_ptr() == other.bits.ctypes.data) is not copy
    table.bits[0, 0] ^= 1
    assert (table.bits.numpy()[0, 0] == other.bits[0, 0]) is np.bool_(not copy)


def test_from_jax_with_arrays_of_jax():
    jnp = pytest.importorskip("jax.numpy")
    other = source()
    arrays = SimpleNamespace(bits=jnp.asarray(other.bits), scale=jnp.asarray(other.scale), dim=11)
    for copy in (True, False):
        table = dbt.from_jax(arrays, copy=copy)
        np.testing.assert_array_equal(table.bits.numpy(), other.bits)
        np.testing.assert_array_equal(table.scale.numpy(), other.scale)
    parameter = torch.nn.Parameter(table)
    dbt.lookup(parameter, torch.tensor([1, 2])).sum().backward()
    dbt.XOR([parameter]).step()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": None}, TypeError, "table must have .bits, an array that speaks DLPack"),
        ({"scale": [1.0]}, TypeError, "table must have .scale, an array that speaks DLPack"),
        ({"dim": None}, TypeError, "dim must be an integer, got None"),
        ({"dim": 17}, ValueError, "bits must have shape"),
        ({"bits": np.zeros((6, 2), np.int32)}, TypeError, "bits must be uint8, got int32"),
        ({"scale": np.ones((6, 1))}, TypeError, "scale must be float32, got float64"),
    ],
)
def test_from_jax_names_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        dbt.from_jax(SimpleNamespace(**(vars(source()) | change)))


def test_files_hold_table_and_state(tmp_path, table):
    optimizer = dbt.XOR([table])
    dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    io.save(tmp_path / "t.safetensors", {"emb": table}, optimizer.export_state({"emb": table}))
    tables, state = io.load(tmp_path / "t.safetensors")
    again = torch.nn.Parameter(dbt.from_jax(tables["emb"]))
    assert torch.equal(again, table)
    other = dbt.XOR([again])
    other.import_state(state, {"emb": again})
    for name, value in optimizer.state[table].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[again][name])), name


def test_backends_tells_about_torch():
    entry = dualbin.backends()["frontends"]["torch"]
    assert entry["version"] == torch.__version__
    assert "cpu" in entry["devices"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_importing_does_not_import_jax():
    code = "import sys, dualbin.torch; print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib')])"
    result = run(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_without_the_native_library_the_import_says_so():
    result = run("import sys; sys.modules['dualbin._native'] = None; import dualbin.torch")
    assert "ImportError: dualbin.torch needs dualbin._native, which cannot be loaded" in result.stderr


def test_without_torch_the_import_says_what_to_install():
    result = run("import sys; sys.modules['torch'] = None; import dualbin; dualbin.pack; import dualbin.torch")
    assert result.returncode != 0
    assert "ImportError: dualbin.torch needs PyTorch: pip install 'torch>=2.11'" in result.stderr
