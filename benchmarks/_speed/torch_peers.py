"""What else there is in PyTorch: lookups and updates of dense tables, packed tables in eager code under its compiler, and FBGEMM's."""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dualbin.torch as dbt
from _speed.timing import Call
from _speed.torch_inputs import Inputs, without_gradients
from _speed.workloads import GRADIENTS, ID_SETS

#: whether FBGEMM is there; nothing of dualbin needs it
HAS_FBGEMM = find_spec("fbgemm_gpu") is not None

_RATE, _EPSILON = 1e-3, 1e-10


class Peers:
    """Calls on the tensors of `inputs`."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    # ---- forward -----------------------------------------------------------------------------------------------------------------------

    def embedding(self) -> Call:
        dense, ids = self._inputs.dense(), self._inputs.ids
        return without_gradients(lambda index: F.embedding(ids[index % ID_SETS], dense))

    def index_select(self) -> Call:
        dense, ids, out = self._inputs.dense(), self._inputs.ids, self._inputs.output()
        return without_gradients(lambda index: torch.index_select(dense, 0, ids[index % ID_SETS], out=out))

    def compiled(self) -> Call:
        table, ids, dim, dtype = self._inputs.table(), self._inputs.ids, self._inputs.shape[1], self._inputs.dtype
        bits, scale = table.bits, table.scale

        def gather(bits: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
            places = torch.arange(8, dtype=torch.uint8, device=bits.device)
            signs = (bits[ids].unsqueeze(-1) >> places & 1).flatten(1)[:, :dim]
            row_scale = scale[ids]
            return torch.where(signs != 0, row_scale, -row_scale).to(dtype)

        function = torch.compile(gather, dynamic=False, fullgraph=True)
        with torch.no_grad():
            if not torch.equal(function(bits, scale, ids[0]), dbt.lookup(table, ids[0])):
                msg = "does not give the rows of dualbin.torch.lookup"
                raise RuntimeError(msg)
        return without_gradients(lambda index: function(bits, scale, ids[index % ID_SETS]))

    # ---- backward and update -----------------------------------------------------------------------------------------------------------

    def dense_backward(self) -> Call:
        ids, gradients, rows = self._inputs.ids, self._inputs.gradients, self._inputs.shape[0]
        backward = torch.ops.aten.embedding_dense_backward
        return without_gradients(lambda index: backward(gradients[index % GRADIENTS], ids[index % ID_SETS], rows, -1, False))

    def sparse_sgd(self) -> Call:
        weight = torch.nn.Parameter(self._inputs.dense())
        sgd = torch.optim.SGD([weight], lr=_RATE)

        def call(index: int) -> None:
            weight.grad = self._sparse(index).coalesce()
            sgd.step()

        return call

    def sparse_adam(self) -> Call:
        weight = torch.nn.Parameter(self._inputs.dense())
        adam = torch.optim.SparseAdam([weight], lr=_RATE)

        def call(index: int) -> None:
            weight.grad = self._sparse(index)  # which it coalesces itself
            adam.step()

        return call

    def row_wise_adagrad(self) -> Call:
        """One sum of squares a row, as recommenders train their tables."""
        weight, squares = self._inputs.dense(), torch.zeros(self._inputs.shape[0], device=self._inputs.device)

        def call(index: int) -> None:
            grad = self._sparse(index).coalesce()
            ids, rows = grad.indices()[0], grad.values()
            squares.index_add_(0, ids, rows.float().square().mean(1))
            step = squares[ids].sqrt_().add_(_EPSILON).reciprocal_().mul_(-_RATE)
            weight.index_add_(0, ids, rows * step.to(rows.dtype).unsqueeze(1))

        return without_gradients(call)

    def _sparse(self, index: int) -> Tensor:
        ids, rows = self._inputs.ids[index % ID_SETS].unsqueeze(0), self._inputs.gradients[index % GRADIENTS]
        return torch.sparse_coo_tensor(ids, rows, self._inputs.shape, check_invariants=False)

    # ---- FBGEMM ------------------------------------------------------------------------------------------------------------------------

    def fbgemm_lookup(self) -> Call:
        module, offsets, ids = *self._fbgemm, self._inputs.ids
        return without_gradients(lambda index: module(ids[index % ID_SETS], offsets))

    def fbgemm_backward(self) -> Call:
        """The backward pass, of which the update is a part."""
        module, offsets = self._fbgemm
        rows, gradients = [module(ids, offsets) for ids in self._inputs.ids], self._inputs.gradients
        return lambda index: rows[index % ID_SETS].backward(gradients[index % GRADIENTS], retain_graph=True)

    @cached_property
    def _fbgemm(self) -> tuple[Any, Tensor]:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

        cuda = self._inputs.device == "cuda"
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        kind = SparseType.from_dtype(self._inputs.dtype)
        module = SplitTableBatchedEmbeddingBagsCodegen(
            [(*self._inputs.shape, *place)],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            pooling_mode=PoolingMode.NONE,
            learning_rate=_RATE,
            weights_precision=kind,
            output_dtype=kind,
            device=torch.device(self._inputs.device),
        )
        return module, torch.arange(self._inputs.ids[0].numel() + 1, device=self._inputs.device)
