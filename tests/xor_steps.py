"""Tables, batches and steps that the tests of the PyTorch optimizer share."""

import torch
from torch import nn

import dualbin.torch as dbt


def make(rows=40, dim=20, seed=0):
    w = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(dbt.BinaryTable.from_float(w, padding_idx=rows - 1))


def batch(step, rows=40, dim=20, count=30):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, rows, (count,), generator=generator), torch.randn(count, dim, generator=generator)


def train(table, optimizer, steps):
    for step in steps:
        ids, dy = batch(step, *table.shape)
        dbt.lookup(table, ids).backward(dy)
        optimizer.step()
        optimizer.zero_grad()


def everything(table, optimizer):
    state = optimizer.state[table]
    arrays = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    return {"bits": table.bits.clone(), "scale": table.scale.clone(), **arrays}


def assert_same(a, b):
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name
