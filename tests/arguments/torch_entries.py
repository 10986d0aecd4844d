"""Entries of `dualbin.torch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dualbin.torch as dbt
from arguments.registry import DEVICE, Entry
from dualbin import NGrams
from dualbin.rules import Counter

V, D = 11, 13
W = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).to(DEVICE)
IDS = torch.arange(4, device=DEVICE)


def generator() -> torch.Generator:
    return torch.Generator(DEVICE)


def table(planes: int = 1) -> Any:
    return nn.Parameter(dbt.BinaryTable.from_float(W, planes=planes))


def gradient() -> Any:
    return dbt.RowGrad(IDS, torch.ones(4, D, device=DEVICE), (V, D))


def trained(tables: Any = None) -> Any:
    tables = [table()] if tables is None else tables
    optimizer = dbt.XOR(tables)
    for each in tables:
        each.grad = gradient()
    optimizer.step()
    return optimizer


def first(optimizer: Any) -> Any:
    return optimizer.param_groups[0]["params"][0]


def arrays() -> dict[str, Any]:
    made = dbt.BinaryTable.from_float(W, planes=2)
    return {"bits": made.bits, "scale": made.scale, "dim": D, "dtype": torch.float32, "planes": 2, "first_row": 3}


def embedding() -> dict[str, Any]:
    options = {"padding_idx": 2, "device": DEVICE, "dtype": torch.float32, "generator": generator(), "scale": 0.3, "spread": 0.5}
    return {"num_embeddings": V, "embedding_dim": D, **options, "planes": 1}


def with_offsets() -> dict[str, Any]:
    return {"input": IDS, "offsets": torch.tensor([0, 2], device=DEVICE), "per_sample_weights": torch.ones(4, device=DEVICE)}


def from_module(kind: type[nn.Module]) -> Any:
    return kind(V, D, device=DEVICE)


def packed() -> dict[str, Any]:
    made = dbt.BinaryTable.from_float(W)
    return {"qweight": made.bits, "grad_weight": made.bits.clone(), "active_indices": torch.tensor([1, 3], device=DEVICE)}


def legacy() -> dict[str, Any]:
    made = dbt.BinaryTable.from_float(W)
    return {"input": IDS, "qweight": made.bits, "embed_scale": made.scale, "ori_embedding_dim": D, "is_train": True}


def method(kind: Any, name: str, make: Any) -> Any:
    """The method as a function whose first argument is made anew with every call."""
    import functools

    function = getattr(kind, name)

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        return function(make(), **arguments)

    import inspect

    signature = inspect.signature(function)
    call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return call


def optimizer_with_state() -> dict[str, Any]:
    optimizer = trained()
    mine = first(optimizer)
    return {"states": optimizer.export_state({"t": mine}), "names": {"t": mine}}


def import_state(states: Any, names: Any) -> None:
    optimizer = dbt.XOR([table()])
    mine = first(optimizer)
    if isinstance(names, dict) and set(names) == {"t"} and isinstance(names["t"], dbt.BinaryTable):
        names = {"t": mine}
    optimizer.import_state(states, names)


def checkpoint() -> dict[str, Any]:
    module = from_module(dbt.BinaryEmbedding)
    return {"module": module, "optimizer": dbt.XOR([module.weight])}


def growing() -> dict[str, Any]:
    module = from_module(dbt.BinaryEmbedding)
    return {
        "module": module,
        "num_embeddings": V + 2,
        "optimizer": trained([module.weight]),
        "values": torch.ones(2, D, device=DEVICE),
        "generator": generator(),
    }


def of_jax() -> Any:
    import jax

    import dualbin.jax as dbj

    return dbj.BinaryTable.create(jax.random.key(0), V, D)


NGRAMS = NGrams(1000, (2, 3), 2, boundary=3)
MEMORY = {"orders": (2, 3), "heads": 4, "boundary": 6, "seed": 5, "projection": 9}


def text() -> dict[str, Any]:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=DEVICE)
    return {"ids": ids, "context": torch.tensor([[-1, 7], [1, 2]], device=DEVICE), "starts": ids == 5}


def memory() -> dbt.NGramEmbedding:
    return dbt.NGramEmbedding(1000, D, device=DEVICE)


def memory_options() -> dict[str, Any]:
    return {
        "num_embeddings": 100,
        "embedding_dim": D,
        **MEMORY,
        "device": DEVICE,
        "dtype": torch.float32,
        "generator": generator(),
        "scale": 0.3,
        "spread": 0.5,
        "planes": 2,
    }


XOR_OPTIONS = {"lr": 1.0, "rule": Counter(8), "scale_lr": 3e-3, "seed": 3, "capturable": False}
PRETRAINED = {"freeze": True, "padding_idx": 2, "planes": 1}

ENTRIES = {
    "XOR": Entry(dbt.XOR, lambda: {"params": [table()], **XOR_OPTIONS, "shard_state": False}),
    "XOR.add_param_group": Entry(method(dbt.XOR, "add_param_group", trained), lambda: {"param_group": {"params": [table()]}}),
    "XOR.step": Entry(method(dbt.XOR, "step", trained), lambda: {"closure": lambda: 1.0}),
    "XOR.stats": Entry(method(dbt.XOR, "stats", trained), lambda: {"table": None}),
    "XOR.load_state_dict": Entry(method(dbt.XOR, "load_state_dict", trained), lambda: {"state_dict": trained().state_dict()}),
    "XOR.export_state": Entry(method(dbt.XOR, "export_state", trained), lambda: {"names": None}),
    "XOR.import_state": Entry(import_state, optimizer_with_state),
    "BinaryTable": Entry(dbt.BinaryTable, arrays),
    "BinaryTable.from_float": Entry(dbt.BinaryTable.from_float, lambda: {"w": W.clone(), "padding_idx": 2, "planes": 2}),
    "BinaryTable.with_planes": Entry(method(dbt.BinaryTable, "with_planes", lambda: table(2)), lambda: {"planes": 1, "rescale": True}),
    "BinaryTable.dequantize": Entry(method(dbt.BinaryTable, "dequantize", table), lambda: {"dtype": torch.float32}),
    "BinaryTable.requires_grad_": Entry(method(dbt.BinaryTable, "requires_grad_", table), lambda: {"requires_grad": True}),
    "BinaryEmbedding": Entry(dbt.BinaryEmbedding, lambda: {**embedding(), "projection": 5}),
    "BinaryEmbedding.from_float": Entry(
        dbt.BinaryEmbedding.from_float,
        lambda: {"embedding": from_module(nn.Embedding), "padding_idx": 2, "projection": 5, "generator": generator(), "planes": 1},
    ),
    "BinaryEmbedding.from_pretrained": Entry(
        dbt.BinaryEmbedding.from_pretrained,
        lambda: {"embeddings": W.clone(), **PRETRAINED, "projection": 5, "generator": generator()},
    ),
    "BinaryEmbedding.forward": Entry(
        method(dbt.BinaryEmbedding, "forward", lambda: from_module(dbt.BinaryEmbedding)), lambda: {"input": IDS}
    ),
    "BinaryEmbedding.reset_parameters": Entry(
        method(dbt.BinaryEmbedding, "reset_parameters", lambda: from_module(dbt.BinaryEmbedding)), lambda: {"generator": generator()}
    ),
    "BinaryEmbeddingBag": Entry(dbt.BinaryEmbeddingBag, lambda: {**embedding(), "mode": "sum", "include_last_offset": False}),
    "BinaryEmbeddingBag.from_float": Entry(
        dbt.BinaryEmbeddingBag.from_float, lambda: {"bag": from_module(nn.EmbeddingBag), "mode": "sum", "padding_idx": 2, "planes": 1}
    ),
    "BinaryEmbeddingBag.from_pretrained": Entry(
        dbt.BinaryEmbeddingBag.from_pretrained,
        lambda: {"embeddings": W.clone(), **PRETRAINED, "mode": "sum", "include_last_offset": False},
    ),
    "BinaryEmbeddingBag.forward": Entry(
        method(dbt.BinaryEmbeddingBag, "forward", lambda: dbt.BinaryEmbeddingBag(V, D, mode="sum", device=DEVICE)), with_offsets
    ),
    "BinaryEmbeddingForward.apply": Entry(dbt.BinaryEmbeddingForward.apply, legacy),
    "RowGrad": Entry(dbt.RowGrad, lambda: {"ids": IDS, "rows": torch.ones(4, D, device=DEVICE), "shape": (V, D)}),
    "XORCheckpoint": Entry(dbt.XORCheckpoint, checkpoint),
    "average": Entry(dbt.average, lambda: {"a": table(), "b": table(), "weight": 0.5, "step": 3, "seed": 4}),
    "check_errors": Entry(dbt.check_errors, dict),
    "convert": Entry(dbt.convert, lambda: {"model": nn.Sequential(from_module(nn.Embedding)), "min_rows": 1, "planes": 1}),
    "freeze_rows": Entry(dbt.freeze_rows, lambda: {"module": from_module(dbt.BinaryEmbedding), "ids": IDS[1:3]}),
    "unfreeze_rows": Entry(dbt.unfreeze_rows, lambda: {"module": from_module(dbt.BinaryEmbedding), "ids": IDS[1:3]}),
    "from_jax": Entry(dbt.from_jax, lambda: {"table": of_jax(), "copy": True}),
    "grow": Entry(dbt.grow, growing),
    "lookup": Entry(
        dbt.lookup,
        lambda: {"table": table().detach(), "ids": IDS, "dtype": torch.float32, "out": torch.zeros(4, D, device=DEVICE)},
    ),
    "sparse_update_embedding_qweight": Entry(dbt.sparse_update_embedding_qweight, packed),
    "NGramEmbedding": Entry(dbt.NGramEmbedding, memory_options),
    "NGramEmbedding.from_embedding": Entry(
        dbt.NGramEmbedding.from_embedding,
        lambda: {"embed": dbt.BinaryEmbedding(100, D, device=DEVICE), **MEMORY, "generator": generator()},
    ),
    "NGramEmbedding.forward": Entry(method(dbt.NGramEmbedding, "forward", memory), text),
    "NGramEmbedding.next_context": Entry(method(dbt.NGramEmbedding, "next_context", memory), text),
    "ngram_rows": Entry(dbt.ngram_rows, lambda: {**text(), "ngrams": NGRAMS}),
}
