"""Averages of tables: the function, torch.lerp, and the EMA and SWA of torch and of ema-pytorch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import dualbin.torch as dbt
from dualbin import reference


def tables(rows=40, dim=37):
    """Two tables of which a fifth of the signs differ."""
    w = torch.randn(rows, dim)
    other = torch.where(torch.rand(rows, dim) < 0.2, -w, w) * torch.rand(rows, 1)
    return dbt.BinaryTable.from_float(w), dbt.BinaryTable.from_float(other)


def dense(table):
    return table.dequantize().double()


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.999, 1.0, torch.tensor(0.5)])
@pytest.mark.parametrize("first_row", [None, 1000])
def test_it_is_that_of_the_reference(weight, first_row):
    a, b = tables()
    a.first_row = b.first_row = first_row
    out = dbt.average(a, b, weight, step=7, seed=3)
    arrays = [array.numpy() for table in (a, b) for array in (table.bits, table.scale)]
    bits, scale = reference.average(*arrays, float(weight), 37, seed=3, step=7, first_row=first_row or 0)
    np.testing.assert_array_equal(out.bits.numpy(), bits)
    np.testing.assert_array_equal(out.scale.numpy(), scale)
    assert (out.first_row, out.dtype, out.requires_grad) == (first_row, a.dtype, False)
    again = a.bfloat16()
    assert dbt.average(again, b, weight, step=7).dtype is torch.bfloat16


def test_without_a_step_the_contents_choose(monkeypatch):
    a, b = tables()
    arrays = [array.numpy() for table in (a, b) for array in (table.bits, table.scale)]
    bits, _ = reference.average(*arrays, 0.5, 37, step=reference.average_step(*arrays))
    for part in (1 << 22, 3, 8 * a.bits.shape[1]):
        monkeypatch.setattr("dualbin.torch._average._PART", part)
        np.testing.assert_array_equal(dbt.average(a, b, 0.5).bits.numpy(), bits)
    with torch.no_grad():
        b.scale[7] *= 2
    assert not torch.equal(dbt.average(a, b, 0.5).bits[8:], torch.from_numpy(bits)[8:])
    a.first_row = b.first_row = 40
    with pytest.raises(ValueError, match="step must be given for a shard of a table"):
        dbt.average(a, b, 0.5)
    a.lerp_(b, 0.5)


def test_the_expectation_is_the_average_and_agreement_stays():
    a, b = tables()
    mean = sum(dense(dbt.average(a, b, 0.3, step=step)) for step in range(2000)) / 2000
    expected = 0.7 * dense(a) + 0.3 * dense(b)
    assert (mean - expected).abs().max() < 5 * (a.scale + b.scale).max() / 2000**0.5
    agree = dense(a).sign() == dense(b).sign()
    assert torch.equal(dense(dbt.average(a, b, 0.3)).sign()[agree], dense(a).sign()[agree])


@pytest.mark.parametrize(
    "in_place",
    [
        lambda a, b: a.lerp_(b, 0.25),
        lambda a, b: a.lerp_(b, torch.tensor(0.25)),
        lambda a, b: a.data.lerp_(b.data, 0.25),
        lambda a, b: torch._foreach_lerp_([a], [b], 0.25),
        lambda a, b: a.copy_(torch.lerp(a, b, 0.25)),
    ],
)
def test_small_steps_in_place_arrive(in_place):
    """Each has random numbers of its own: with the same ones, a weight whose number is high would never move."""
    a, b = (nn.Parameter(table, requires_grad=False) for table in tables())
    for _ in range(60):
        in_place(a, b)
    assert torch.equal(a.bits, b.bits)
    torch.testing.assert_close(a.scale, b.scale, rtol=1e-4, atol=1e-6)


def test_lists_of_tables_and_tensors():
    a, b = tables()
    c, d = torch.zeros(3), torch.ones(3)
    torch._foreach_lerp_([c, a, a.new_zeros(2)], [d, b, d[:2]], [0.25, 1.0, 0.5])
    assert torch.equal(c, torch.full((3,), 0.25))
    assert torch.equal(a, b)
    e = a.clone()
    torch._foreach_copy_([c, e], [d, tables()[0]])
    assert torch.equal(c, d)
    assert not torch.equal(e, a)


def test_an_average_in_place_is_a_change_to_autograd():
    a, b = tables()
    version = a._version
    a.lerp_(b, 0.5)
    assert a._version > version


def model():
    torch.manual_seed(0)
    return nn.Sequential(dbt.BinaryEmbedding(40, 16, padding_idx=3), nn.Linear(16, 2))


def drifted(start, steps):
    """`start` with the table of another model, in so many steps, and what follows it."""
    goal = dbt.BinaryTable.from_float(torch.randn(40, 16), padding_idx=3)
    online = copy.deepcopy(start)
    with torch.no_grad():
        online[0].weight.copy_(goal)
        online[1].weight.fill_(1.0)
    for _ in range(steps):
        yield online


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": lambda averaged, current, _: torch.lerp(averaged, current, 0.1)},
    ],
)
def test_averaged_model_ema(options, use_buffers):
    start = model()
    averaged = AveragedModel(start, use_buffers=use_buffers, **options)
    averaged.update_parameters(start)
    for number, online in enumerate(drifted(start, 100)):
        averaged.update_parameters(online)
        if number == 0:
            share = (dense(averaged.module[0].weight) != 0).float().mean()
            moved = (averaged.module[0].weight.bits != start[0].weight.bits).any(1).float().mean()
            assert share == 39 / 40
            assert 0.1 < moved < 1
    torch.testing.assert_close(averaged.module[0].weight.scale, online[0].weight.scale, rtol=1e-3, atol=1e-4)
    agree = (dense(averaged.module[0].weight) * dense(online[0].weight) >= 0).float().mean()
    assert agree > 0.999
    torch.testing.assert_close(averaged.module[1].weight, online[1].weight, rtol=1e-3, atol=1e-3)
    again = AveragedModel(model(), **options)
    again.load_state_dict(averaged.state_dict())
    assert torch.equal(again.module[0].weight, averaged.module[0].weight)


def test_averaged_model_swa():
    """Of 50 tables that each differ from one in a fifth of the signs: a weight of the average is a fair draw from them."""
    base = torch.randn(40, 16).sign()
    parts = [model() for _ in range(50)]
    for part in parts:
        part[0].weight.data = dbt.BinaryTable.from_float(torch.where(torch.rand(40, 16) < 0.2, -base, base))
    averaged = AveragedModel(parts[0], multi_avg_fn=get_swa_multi_avg_fn())
    for part in parts:
        averaged.update_parameters(part)
    table = dense(averaged.module[0].weight)
    torch.testing.assert_close(table.abs(), torch.ones(40, 16, dtype=torch.float64))
    assert 0.75 < (table == base).float().mean() < 0.85
    assert (table == dense(parts[0][0].weight)).float().mean() < 0.75
    torch.testing.assert_close(averaged.module[1].weight, parts[0][1].weight)


@pytest.mark.parametrize("options", [{"avg_fn": get_ema_avg_fn(0.9)}, {}])
def test_other_arithmetic_names_the_function(options):
    averaged = AveragedModel(model(), **options)
    averaged.update_parameters(model())
    before = averaged.module[0].weight.clone()
    with pytest.raises(NotImplementedError, match=r"dualbin\.torch\.average or torch\.lerp"):
        averaged.update_parameters(model())
    assert torch.equal(averaged.module[0].weight, before)


@pytest.mark.parametrize("use_foreach", [False, True])
def test_ema_pytorch(use_foreach):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    start = model()
    online = copy.deepcopy(start)
    ema = ema_pytorch.EMA(online, beta=0.9, update_after_step=0, update_every=1, use_foreach=use_foreach)
    ema.update()
    goal = next(drifted(start, 1))
    online.load_state_dict(goal.state_dict())
    ema.update()
    once = ema.ema_model[0].weight.clone()
    assert not torch.equal(once, goal[0].weight)
    for _ in range(150):
        ema.update()
    agree = (dense(ema.ema_model[0].weight) * dense(goal[0].weight) >= 0).float().mean()
    assert agree > 0.999
    ema.update_model_with_ema()
    ema.copy_params_from_ema_to_model()
    assert torch.equal(online[0].weight, ema.ema_model[0].weight)


@pytest.mark.parametrize(
    ("b", "weight", "options", "error", "message"),
    [
        (None, 1.5, {}, ValueError, "weight must be finite and between 0.0 and 1.0, got 1.5"),
        (None, torch.tensor([0.1, 0.2]), {}, ValueError, "weight must be a number in"),
        (None, 0.5, {"step": -1}, ValueError, "step must be"),
        (torch.zeros(40, 37), 0.5, {}, TypeError, "b of average must be a BinaryTable as the other, got a Tensor"),
        (
            dbt.BinaryTable.from_float(torch.ones(40, 36)),
            0.5,
            {},
            ValueError,
            r"the same shape.*\(40, 37\) on cpu and \(40, 36\)",
        ),
    ],
)
def test_arguments_that_are_refused(b, weight, options, error, message):
    a, other = tables()
    with pytest.raises(error, match=message):
        dbt.average(a, other if b is None else b, weight, **options)


def test_a_table_and_floats_do_not_average():
    a, before = tables()[0], None
    before = a.clone()
    for line in (lambda: a.lerp_(torch.zeros(40, 37), 0.5), lambda: torch.zeros(40, 37).lerp_(a, 0.5)):
        with pytest.raises(TypeError, match="must be a BinaryTable as the other, got a Tensor"):
            line()
    assert torch.equal(a, before)
