"""The tensors of a workload in one dtype, and dualbin's calls on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import dualbin.torch as dbt
from _speed.timing import Call
from _speed.workloads import GRADIENTS, ID_SETS, Data
from dualbin.rules import Rule

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ID_BYTES = 8  # int64, as nn.Embedding gets


class Model(torch.autograd.Function):
    """What lies between a lookup and a loss, in no time: the gradient is taken from a list, which then does not hold it any more."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradients = gradients
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _loss: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradients.pop(), None


class Inputs:
    """What calls of one workload and dtype start from.

    Attributes:
        workload, unique: the sizes, and how many distinct rows a call has.
        shape: (V, D).
        dtype: of rows and gradients.
        device: "cpu" or "cuda".
    """

    def __init__(self, data: Data, dtype: torch.dtype, device: str) -> None:
        self._data, self.dtype, self.device = data, dtype, device
        self.workload, self.unique = data.workload, data.unique
        self.shape = (data.workload.rows, data.workload.dim)

    @cached_property
    def ids(self) -> list[Tensor]:
        return [torch.from_numpy(ids).to(self.device) for ids in self._data.ids]

    @cached_property
    def gradients(self) -> list[Tensor]:
        blocks = [torch.from_numpy(block).to(self.device, self.dtype) for block in self._data.blocks]
        return [block.repeat(self._data.repeats, 1)[: self.workload.count].contiguous() for block in blocks]

    def table(self, planes: int = 1) -> torch.nn.Parameter:
        return dbt.BinaryEmbedding(*self.shape, device=self.device, dtype=self.dtype, planes=planes).weight

    def dense(self) -> Tensor:
        return torch.randn(self.shape, dtype=self.dtype, device=self.device)

    def output(self) -> Tensor:
        return torch.empty(self.workload.count, self.shape[1], dtype=self.dtype, device=self.device)

    def lookup(self, planes: int = 1) -> Call:
        table, ids = self.table(planes), self.ids
        return without_gradients(lambda index: dbt.lookup(table, ids[index % ID_SETS]))

    def lookup_into(self) -> Call:
        table, ids, out = self.table(), self.ids, self.output()
        return without_gradients(lambda index: dbt.lookup(table, ids[index % ID_SETS], out=out))

    def step(self, rule: Rule, planes: int = 1) -> Call:
        table = self.table(planes)
        return self.step_of(table, dbt.XOR([table], rule=rule))

    def step_of(self, table: torch.nn.Parameter, xor: dbt.XOR) -> Call:
        """An update from the rows of the gradient on; that a backward pass makes an object of them is no part of it."""
        grads = [dbt.RowGrad(ids, self.gradients[index % GRADIENTS], table.shape) for index, ids in enumerate(self.ids)]

        def call(index: int) -> None:
            table.grad = grads[index % ID_SETS]
            xor.step()

        return call

    def whole_step_of(self, table: torch.nn.Parameter, xor: dbt.XOR) -> Call:
        """Forward, backward and update as in a model, whose backward pass gives a gradient that nobody else holds."""
        ids, gradients = self.ids, [rows.clone() for rows in self.gradients]

        def call(index: int) -> None:
            Model.apply(dbt.lookup(table, ids[index % ID_SETS]), gradients).backward()
            gradients.insert(0, table.grad.rows)
            xor.step()
            xor.zero_grad()

        return call


def without_gradients(call: Callable[[int], Any]) -> Call:
    return torch.no_grad()(call)
