"""The PyTorch side: dualbin.torch and what else there is in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dualbin.torch as dbt
from _speed.timing import Call, Clock, CpuClock, TorchCudaClock
from _speed.workloads import DTYPES, FORWARD, FORWARD_OUT, GRADIENTS, ID_SETS, UPDATE, Case, Data
from dualbin.rules import Counter

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ID_BYTES = 8  # int64, as nn.Embedding gets
_PLANES = 4  # of the table with several


def start(device: str) -> str:
    """Check the device and return its name ("" for a CPU)."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        msg = "PyTorch finds no GPU"
        raise RuntimeError(msg)
    return torch.cuda.get_device_name()


def clock(device: str, copy_bytes: int) -> Clock:
    if device == "cuda":
        return TorchCudaClock(copy_bytes)
    source = torch.zeros(copy_bytes // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return CpuClock(lambda _: target.copy_(source), copy_bytes, lambda _: None)


def release() -> None:
    """Give memory that nothing uses back to the device, for the other framework."""
    torch.cuda.empty_cache()
    torch.compiler.reset()


def cases(data: Data, dtype: str, device: str) -> list[Case]:
    inputs = _Inputs(data, _DTYPES[dtype], device)
    size = data.workload
    forward = size.forward_bytes(DTYPES[dtype], _ID_BYTES)
    planes = size.forward_bytes(DTYPES[dtype], _ID_BYTES, _PLANES)
    update = {bits: size.update_bytes(DTYPES[dtype], _ID_BYTES, bits, data.unique) for bits in (8, 1)}
    return [
        Case(FORWARD, "dualbin.torch.lookup", forward, inputs.lookup),
        Case(FORWARD, f"dualbin.torch.lookup, {_PLANES} planes", planes, lambda: inputs.lookup(_PLANES)),
        Case(FORWARD, "F.embedding", forward, inputs.embedding, peer=True),
        Case(FORWARD, "packed gather + unpack, torch.compile", forward, inputs.compiled, peer=True),
        Case(FORWARD_OUT, "dualbin.torch.lookup(out=)", forward, inputs.lookup_into),
        Case(FORWARD_OUT, "torch.index_select(out=)", forward, inputs.index_select, peer=True),
        Case(UPDATE, "dualbin.torch.XOR.step, Counter(8)", update[8], lambda: inputs.step(Counter(8))),
        Case(UPDATE, "dualbin.torch.XOR.step, Counter(1)", update[1], lambda: inputs.step(Counter(1))),
        Case(UPDATE, f"dualbin.torch.XOR.step, Counter(8), {_PLANES} planes", update[8], lambda: inputs.step(Counter(8), _PLANES)),
        Case(UPDATE, "embedding_dense_backward (no update)", update[1], inputs.dense_backward, peer=True),
        Case(UPDATE, "sparse gradient, coalesce, SGD step", update[1], inputs.sparse_step, peer=True),
    ]


class _Inputs:
    """The tensors of a workload in one dtype, and the calls on them."""

    def __init__(self, data: Data, dtype: torch.dtype, device: str) -> None:
        self._data, self._dtype, self._device = data, dtype, device
        self._shape = (data.workload.rows, data.workload.dim)

    @cached_property
    def ids(self) -> list[Tensor]:
        return [torch.from_numpy(ids).to(self._device) for ids in self._data.ids]

    @cached_property
    def gradients(self) -> list[Tensor]:
        blocks = [torch.from_numpy(block).to(self._device, self._dtype) for block in self._data.blocks]
        return [block.repeat(self._data.repeats, 1)[: self._data.workload.count].contiguous() for block in blocks]

    def table(self, planes: int = 1) -> torch.nn.Parameter:
        bits, scale = (torch.from_numpy(array).to(self._device, copy=True) for array in (self._data.bits(planes), self._data.scale))
        return torch.nn.Parameter(dbt.BinaryTable(bits, scale, self._shape[1], self._dtype, planes=planes))

    def dense(self) -> Tensor:
        return torch.randn(self._shape, dtype=self._dtype, device=self._device)

    def output(self) -> Tensor:
        return torch.empty(self._data.workload.count, self._shape[1], dtype=self._dtype, device=self._device)

    # ---- forward -----------------------------------------------------------------------------------------------------------------------

    def lookup(self, planes: int = 1) -> Call:
        table, ids = self.table(planes), self.ids
        return _no_grad(lambda index: dbt.lookup(table, ids[index % ID_SETS]))

    def lookup_into(self) -> Call:
        table, ids, out = self.table(), self.ids, self.output()
        return _no_grad(lambda index: dbt.lookup(table, ids[index % ID_SETS], out=out))

    def embedding(self) -> Call:
        dense, ids = self.dense(), self.ids
        return _no_grad(lambda index: F.embedding(ids[index % ID_SETS], dense))

    def index_select(self) -> Call:
        dense, ids, out = self.dense(), self.ids, self.output()
        return _no_grad(lambda index: torch.index_select(dense, 0, ids[index % ID_SETS], out=out))

    def compiled(self) -> Call:
        table, ids, dim, dtype = self.table(), self.ids, self._shape[1], self._dtype
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
        return _no_grad(lambda index: function(bits, scale, ids[index % ID_SETS]))

    # ---- backward and update -----------------------------------------------------------------------------------------------------------

    def step(self, rule: Counter, planes: int = 1) -> Call:
        table, ids, gradients = self.table(planes), self.ids, self.gradients
        xor = dbt.XOR([table], rule=rule)

        def call(index: int) -> None:
            table.grad = dbt.RowGrad(ids[index % ID_SETS], gradients[index % GRADIENTS], table.shape)
            xor.step()

        return call

    def dense_backward(self) -> Call:
        ids, gradients, rows = self.ids, self.gradients, self._shape[0]
        backward = torch.ops.aten.embedding_dense_backward
        return _no_grad(lambda index: backward(gradients[index % GRADIENTS], ids[index % ID_SETS], rows, -1, False))

    def sparse_step(self) -> Call:
        weight, ids, gradients = torch.nn.Parameter(self.dense()), self.ids, self.gradients
        sgd = torch.optim.SGD([weight], lr=1e-3)

        def call(index: int) -> None:
            rows = gradients[index % GRADIENTS]
            grad = torch.sparse_coo_tensor(ids[index % ID_SETS].unsqueeze(0), rows, weight.shape, check_invariants=False)
            weight.grad = grad.coalesce()
            sgd.step()

        return call


def _no_grad(call: Callable[[int], Any]) -> Call:
    return torch.no_grad()(call)
