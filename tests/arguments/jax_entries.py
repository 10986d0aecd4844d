"""Entries of `dualbin.jax`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dualbin.jax as dbj
from arguments.registry import Entry
from dualbin import NGrams
from dualbin.rules import Counter

V, D = 11, 13
W = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
TABLE = dbj.BinaryTable.from_float(W)
STATE = dbj.init_state(TABLE)
IDS = jnp.arange(4)
ROWS = jnp.ones((4, D))


def table(planes: int = 1) -> Any:
    return TABLE if planes == 1 else dbj.BinaryTable.from_float(W, planes=planes)


def arrays() -> dict[str, Any]:
    made = table(2)
    return {"bits": np.asarray(made.bits), "scale": np.asarray(made.scale), "dim": D, "planes": 2, "axis": None}


def bags() -> dict[str, Any]:
    options = {"num_segments": 3, "mode": "sum", "weights": jnp.ones(4), "dtype": jnp.float32, "padding_idx": 2}
    return {"table": table(), "ids": IDS, "segment_ids": jnp.array([0, 0, 1, 2]), **options}


def loss(params: Any, batch: Any) -> Any:
    return dbj.lookup(params["t"], batch).sum()


def differentiated(transform: Any) -> Any:
    """The transformation, and one call of what it returns."""
    import functools
    import inspect

    @functools.wraps(transform)
    def call(**arguments: Any) -> Any:
        return transform(**arguments)({"t": table()}, IDS)

    call.__signature__ = inspect.signature(transform)  # type: ignore[attr-defined]
    return call


def of_loss() -> dict[str, Any]:
    return {"loss_fn": loss, "ids": lambda _, batch: {"t": batch}, "capacity": None, "checked": False}


def updating() -> dict[str, Any]:
    rates = {"learning_rate": 1.0, "rule": Counter(8), "scale_lr": 3e-3, "seed": 3}
    return {"table": table(), "ids": IDS, "dy": ROWS, "state": STATE, **rates}


def growing() -> dict[str, Any]:
    return {"table": table(), "rows": V + 2, "key": jax.random.key(0), "state": STATE, "values": None, "spread": 0.5}


def exported() -> dict[str, Any]:
    state = {"t": STATE}
    return {"opt_state": state, "exported": dbj.export_state(state), "rule": Counter(8)}


def packed() -> dict[str, Any]:
    return {"qweight": table().bits, "grad_weight": table().bits, "active_indices": jnp.array([1, 3])}


def of_torch() -> Any:
    import torch

    import dualbin.torch as dbt

    return dbt.BinaryTable.from_float(torch.from_numpy(W))


def embed(num_embeddings: Any, features: Any, rngs: Any, **options: Any) -> Any:
    return dbj.BinaryEmbed(num_embeddings, features, **options, rngs=rngs)


def embedding() -> dict[str, Any]:
    from flax import nnx

    options = {"dtype": jnp.float32, "scale": 0.3, "padding_idx": 2, "spread": 0.5, "planes": 1, "projection": 5}
    return {"num_embeddings": V, "features": D, **options, "rngs": nnx.Rngs(0)}


def attend(query: Any) -> Any:
    from flax import nnx

    return dbj.BinaryEmbed(V, D, rngs=nnx.Rngs(0)).attend(query)


def memory(num_embeddings: Any, features: Any, rngs: Any, **options: Any) -> Any:
    return dbj.NGramEmbed(num_embeddings, features, **options, rngs=rngs)


def memory_options() -> dict[str, Any]:
    from flax import nnx

    hashed = {"orders": (2, 3), "heads": 4, "boundary": 6, "seed": 5, "projection": 9}
    options = {"dtype": jnp.float32, "scale": 0.3, "spread": 0.5, "planes": 2}
    return {"num_embeddings": 100, "features": D, **hashed, **options, "rngs": nnx.Rngs(0)}


def text() -> dict[str, Any]:
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    return {"ids": ids, "ngrams": NGrams(1000, (2, 3), 2, boundary=3), "context": jnp.array([[-1, 7], [1, 2]]), "starts": ids == 5}


CREATE = {"V": V, "D": D, "scale": 0.3, "padding_idx": 2, "spread": 0.5, "planes": 1}

ENTRIES = {
    "BinaryTable": Entry(dbj.BinaryTable, arrays, free=("axis",)),  # a name, which only a mesh can tell to be wrong
    "BinaryTable.create": Entry(dbj.BinaryTable.create, lambda: {"key": jax.random.key(0), **CREATE}),
    "BinaryTable.from_float": Entry(dbj.BinaryTable.from_float, lambda: {"w": W.copy(), "padding_idx": 2, "planes": 2}),
    "BinaryTable.dequantize": Entry(lambda dtype: table().dequantize(dtype), lambda: {"dtype": jnp.float32}),
    "BinaryTable.with_planes": Entry(
        lambda planes, rescale: table(2).with_planes(planes, rescale=rescale), lambda: {"planes": 1, "rescale": True}
    ),
    "RowGrad": Entry(dbj.RowGrad, lambda: {"ids": IDS, "rows": ROWS, "num_rows": V}),
    "accumulate": Entry(differentiated(dbj.accumulate), lambda: {**of_loss(), "micro_batches": 2}),
    "activate": Entry(dbj.activate, lambda: {"table": table(), "ids": IDS, "capacity": 4}),
    "add": Entry(dbj.add, lambda: {"a": dbj.RowGrad(IDS, ROWS, V), "b": dbj.RowGrad(IDS, ROWS, V)}),
    "attend": Entry(dbj.attend, lambda: {"table": table(), "query": jnp.ones((3, D))}),
    "average": Entry(dbj.average, lambda: {"a": table(), "b": table(), "weight": 0.5, "step": 3, "seed": 4}),
    "check_errors": Entry(dbj.check_errors, lambda: {"opt_state": {"t": STATE}}),
    "export_state": Entry(dbj.export_state, lambda: {"opt_state": {"t": STATE}, "rule": Counter(8)}),
    "from_torch": Entry(dbj.from_torch, lambda: {"table": of_torch(), "copy": True}),
    "grad": Entry(differentiated(dbj.grad), lambda: {**of_loss(), "has_aux": False}),
    "grow": Entry(dbj.grow, growing),
    "import_state": Entry(dbj.import_state, exported),
    "init_state": Entry(dbj.init_state, lambda: {"table": table(), "rule": Counter(8, every=2), "scale_lr": 3e-3, "pending_rows": 5}),
    "lookup": Entry(dbj.lookup, lambda: {"table": table(), "ids": IDS, "dtype": jnp.float32}),
    "lookup_bag": Entry(dbj.lookup_bag, bags),
    "partition_specs": Entry(dbj.partition_specs, lambda: {"tree": {"t": table()}, "axis": None}, free=("tree", "axis")),
    "read_stats": Entry(dbj.read_stats, lambda: {"opt_state": {"t": STATE}}),
    "sparse_update_embedding_qweight": Entry(dbj.sparse_update_embedding_qweight, packed),
    "value_and_grad": Entry(differentiated(dbj.value_and_grad), lambda: {**of_loss(), "has_aux": False}),
    "xor": Entry(dbj.xor, lambda: {"learning_rate": 1.0, "rule": Counter(8, every=2), "scale_lr": 3e-3, "seed": 3, "pending_rows": 5}),
    "ngram_rows": Entry(dbj.ngram_rows, text),
    "xor_update": Entry(dbj.xor_update, updating),
}
if find_spec("flax"):
    ENTRIES["NGramEmbed"] = Entry(memory, memory_options)
    ENTRIES["BinaryEmbed"] = Entry(embed, embedding)
    ENTRIES["BinaryEmbed.attend"] = Entry(attend, lambda: {"query": jnp.ones((3, D))})
