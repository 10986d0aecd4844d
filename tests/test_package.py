"""What importing loads, what the module links, and what dualbin says about itself."""

import importlib.util
import os
import re
import struct
import subprocess
import sys
import tomllib

import ml_dtypes
import numpy as np
import pytest

import dualbin
from dualbin import _backends

HAS_TORCH, HAS_JAX = (importlib.util.find_spec(name) is not None for name in ("torch", "jax"))

#: shared libraries that the module may need: those of the compiler and the C library
ALLOWED = ("libstdc++.so", "libm.so", "libgcc_s.so", "libc.so", "ld-linux", "libgomp", "libpthread.so", "libdl.so", "librt.so")

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code, *blocked):
    """Run code in a fresh interpreter where the modules `blocked` do not exist; return its output."""
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", (BLOCK.format(blocked=set(blocked)) if blocked else "") + code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LOADED = "import sys; print(sorted({'torch', 'jax', 'jaxlib', 'optax', 'flax'} & set(sys.modules)))"


def test_import_loads_no_framework():
    code = "import dualbin, dualbin.io, dualbin.rules, dualbin.reference; dualbin.backends(); dualbin.pack; "
    assert python(code + LOADED) == "[]"


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_torch_frontend_never_imports_jax():
    code = """
import torch, dualbin, dualbin.torch as dbt
emb = dbt.BinaryEmbedding(50, 9)
opt = dbt.XOR([emb.weight])
emb(torch.arange(8)).sum().backward()
opt.step()
dualbin.backends()
"""
    assert python(code + LOADED) == "['torch']"
    assert python(code + LOADED, "jax", "jaxlib", "optax") == "['torch']"


@pytest.mark.skipif(not HAS_JAX, reason="JAX is not installed")
def test_jax_frontend_never_imports_torch():
    code = """
import jax, optax, dualbin, dualbin.jax as dbj
params = {"emb": dbj.BinaryTable.create(jax.random.key(0), 50, 9)}
tx = dbj.xor()
_, grads = dbj.value_and_grad(lambda params, ids: params["emb"][ids].sum(), ids=lambda _, ids: {"emb": ids})(params, jax.numpy.arange(8))
updates, _ = tx.update(grads, tx.init(params), params)
optax.apply_updates(params, updates)
dualbin.backends()
"""
    assert "torch" not in python(code + LOADED)
    assert "torch" not in python(code + LOADED, "torch")


@pytest.mark.parametrize(
    ("frontend", "blocked", "line"),
    [("torch", ["torch"], "pip install 'torch>=2.11'"), ("jax", ["jax", "jaxlib"], "pip install 'jax>=0.10' 'optax>=0.2.4'")],
)
def test_missing_framework_names_a_line_that_works(root, frontend, blocked, line):
    code = f"""
import dualbin
try:
    import dualbin.{frontend}
except ImportError as error:
    print(error)
"""
    assert line in python(code, *blocked)
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.findall("'(.*?)'", line) == extras[frontend]


def test_a_build_without_handlers_says_so():
    code = """
import dualbin._native as native
build = native.build_info()
native.build_info = lambda: build | {"xla_ffi": None}
import dualbin
print(dualbin.backends()["frontends"]["jax"])
try:
    import dualbin.jax
except ImportError as error:
    print(error)
"""
    lines = python(code).splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("dualbin was built without XLA handlers (DUALBIN_XLA=OFF,")


def test_jaxlib_is_asked_for_where_handlers_are_wanted(root, monkeypatch):
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(root / "build_backend"))
    monkeypatch.chdir(root)
    build = importlib.import_module("dualbin_build")
    for name in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        requires = getattr(build, name)
        assert build.HEADERS in requires()
        assert build.HEADERS in requires({"cmake.define.DUALBIN_CUDA": "OFF"})
        assert build.HEADERS not in requires({"cmake.define.DUALBIN_XLA": "OFF"})
        assert build.HEADERS not in requires({"cmake.define.DUALBIN_XLA": ["ON", "off"]})


