"""What importing the frontend needs and does."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import dualbin
import dualbin.jax as dbj
from dualbin.jax import _ffi


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_never_imports_torch():
    done = run(
        "import sys, dualbin.jax as dbj, jax; t = dbj.BinaryTable.create(jax.random.key(0), 5, 9); t[[1]].block_until_ready();"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_without_jax():
    done = run("import sys; sys.modules['jax'] = None\nimport dualbin\ntry:\n    import dualbin.jax\nexcept ImportError as e: print(e)")
    assert "pip install 'jax>=0.10' 'optax>=0.2.4'" in done.stdout, done.stderr


def test_without_optax():
    done = run("import sys; sys.modules['optax'] = None\nimport dualbin.jax as d\ntry:\n    d.xor()\nexcept ImportError as e: print(e)")
    assert "needs optax: pip install 'optax>=0.2.4'" in done.stdout, done.stderr


def test_newer_headers_leave_jax_usable():
    done = run(
        "import dualbin._native as n; n.xla_ffi_api_version = (9, 7)\n"
        "import dualbin, dualbin.jax as dbj, jax, jax.numpy as jnp\n"
        "t = dbj.BinaryTable.create(jax.random.key(0), 5, 9)\n"
        "try:\n    t[[1]]\nexcept ImportError as e: print(e)\n"
        "print(float(jnp.linalg.norm(jnp.ones(4))), dualbin.backends()['fallbacks'])"
    )
    assert "built for XLA FFI 9.7, but jaxlib" in done.stdout, done.stderr
    assert "install a newer jaxlib, or build dualbin with" in done.stdout
    assert "2.0 ['jax: dualbin was built" in done.stdout


def test_versions():
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    _ffi.check_versions(SimpleNamespace(xla_ffi_api_version=(0, 1)), header)
    with pytest.raises(ImportError, match="built without XLA handlers"):
        _ffi.check_versions(SimpleNamespace(xla_ffi_api_version=None), header)
    with pytest.raises(ImportError, match="cannot read the XLA FFI version"):
        _ffi.check_versions(SimpleNamespace(xla_ffi_api_version=(0, 1)), "")


def test_backends_has_the_frontend(on_gpu):
    handlers = dualbin.backends()["frontends"]["jax"]["handlers"]
    assert "cpu" in handlers
    assert "CUDA" in handlers or not on_gpu


def test_public_names():
    assert sorted(dbj.__all__) == dbj.__all__
    assert all(hasattr(dbj, name) for name in dbj.__all__)
    assert not hasattr(dbj.RowGrad, "dense")


def test_no_fallback_is_reported_where_there_are_native_handlers():
    assert not [text for text in dualbin.backends()["fallbacks"] if text.startswith("jax")]
