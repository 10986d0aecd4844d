"""Wrong arguments that once met an error from within, or none: the error names the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dualbin.io

V, D = 11, 13


@pytest.fixture
def in_torch() -> SimpleNamespace:
    """What the cases of PyTorch start from."""
    torch = pytest.importorskip("torch")
    import dualbin.torch as dbt

    table = torch.nn.Parameter(dbt.BinaryTable.from_float(torch.randn(V, D)))
    return SimpleNamespace(torch=torch, dbt=dbt, table=table, ids=torch.arange(4), rows=torch.ones(4, D))


@pytest.fixture
def in_jax() -> SimpleNamespace:
    """What the cases of JAX start from."""
    jax = pytest.importorskip("jax")
    import dualbin.jax as dbj

    table = dbj.BinaryTable.create(jax.random.key(0), V, D)
    return SimpleNamespace(jax=jax, dbj=dbj, table=table, state=dbj.init_state(table), ids=np.arange(4), rows=np.ones((4, D), np.float32))


TORCH: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "lr": (lambda x: x.dbt.XOR([x.table], lr=1e39), ValueError, "lr must be finite and at most 3.4"),
    "lr of a group": (lambda x: x.dbt.XOR([{"params": [x.table], "lr": 2**200}]), ValueError, "lr must be finite and at most"),
    "scale_lr": (lambda x: x.dbt.XOR([x.table], scale_lr=1e39), ValueError, "scale_lr must be finite and at most"),
    "first_row": (
        lambda x: x.dbt.BinaryTable(x.table.bits, x.table.scale, D, first_row=2**63 - V),
        ValueError,
        f"first_row must be between 0 and {2**63 - 1 - V}",
    ),
    "dim": (lambda x: x.dbt.BinaryTable(x.table.bits, x.table.scale, 2**63), ValueError, f"dim must be at most {2**28}, got {2**63}"),
    "num_embeddings": (lambda x: x.dbt.BinaryEmbedding(2**63, D), ValueError, "num_embeddings must be at most"),
    "embedding_dim": (lambda x: x.dbt.BinaryEmbedding(V, 2**63), ValueError, "embedding_dim must be at most"),
    "scale": (lambda x: x.dbt.BinaryEmbedding(V, D, scale=1e39), ValueError, "scale must be finite and at most 3.4"),
    "shape": (lambda x: x.dbt.RowGrad(x.ids, x.rows, 3), TypeError, r"shape must be \(V, D\), got 3"),
    "V of shape": (lambda x: x.dbt.RowGrad(x.ids, x.rows, (-1, D)), ValueError, "V of shape must be at least 1, got -1"),
    "D of shape": (lambda x: x.dbt.RowGrad(x.ids, x.rows, (V, "13")), TypeError, "D of shape must be an integer, got '13'"),
    "sparse ids": (
        lambda x: x.dbt.lookup(x.table.detach(), x.ids.to_sparse()),
        ValueError,
        r"ids must be a dense tensor, got one of layout torch.sparse_coo; call .to_dense\(\)",
    ),
    "states": (lambda x: x.dbt.XOR([x.table]).import_state([], {"a": x.table}), TypeError, "states must be a dict of names to states"),
    "a state": (
        lambda x: x.dbt.XOR([x.table]).import_state({"a": None}, {"a": x.table}),
        TypeError,
        r"states\['a'\] must be a dict of names to arrays, got a NoneType",
    ),
}

JAX: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "learning_rate": (lambda x: x.dbj.xor(1e39), ValueError, "learning_rate must be finite and at most 3.4"),
    "scale_lr": (lambda x: x.dbj.init_state(x.table, scale_lr="x"), TypeError, "scale_lr must be a number, got str"),
    "bits": (
        lambda x: x.dbj.BinaryTable(pytest.importorskip("torch").zeros(V, 2), x.table.scale, D),
        TypeError,
        "bits must be an array, got Tensor: dualbin.jax.from_torch takes a table of PyTorch",
    ),
    "step": (
        lambda x: x.dbj.xor_update(x.table, x.ids, x.rows, x.state._replace(step=3)),
        TypeError,
        "state.step must be an integer array, got a int",
    ),
    "float step": (
        lambda x: x.dbj.xor_update(x.table, x.ids, x.rows, x.state._replace(step=np.float32(3))),
        TypeError,
        "state.step must be an integer array, got float32",
    ),
    "rngs": (
        lambda x: pytest.importorskip("flax") and x.dbj.BinaryEmbed(V, D, rngs=None),
        TypeError,
        "rngs must be an nnx.Rngs with a stream params, got a NoneType",
    ),
    "scale": (
        lambda x: x.dbj.BinaryTable.create(x.jax.random.key(0), V, D, scale=1e39),
        ValueError,
        "scale must be finite and at most 3.4",
    ),
    "D": (  # JAX would end the process
        lambda x: x.dbj.BinaryTable.create(x.jax.random.key(0), V, 2**63),
        ValueError,
        f"D must be at most {2**28}, got {2**63}",
    ),
    "V": (lambda x: x.dbj.BinaryTable.create(x.jax.random.key(0), 2**62, 1), ValueError, "V must be at most"),
    "exported": (
        lambda x: x.dbj.import_state({"t": x.state}, [("t", {})]),
        TypeError,
        "exported must be a dict of paths to states, got a list",
    ),
    "a state": (
        lambda x: x.dbj.import_state({"t": x.state}, {"t": None}),
        TypeError,
        r"exported\['t'\] must be a dict of names to arrays, got a NoneType",
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str, in_torch: SimpleNamespace) -> None:
    call, kind, message = TORCH[name]
    with pytest.raises(kind, match=message):
        call(in_torch)


@pytest.mark.parametrize("name", JAX)
def test_jax(name: str, in_jax: SimpleNamespace) -> None:
    call, kind, message = JAX[name]
    with pytest.raises(kind, match=message):
        call(in_jax)


def test_a_rate_may_be_an_int_of_any_size_that_a_float_holds(in_jax: SimpleNamespace) -> None:
    table, state = in_jax.dbj.xor_update(in_jax.table, in_jax.ids, in_jax.rows, in_jax.state, learning_rate=2**31)
    want, _ = in_jax.dbj.xor_update(in_jax.table, in_jax.ids, in_jax.rows, in_jax.state, learning_rate=2.0**31)
    assert int(state.step) == 1
    assert (np.asarray(table.bits) == np.asarray(want.bits)).all()
    assert (np.asarray(table.scale) == np.asarray(want.scale)).all()


def test_io(tmp_path: Path) -> None:
    table = dualbin.io.Table(np.zeros((3, 1), np.uint8), np.ones((3, 1), np.float32), 8)
    path = tmp_path / "table.safetensors"
    for tables, state, message in (
        ([table], None, "tables must be a dict of names to tables, got a list"),
        ({"a": table}, [], "state must be a dict of names to states, got a list"),
        ({"a": table}, {"a": None}, r"state\['a'\] must be a dict of names to arrays, got a NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            dualbin.io.save(path, tables, state)
    assert not path.exists()
