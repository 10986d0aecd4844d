"""The storage of a table and of a row gradient has no memory: calls that would read it raise, where PyTorch would end the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dualbin.torch as dbt
from dualbin.torch._dispatch import NoStorage


@pytest.fixture(params=["table", "gradient"])
def packed(request: Any) -> torch.Tensor:
    table = torch.nn.Parameter(dbt.BinaryTable.from_float(torch.randn(20, 9)))
    dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    assert table.grad is not None
    return table if request.param == "table" else table.grad


@pytest.mark.parametrize("call", ["share_memory_", "float", "half", "bool", "_share_fd_cpu_", "_share_filename_cpu_"])
def test_what_would_read_the_storage_raises(packed: torch.Tensor, call: str) -> None:
    storage = packed.untyped_storage()
    assert isinstance(storage, NoStorage)  # else the next line ends this process
    with pytest.raises(NotImplementedError, match=r"share_memory_\(\) of the table itself, or take the storages of its \.bits and \.scale"):
        getattr(storage, call)()


def test_what_only_asks_of_it_works(packed: torch.Tensor) -> None:
    storage = packed.untyped_storage()
    assert storage.device == packed.device
    assert storage.nbytes() == 20 * 9 * 4
    assert storage._cdata == packed.untyped_storage()._cdata


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_typed_storage_and_dlpack(packed: torch.Tensor) -> None:
    storage = packed.storage()
    with pytest.raises(NotImplementedError, match="this storage has no memory"):
        storage._untyped_storage.share_memory_()
    with pytest.raises(NotImplementedError, match=r"on a (BinaryTable|RowGrad) would need (its|the) dense"):
        torch.from_dlpack(packed.detach())


def test_storages_of_bits_and_scale_can_be_shared() -> None:
    table = dbt.BinaryTable.from_float(torch.randn(20, 9))
    table.bits.untyped_storage().share_memory_()
    assert table.bits.is_shared()
    assert not table.scale.is_shared()
