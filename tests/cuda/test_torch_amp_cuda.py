"""Mixed precision on a GPU: autocast, GradScaler and clipping, against a dense table and against the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

V, D = 50, 20
DEVICE = "cuda"


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    return module


def make_net(dbt: Any) -> Any:
    torch.manual_seed(0)
    net = torch.nn.Sequential(dbt.BinaryEmbedding(V, D), torch.nn.Linear(D, 3))
    return net.to(DEVICE)


def make_optimizers(dbt: Any, net: Any) -> list[Any]:
    return [torch.optim.AdamW(net[1].parameters(), lr=1e-2), dbt.XOR([net[0].weight], rule=rules.Counter(3))]


def batch(step: int) -> Any:
    return torch.randint(0, V, (4, 6), generator=torch.Generator().manual_seed(step)).to(DEVICE)


def everything(net: Any, optimizer: Any) -> list[Any]:
    """Copies of all that a step may change."""
    return copy.deepcopy([net.state_dict(), optimizer.state_dict()["state"]])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return all(same(a, b) for a, b in zip(one, other, strict=True)) if isinstance(one, list) else one == other


def dense_gradient(table: Any) -> Any:
    grad = table.grad.coalesce()
    return torch.zeros(V, D, device=DEVICE).index_add_(0, grad.ids, grad.rows)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_autocast_gives_the_gradient_of_a_dense_table(dbt: Any, kind: str) -> None:
    net = make_net(dbt)
    dense = net[0].weight.dequantize().requires_grad_()
    for rows in (net[0](batch(0)), torch.nn.functional.embedding(batch(0), dense)):
        assert rows.dtype is torch.float32, "as nn.Embedding: autocast leaves lookups alone"
        with torch.autocast(DEVICE, getattr(torch, kind)):
            y = net[1](rows)
        assert y.dtype is getattr(torch, kind)
        y.float().pow(2).sum().backward()
    assert net[0].weight.grad.dtype is torch.float32
    torch.testing.assert_close(dense_gradient(net[0].weight), dense.grad)
    with torch.autocast(DEVICE, getattr(torch, kind)):
        assert net[0](batch(0)).dtype is torch.float32


def test_scaled_training_gives_the_bits_of_unscaled_training(dbt: Any) -> None:
    """Powers of two are exact, so the scaler must leave no trace."""
    runs = []
    for scaled in (False, True):
        net = make_net(dbt)
        optimizers = make_optimizers(dbt, net)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, enabled=scaled)
        for step in range(5):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = net(batch(step)).float().pow(2).mean()
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            torch.nn.utils.clip_grad_value_(net.parameters(), 0.05)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        runs.append(everything(net, optimizers[1]))
        assert optimizers[1].state[net[0].weight]["step"] == 5
    assert same(*runs)
    assert not torch.equal(runs[0][0]["0.weight.bits"], make_net(dbt)[0].weight.bits)


def test_a_step_with_rows_that_overflow_float16_is_skipped(dbt: Any) -> None:
    """The scaler comes down from a scale that no float16 gradient fits, and only then the table trains."""
    net = make_net(dbt)
    optimizers = make_optimizers(dbt, net)
    table, xor = net[0].weight, optimizers[1]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    skipped, losses = 0, []
    for step in range(60):
        with torch.autocast(DEVICE, torch.float16):
            loss = (net(batch(step % 3)).float() - 1).pow(2).mean()
        scaler.scale(loss).backward()
        finite, before = bool(table.grad.rows.isfinite().all()), everything(net[0], xor)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        assert same(everything(net[0], xor), before) is not finite
        skipped += not finite
        losses.append(loss.item())
    assert 10 <= skipped <= 40
    assert xor.state[table]["step"] == 60 - skipped
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("value", [1.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_unscaling_does_not_touch_dy_and_skips_what_is_not_finite(dbt: Any, value: float, micro_batches: int) -> None:
    net = make_net(dbt)
    table, optimizer = net[0].weight, dbt.XOR([net[0].weight])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
    ids = torch.tensor([1, 2, 2], device=DEVICE)
    scaler.scale(net(ids).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before, stats = everything(net, optimizer), optimizer.stats()

    dy = torch.ones(3, D, device=DEVICE)
    dy[1, 7] = value
    expected = dy.clone()
    for number in range(micro_batches):
        net[0](ids).backward(dy if number == 0 else torch.ones(3, D, device=DEVICE))
    scaler.unscale_(optimizer)
    assert torch.equal(dy.nan_to_num(5.0), expected.nan_to_num(5.0))
    assert float(table.grad.rows[0, 0]) == micro_batches / 64
    scaler.step(optimizer)
    scaler.update()
    finite = value == 1.0
    assert same(before, everything(net, optimizer)) is not finite
    assert (optimizer.stats() == stats) is not finite or optimizer.stats()["rows"] == 2
    assert scaler.get_scale() == (64.0 if finite else 32.0)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_gives_the_rows_of_the_cpu(dbt: Any, foreach: bool | None) -> None:
    results = []
    ids, dy = torch.tensor([3, 3, 7, 0]), torch.randn(4, D, generator=torch.Generator().manual_seed(1)) * 10
    here = make_net(dbt)
    there = copy.deepcopy(here).cpu()
    for net, device in ((here, DEVICE), (there, "cpu")):
        net[0](ids.to(device)).backward(dy.to(device))
        net[1].weight.grad = torch.ones_like(net[1].weight)
        total = torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0, foreach=foreach)
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.25, foreach=foreach)
        grad = net[0].weight.grad.coalesce()
        results.append([value.cpu() for value in (total, grad.ids, grad.rows, net[1].weight.grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert float(results[0][2].abs().max()) == 0.25
