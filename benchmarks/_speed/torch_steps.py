"""Whole training steps of a table, as users know them: beside nn.Embedding with AdamW, and with SparseAdam."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import dualbin.torch as dbt
from _speed.cases import STEP, Case, Group
from _speed.timing import Call, Skip
from _speed.torch_inputs import ID_BYTES, TORCH_DTYPES, Inputs
from _speed.workloads import DTYPES, GRADIENTS, ID_SETS, UNIFORM, data_of, workloads
from dualbin.rules import Counter

#: weights of a table from which on a CPU has no peers: with gradient and moments they are four tables of float32
_MOST_ON_CPU = 2**27


def groups(device: str, small: bool) -> Iterator[Group]:
    for workload in workloads(device, small):
        if small or workload.law == UNIFORM:
            yield Group(str(workload), "fp32", _cases(Inputs(data_of(workload), TORCH_DTYPES["fp32"], device)))


def _cases(inputs: Inputs) -> list[Case]:
    size = inputs.workload
    floor = size.forward_bytes(DTYPES["fp32"], ID_BYTES) + size.update_bytes(DTYPES["fp32"], ID_BYTES, 8, inputs.unique)

    def ours() -> Call:
        table = inputs.table()
        return inputs.whole_step_of(table, dbt.XOR([table], rule=Counter(8)))

    def dense() -> Call:
        return _peer(inputs, sparse=False, optimizer=lambda weights: torch.optim.AdamW(weights, fused=True))

    def sparse() -> Call:
        return _peer(inputs, sparse=True, optimizer=torch.optim.SparseAdam)

    return [
        Case(STEP, "dualbin.torch, Counter(8)", floor, ours),
        Case(STEP, "nn.Embedding, AdamW", floor, dense, peer=True),
        Case(STEP, "nn.Embedding(sparse=True), SparseAdam", floor, sparse, peer=True),
    ]


def _peer(inputs: Inputs, *, sparse: bool, optimizer: Any) -> Call:
    rows, dim = inputs.shape
    if inputs.device == "cpu" and rows * dim > _MOST_ON_CPU:
        msg = f"{rows * dim * 16 / 1e9:.0f} GB of weights, gradient and moments"
        raise Skip(msg)
    module = nn.Embedding(rows, dim, sparse=sparse, device=inputs.device)
    trained, ids, gradients = optimizer(module.parameters()), inputs.ids, inputs.gradients

    def call(index: int) -> None:
        module(ids[index % ID_SETS]).backward(gradients[index % GRADIENTS])
        trained.step()
        trained.zero_grad()

    return call
