"""Mixed precision: autocast and GradScaler with XOR, and modes in which nothing is recorded."""

import copy

import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin import rules

V, D = 50, 20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = dbt.BinaryEmbedding(V, D)
        self.head = nn.Linear(D, 3)

    def forward(self, ids):
        return self.head(self.emb(ids)).float().pow(2).mean()


def optimizers_of(net):
    return [torch.optim.SGD(net.head.parameters(), lr=0.1), dbt.XOR([net.emb.weight], rule=rules.Counter(3))]


def state_of(net, optimizer):
    """Copies of all that a step may change."""
    return [copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return all(same(a, b) for a, b in zip(one, other, strict=True)) if isinstance(one, list) else one == other


def test_scaled_training_gives_the_bits_of_unscaled_training():
    """Powers of two are exact, so the scaler must leave no trace; clipping comes between unscale_ and step."""
    runs = []
    for scaled in (False, True):
        net = Net()
        optimizers = optimizers_of(net)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for step in range(4):
            ids = torch.randint(0, V, (4, 6), generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(ids)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            nn.utils.clip_grad_value_(net.parameters(), 0.05)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        runs.append(state_of(net, optimizers[1]))
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0][0]["emb.weight.bits"], Net().emb.weight.bits)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_gradient_that_is_not_finite_skips_the_step(value, micro_batches):
    net = Net()
    optimizer, scaler = dbt.XOR([net.emb.weight]), torch.amp.GradScaler("cpu", init_scale=64.0)
    ids = torch.tensor([1, 2, 2])
    scaler.scale(net(ids)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before, stats = state_of(net, optimizer), optimizer.stats()

    dy = torch.ones(3, D)
    dy[1, 7] = value
    for batch in range(micro_batches):
        net.emb(ids).backward(dy if batch == 0 else torch.ones(3, D))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert same(before, state_of(net, optimizer))
    assert optimizer.stats() == stats
    assert scaler.get_scale() == 32.0
    expected = torch.ones(3, D)
    expected[1, 7] = value
    assert torch.equal(dy.nan_to_num(5.0), expected.nan_to_num(5.0))  # the caller's dy is not unscaled


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unscaling_half_precision_gradients(dtype, summed):
    table = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(V, D)))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=16.0), dbt.XOR([table])
    scaler.scale(dbt.lookup(table, torch.tensor([1, 1, 4]), dtype=dtype).float().sum()).backward()
    assert table.grad.dtype == dtype
    if dtype == torch.float16:  # torch's scaler takes float16 gradients for a sign of half-precision weights
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            scaler.unscale_(optimizer)
        return
    scaler.unscale_(optimizer)
    assert float(summed(table.grad)[1, 0]) == 2.0


def test_inference_mode_and_frozen_tables():
    net, ids = Net(), torch.tensor([1, 2])
    with torch.inference_mode():
        rows = net.emb(ids)
    assert rows.is_inference()
    assert torch.equal(rows.clone(), net.emb(ids))
    net.emb.requires_grad_(False)
    net(ids).backward()
    assert net.emb.weight.grad is None
    assert net.head.weight.grad is not None
    net.emb.requires_grad_()
    net(ids).backward()
    assert type(net.emb.weight.grad) is dbt.RowGrad
