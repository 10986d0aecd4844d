"""The PyTorch frontend of dualbin: binary embedding tables on stock PyTorch.

`BinaryEmbedding` stands where nn.Embedding stood, and `XOR` next to the optimizer of the other parameters.
"""

import importlib

try:
    import torch as _torch  # noqa: F401  (to say what to install where it is missing)
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    _MESSAGE = "dualbin.torch needs PyTorch: pip install 'torch>=2.11'"
    raise ImportError(_MESSAGE) from error

from dualbin._errors import check_errors
from dualbin.torch import _row_grad_ops as _row_grad_ops  # registers what operations do with row gradients
from dualbin.torch import _table_ops as _table_ops  # and with tables
from dualbin.torch import _table_parts as _table_parts
from dualbin.torch._average import average
from dualbin.torch._bag import BinaryEmbeddingBag
from dualbin.torch._checkpoint import XORCheckpoint
from dualbin.torch._convert import ConvertReport, convert
from dualbin.torch._distributed import prepare_ddp, sync_row_grads
from dualbin.torch._freeze import freeze_rows, unfreeze_rows
from dualbin.torch._grow import grow
from dualbin.torch._info import register as _register
from dualbin.torch._interop import from_jax
from dualbin.torch._legacy import BinaryEmbeddingForward, sparse_update_embedding_qweight
from dualbin.torch._module import BinaryEmbedding
from dualbin.torch._ngram import ngram_rows
from dualbin.torch._ngram_module import NGramEmbedding
from dualbin.torch._ops import lookup
from dualbin.torch._optim import XOR
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._sharded import PrefetchedIds, ShardedBinaryEmbedding
from dualbin.torch._sharded_bag import ShardedBinaryEmbeddingBag
from dualbin.torch._sharded_collection import ShardedBinaryEmbeddingCollection
from dualbin.torch._table import BinaryTable

_register()


def __getattr__(name: str) -> object:
    if name == "hf":  # imports transformers, which takes a second
        return importlib.import_module("dualbin.torch.hf")
    msg = f"module 'dualbin.torch' has no attribute {name!r}"
    raise AttributeError(msg)


__all__ = [
    "XOR",
    "BinaryEmbedding",
    "BinaryEmbeddingBag",
    "BinaryEmbeddingForward",
    "BinaryTable",
    "ConvertReport",
    "NGramEmbedding",
    "PrefetchedIds",
    "RowGrad",
    "ShardedBinaryEmbedding",
    "ShardedBinaryEmbeddingBag",
    "ShardedBinaryEmbeddingCollection",
    "XORCheckpoint",
    "average",
    "check_errors",
    "convert",
    "freeze_rows",
    "from_jax",
    "grow",
    "lookup",
    "ngram_rows",
    "prepare_ddp",
    "sparse_update_embedding_qweight",
    "sync_row_grads",
    "unfreeze_rows",
]
