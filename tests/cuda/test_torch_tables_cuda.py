"""Growing, freezing and averaging tables on a GPU: the bits of the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

V, D = 60, 20


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    return module


def make(dbt: Any, device: str, seed: int = 1) -> Any:
    module = dbt.BinaryEmbedding(V, D, generator=torch.Generator().manual_seed(seed))
    return module.to(device)


def step(module: Any, optimizer: Any, seed: int, rows: int = V) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids, dy = torch.randint(0, rows, (8, 5), generator=generator), torch.randn(8, 5, D, generator=generator)
    module(ids.to(module.weight.device)).backward(dy.to(module.weight.device))
    optimizer.step()
    optimizer.zero_grad()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.bits.cpu(), b.bits.cpu()) and torch.equal(a.scale.cpu(), b.scale.cpu())


@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(4, every=3), rules.Sign()])
@pytest.mark.parametrize("capturable", [False, True])
def test_frozen_and_new_rows(dbt: Any, rule: Any, capturable: bool) -> None:
    if capturable and rule.every > 1:
        pytest.skip("a window has no fixed size")
    modules = [make(dbt, device) for device in ("cpu", "cuda")]
    optimizers = [dbt.XOR(modules[0].parameters(), rule=rule), dbt.XOR(modules[1].parameters(), rule=rule, capturable=capturable)]
    values = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    for module, optimizer in zip(modules, optimizers, strict=True):
        for seed in range(4):
            step(module, optimizer, seed)
        dbt.freeze_rows(module, [3, 7, 20])
        before = module.weight.detach().clone()
        dbt.grow(module, V + 5, optimizer=optimizer, values=values.to(module.weight.device))
        for seed in range(4, 10):
            step(module, optimizer, seed, rows=V + 5)
        assert module.weight.frozen.device == module.weight.device
        assert torch.equal(module.weight.bits[[3, 7, 20]], before.bits[[3, 7, 20]])
        assert torch.equal(module.weight.scale[[3, 7, 20]], before.scale[[3, 7, 20]])
    assert same(modules[0].weight, modules[1].weight)


def test_frozen_rows_move_with_the_module(dbt: Any) -> None:
    module = make(dbt, "cpu")
    dbt.freeze_rows(module, [1])
    module.cuda()
    assert module.weight.frozen.is_cuda
    module(torch.tensor([1, 2], device="cuda")).sum().backward()
    assert [bool(row.any()) for row in module.weight.grad.rows] == [False, True]


def test_new_rows_are_made_on_the_gpu(dbt: Any) -> None:
    module = make(dbt, "cuda")
    old = module.weight.detach().clone()
    dbt.grow(module, 2 * V, generator=torch.Generator("cuda").manual_seed(1))
    assert torch.equal(module.weight[:V], old)
    assert 0.4 < (module.weight.dequantize()[V:] > 0).float().mean() < 0.6


def test_averages(dbt: Any) -> None:
    tables = [[make(dbt, device, seed).weight.detach() for seed in (1, 2)] for device in ("cpu", "cuda")]
    for pair in tables:
        pair[1].scale.mul_(0.5)
    outs = [dbt.average(a, b, 0.3, step=5, seed=9) for a, b in tables]
    assert same(*outs)
    a, b = tables[1]
    for _ in range(60):
        torch._foreach_lerp_([a], [b], 0.25)
    assert torch.equal(a.bits, b.bits)


def test_tensors_made_from_a_table_are_on_its_device(dbt: Any) -> None:
    table = make(dbt, "cuda").weight
    assert table.new_zeros(2, 3).device == table.device
    assert table.new_full((2,), 1.0, device="cpu").device.type == "cpu"
    torch.nn.functional.embedding(torch.tensor([0, 2], device="cuda"), table[5:10]).sum().backward()
    assert sorted(table.grad.ids.tolist()) == [5, 7]