def test_missing_native_is_reported():
    code = """
import numpy as np, dualbin
bits = dualbin.pack(np.ones((2, 9), np.float32))
info = dualbin.backends()
print(bits.tolist(), dualbin.unpack(bits, 9).sum(), info["native"], len(info["fallbacks"]), info["fallbacks"][0])
"""
    block = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "dualbin._native":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
"""
    assert python(block + code).startswith("[[255, 1], [255, 1]] 18 None 1 dualbin._native cannot be loaded (")


def needed_libraries(path):
    """DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (table,), (size, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQII", data, table + n * size) for n in range(count)]  # name, type, ..., offset, size, link
    (dynamic,) = [section for section in sections if section[1] == 6]
    strings = sections[dynamic[6]][4]
    entries = [struct.unpack_from("<QQ", data, dynamic[4] + n) for n in range(0, dynamic[5], 16)]
    return [data[strings + value : data.index(b"\0", strings + value)].decode() for tag, value in entries if tag == 1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF files are Linux's")
def test_native_links_no_framework(native_path):
    needed = needed_libraries(native_path)
    assert any(name.startswith("libstdc++") for name in needed)  # the reader works
    assert [name for name in needed if not name.startswith(ALLOWED)] == []


@pytest.fixture
def native_path(root):
    from pathlib import Path

    from dualbin import _native

    return Path(_native.__file__)


def test_backends():
    info = dualbin.backends()
    assert set(info) == {"version", "native", "simd", "cuda", "frontends", "fallbacks"}
    assert info["version"] == dualbin.__version__ == info["native"]["version"]
    assert info["simd"] in {"portable", "avx2", "avx512"}
    assert info["cuda"]["built"] == bool(info["cuda"]["architectures"])
    assert info["frontends"].keys() == {"torch", "jax"}


def test_the_instruction_set_is_chosen_by_the_environment():
    from dualbin import _native

    def backends_with(level):
        command = [sys.executable, "-c", "import dualbin; print(dualbin.backends()['simd'])"]
        environment = {**os.environ, "DUALBIN_SIMD": level}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    for level in _native.simd_levels():
        assert backends_with(level).stdout.split() == [level]
    refused = backends_with("mmx")
    assert refused.returncode != 0
    assert "ValueError: DUALBIN_SIMD: the instruction set must be one that this build and this processor have (portable" in refused.stderr


def test_an_unknown_instruction_set_is_refused():
    from dualbin import _native

    before = _native.simd()
    with pytest.raises(ValueError, match=r"processor have \(portable.*got 'mmx'"):
        _native.use_simd("mmx")
    assert _native.simd() == before


def test_backends_asks_frontends(monkeypatch):
    monkeypatch.setattr(_backends, "_frontends", {})
    assert dualbin.backends()["frontends"]["jax"] == "not imported"
    _backends.register_frontend("jax", lambda: {"handlers": ["cpu"], "fallbacks": ["no handlers on tpu"]})
    info = dualbin.backends()
    assert info["frontends"] == {"torch": "not imported", "jax": {"handlers": ["cpu"]}}
    assert info["fallbacks"] == ["jax: no handlers on tpu"]
    with pytest.raises(ValueError, match="name must be one of"):
        _backends.register_frontend("numpy", dict)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dualbin.nothing
    assert {"io", "reference", "rules"} <= set(dir(dualbin))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 8), (5, 9), (2, 1000)])
def test_pack(dtype, shape):
    w = np.random.default_rng(0).normal(size=shape).astype(dtype)
    w[0, 0] = -0.0
    bits = dualbin.pack(w)
    np.testing.assert_array_equal(bits, np.packbits(w >= 0, axis=1, bitorder="little"))
    signs = dualbin.unpack(bits, shape[1])
    assert signs.dtype == np.int8
    np.testing.assert_array_equal(signs, np.where(w >= 0, 1, -1))


