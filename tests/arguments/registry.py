"""Good arguments of every public function, class and method of dualbin: what :mod:`arguments.wrong` makes wrong."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

#: where tables and tensors lie
DEVICE = "cuda" if os.environ.get("DUALBIN_TEST_PLATFORM") == "cuda" else "cpu"

MODULES = ("dualbin", "dualbin.io", "dualbin.rules", "dualbin.torch", "dualbin.jax")

#: public, but not called with arguments of users, and why
NOT_CALLED = {
    "dualbin.io.State": "a type",
    "dualbin.io.Table": "a plain tuple, whose contents are checked where it is used",
    "dualbin.rules.CounterDefaults": "a plain tuple of the defaults",
    "dualbin.rules.Rule": "the base of the rules",
    "dualbin.rules.state_layout": "what the frontends ask, with numbers of a table",
    "dualbin.rules.state_spec": "as state_layout",
    "dualbin.torch.ConvertReport": "what convert returns",
    "dualbin.torch.PrefetchedIds": "what prefetch returns",
    "dualbin.torch.ShardedBinaryEmbedding": "tests/torch/test_sharded.py, which has process groups",
    "dualbin.torch.ShardedBinaryEmbeddingBag": "as ShardedBinaryEmbedding",
    "dualbin.torch.ShardedBinaryEmbeddingCollection": "as ShardedBinaryEmbedding",
    "dualbin.torch.prepare_ddp": "needs a process group: tests/torch/test_distributed.py",
    "dualbin.torch.sync_row_grads": "needs a process group: tests/torch/test_distributed.py",
    "dualbin.torch.BinaryEmbeddingForward": "an autograd function; its `apply` is here",
    "dualbin.jax.RowFlips": "what xor returns for optax.apply_updates",
    "dualbin.jax.RowSet": "what xor returns for optax.apply_updates",
    "dualbin.jax.TableState": "a tuple of arrays, checked where it is used",
    "dualbin.jax.XorState": "a tuple of states, checked where it is used",
    "dualbin.jax.param_labels": "takes any tree",
    "dualbin.jax.freeze_rows": "takes a callable or a tree of ids; what they are shows in update: tests/jax/test_freeze.py",
}

#: parts of classes that are for frameworks, or have no arguments to be wrong
INNER = {"forward": "BinaryEmbeddingForward", "backward": "BinaryEmbeddingForward"}


@dataclass(frozen=True)
class Entry:
    """A callable, fresh good arguments for it, and arguments that are not made wrong, with the reason."""

    call: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    free: tuple[str, ...] = ()


def public() -> Iterator[tuple[str, Any]]:
    """Name and object of everything public that is called."""
    import importlib

    for module in MODULES:
        found = importlib.import_module(module)
        names = getattr(found, "__all__", None) or [
            name for name, value in vars(found).items() if not name.startswith("_") and getattr(value, "__module__", "") == module
        ]
        for name in names:
            if name in {"BinaryEmbed", "NGramEmbed"} and not find_spec("flax"):
                continue
            value = getattr(found, name)
            if callable(value) and not inspect.ismodule(value):
                yield f"{module}.{name}", value


def arguments_of(call: Callable[..., Any]) -> list[str]:
    """The names of the arguments of a callable, without those that take any number."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, each in inspect.signature(call).parameters.items() if each.kind not in kinds and not name.startswith("_")]
