"""Sums of gradients on a GPU: the bits of the CPU, and nothing that waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DIM = 20


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    return module


def batches(count: int, rows: int, size: int) -> Iterator[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.randint(0, rows, (size,), generator=generator), torch.randn(size, DIM, generator=generator)


def make(dbt: Any, rows: int, device: str) -> Any:
    w = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1))
    return torch.nn.Parameter(dbt.BinaryTable.from_float(w).to(device))


#: sums beside each other; more blocks than one; one array, from the first on; first beside each other
PATTERNS = [(3, 1000, 30), (100, 4000, 20), (3, 20, 100), (30, 300, 40)]


@pytest.mark.parametrize(("count", "rows", "size"), PATTERNS)
@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(2, every=2)], ids=str)
def test_sums_and_steps_have_the_bits_of_the_cpu(dbt: Any, count: int, rows: int, size: int, rule: Any) -> None:
    results = []
    for device in ("cpu", "cuda"):
        table = make(dbt, rows, device)
        xor = dbt.XOR([table], rule=rule)
        for _ in range(rule.every):
            for ids, dy in batches(count, rows, size):
                dbt.lookup(table, ids.to(device)).backward(dy.to(device))
            total = table.grad.coalesce()
            xor.step()
            xor.zero_grad()
        results.append([array.detach().cpu() for array in (total.ids, total.rows, table.bits, table.scale)] + [xor.stats()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("count", "rows", "size"), PATTERNS)
def test_nothing_waits_for_the_device(dbt: Any, count: int, rows: int, size: int) -> None:
    table = make(dbt, rows, "cuda")
    xor = dbt.XOR([table], rule=rules.Counter(8))
    parts = [(ids.cuda(), dy.cuda()) for ids, dy in batches(count, rows, size)]

    def step() -> None:
        for ids, dy in parts:
            dbt.lookup(table, ids).backward(dy)
        torch.nn.utils.clip_grad_norm_([table], 1.0)
        torch.nn.utils.clip_grad_value_([table], 0.1)
        xor.step()
        xor.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert xor.stats()["rows"] == len({int(i) for ids, _ in parts for i in ids})


def test_second_derivatives_of_a_sum_with_unused_slots(dbt: Any) -> None:
    results = []
    for device in ("cpu", "cuda"):
        table, head = make(dbt, 30, device), torch.ones(DIM, device=device, requires_grad=True)
        ids = torch.tensor([1, 2, 1, 1], device=device)
        (gradient,) = torch.autograd.grad((dbt.lookup(table, ids).tanh() @ head).pow(2).sum(), table, create_graph=True)
        results.append([torch.autograd.grad(gradient.norm(), head, retain_graph=True)[0].cpu(), gradient.pow(2).sum().detach().cpu()])
    torch.testing.assert_close(*results)
