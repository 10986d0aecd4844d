"""One-bit embedding tables for JAX: functional, and at home in optax.

```
params = {"emb": dbj.BinaryTable.create(jax.random.key(0), V, D), "head": ...}
tx = optax.partition({"dense": optax.adam(3e-3), "table": dbj.xor(1.0)}, dbj.param_labels)
loss, grads = dbj.value_and_grad(loss_fn, ids=lambda params, batch: {"emb": batch["ids"]})(params, batch)
updates, state = tx.update(grads, state, params)
params = optax.apply_updates(params, updates)
```

Jit the step and donate the parameters and the state: then the bits change in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

try:
    import jax as _jax
except ImportError as error:
    _MESSAGE = "dualbin.jax needs jax: pip install 'jax>=0.10' 'optax>=0.2.4'"
    raise ImportError(_MESSAGE) from error

from dualbin._backends import register_frontend as _register_frontend
from dualbin.jax import _ffi
from dualbin.jax._active import activate
from dualbin.jax._attend import attend
from dualbin.jax._average import average
from dualbin.jax._bag import lookup_bag
from dualbin.jax._flax import register_serialization as _register_serialization
from dualbin.jax._freeze import freeze_rows
from dualbin.jax._grad import accumulate, grad, value_and_grad
from dualbin.jax._grow import grow
from dualbin.jax._interop import check_errors, export_state, from_torch, import_state, read_stats
from dualbin.jax._legacy import sparse_update_embedding_qweight
from dualbin.jax._ngram import ngram_rows
from dualbin.jax._optim import XorState, xor, xor_update
from dualbin.jax._placement import partition_specs
from dualbin.jax._rowgrad import RowGrad, add
from dualbin.jax._state import TableState, init_state
from dualbin.jax._table import BinaryTable, lookup
from dualbin.jax._updates import RowFlips, RowSet, param_labels


def _info() -> dict[str, object]:
    """This frontend's entry in `dualbin.backends()`."""
    try:
        handlers = list(_ffi.register())
        platform = _jax.default_backend()
        fallbacks = [] if _ffi.is_native() else [f"no native handlers for the platform {platform!r}: tables run in jax.numpy there"]
    except ImportError as error:
        handlers, fallbacks = [], [str(error)]
    return {"jax": _jax.__version__, "handlers": handlers, "fallbacks": fallbacks}


_ffi.check_has_handlers()
_register_frontend("jax", _info)
_register_serialization()

if _TYPE_CHECKING:
    from dualbin.jax._nnx import BinaryEmbed
    from dualbin.jax._nnx_ngram import NGramEmbed


def __getattr__(name: str) -> object:
    if name == "BinaryEmbed":  # it needs flax, which the rest does not
        from dualbin.jax._nnx import BinaryEmbed  # noqa: PLC0415

        return BinaryEmbed
    if name == "NGramEmbed":
        from dualbin.jax._nnx_ngram import NGramEmbed  # noqa: PLC0415

        return NGramEmbed
    msg = f"module 'dualbin.jax' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BinaryEmbed",
    "BinaryTable",
    "NGramEmbed",
    "RowFlips",
    "RowGrad",
    "RowSet",
    "TableState",
    "XorState",
    "accumulate",
    "activate",
    "add",
    "attend",
    "average",
    "check_errors",
    "export_state",
    "freeze_rows",
    "from_torch",
    "grad",
    "grow",
    "import_state",
    "init_state",
    "lookup",
    "lookup_bag",
    "ngram_rows",
    "param_labels",
    "partition_specs",
    "read_stats",
    "sparse_update_embedding_qweight",
    "value_and_grad",
    "xor",
    "xor_update",
]