def test_pack_of_a_view():
    w = np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
    np.testing.assert_array_equal(dualbin.pack(w.T), np.packbits(w.T >= 0, axis=1, bitorder="little"))
    bits = dualbin.pack(w)
    np.testing.assert_array_equal(dualbin.unpack(bits[::2], 20), np.where(w[::2] >= 0, 1, -1))


def test_pack_keeps_the_sign_of_tiny_values():
    assert dualbin.pack(np.array([[-1e-300, 1e-300]])).tolist() == [[2]]
    assert dualbin.pack(np.array([[-1e-45, 1e-45]], np.float32)).tolist() == [[2]]


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        ([[1.0]], TypeError, "w must be a NumPy array, got list"),
        (np.ones((2, 2), np.int32), TypeError, "got int32"),
        (np.ones(3, np.float32), ValueError, r"shape \[V, D\].*got \[3\]"),
        (np.ones((0, 3), np.float32), ValueError, r"got \[0, 3\]"),
        (np.ones((3, 0), np.float32), ValueError, r"got \[3, 0\]"),
        (np.array([[1.0, np.nan]], np.float32), ValueError, "(?i)nan"),
        (np.array([[1.0, np.nan]], np.float16), ValueError, "(?i)nan"),
        (np.array([[1.0, np.nan]]), ValueError, "(?i)nan"),
    ],
)
def test_pack_refuses(w, error, message):
    with pytest.raises(error, match=message):
        dualbin.pack(w)


@pytest.mark.parametrize(
    ("bits", "dim", "error", "message"),
    [
        (np.zeros((2, 2), np.int8), 9, TypeError, "bits must be a NumPy array of uint8, got int8"),
        ([[0]], 8, TypeError, "got list"),
        (np.zeros((2, 2), np.uint8), 8, ValueError, r"bits must have shape \[V, 1\]"),
        (np.zeros((0, 1), np.uint8), 8, ValueError, "V >= 1"),
        (np.zeros((2, 2), np.uint8), 0, ValueError, "dim"),
        (np.zeros((2, 2), np.uint8), 9.0, TypeError, "dim"),
    ],
)
def test_unpack_refuses(bits, dim, error, message):
    with pytest.raises(error, match=message):
        dualbin.unpack(bits, dim)


def test_a_library_of_other_sources_is_refused(monkeypatch):
    from dualbin import _backends, _schema

    load = _backends.load_native.__wrapped__
    assert load()[0] is not None
    monkeypatch.setattr(_schema, "STATS", (*_schema.STATS, "more"))
    assert load() == (None, "it was built from other sources than these Python files: build dualbin again")


def test_shards_part_the_tests(root, request):
    """Every test is in one shard; those of a group share it, whatever their names."""
    in_shard = request.config.pluginmanager.get_plugin(str(root / "tests" / "conftest.py")).in_shard

    class Item:
        def __init__(self, nodeid, group=None):
            self.nodeid, self._group = nodeid, group

        def get_closest_marker(self, name):
            assert name == "xdist_group"
            return pytest.mark.xdist_group(self._group).mark if self._group else None

    items = [Item(f"tests/test_{number}.py::test") for number in range(60)]
    parts = [[item for item in items if in_shard(item, f"{part}/3")] for part in (1, 2, 3)]
    assert sorted(item.nodeid for part in parts for item in part) == sorted(item.nodeid for item in items)
    assert all(parts)
    grouped = [Item(f"tests/test_{number}.py::test", "one") for number in range(20)]
    assert sum(all(in_shard(item, f"{part}/3") for item in grouped) for part in (1, 2, 3)) == 1
    for wrong in ("0/3", "4/3"):
        with pytest.raises(pytest.UsageError, match="--shard must be I/N with 1 <= I <= N"):
            in_shard(items[0], wrong)
