"""Fixtures of the PyTorch tests."""

import pytest
import torch

import dualbin.torch as dbt


@pytest.fixture(autouse=True)
def _seeded():
    """Same random numbers in every test, and one thread: on a busy machine torch's threads wait for each other for most of the time."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def table():
    """A trainable table of 40 rows and 20 columns (4 padding bits), whose row 39 is a padding row."""
    return torch.nn.Parameter(dbt.BinaryTable.from_float(torch.randn(40, 20), padding_idx=39))


@pytest.fixture
def dense():
    """The dense float parameter with a table's values, for autograd to compare with."""

    def make(table):
        return table.dequantize(torch.float32).requires_grad_()

    return make


@pytest.fixture
def summed():
    """A row gradient as a dense [V, D] tensor."""

    def make(grad):
        out = torch.zeros(grad.shape)
        return out.index_add_(0, grad.ids.long(), grad.rows.float())

    return make


@pytest.fixture
def alone():
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
