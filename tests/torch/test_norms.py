"""Sums of squares in the state of an optimizer whose rule changes, and states that no update leaves."""

import numpy as np
import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin import rules
from dualbin.rules import Counter
from xor_steps import assert_same, everything, train

V, D = 40, 20
ADAGRAD, RMS = Counter(8, norm="adagrad"), Counter(8, norm="rms")


def make():
    w = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(dbt.BinaryTable.from_float(w, padding_idx=V - 1))


@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
def test_adagrad_refuses_a_state_without_squares(scale_lr):
    message = r'the state has updates but no sums of squares, which norm="adagrad" divides by: use Counter\(norm="rms"\)'
    table = make()
    optimizer = dbt.XOR([table], rule=RMS, scale_lr=scale_lr)
    train(table, optimizer, range(2))
    exported, saved = optimizer.export_state(), optimizer.state_dict()
    optimizer.param_groups[0]["rule"] = ADAGRAD
    kept = everything(table, optimizer)
    dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    table.grad = None
    assert_same(everything(table, optimizer), kept)
    other = dbt.XOR([make()], rule=ADAGRAD, scale_lr=scale_lr)
    with pytest.raises(ValueError, match=message):
        other.import_state(exported)
    without = {"0": {name: value for name, value in exported["0"].items() if name != "squares"}}  # as version 1 has it
    with pytest.raises(ValueError, match=message):
        other.import_state(without)
    saved["param_groups"][0]["rule"] = rules.to_plain(ADAGRAD)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert not other.state
    optimizer.param_groups[0]["rule"] = RMS
    train(table, optimizer, [2])
    third = make()
    again = dbt.XOR([third], rule=RMS, scale_lr=scale_lr)
    again.import_state(without)
    assert int(again.state[third]["step"]) == 2


def test_a_window_that_is_open_keeps_the_sums():
    """Sums miss nothing until an update by another norm is made."""
    table, other = make(), make()
    optimizer, reference = (dbt.XOR([t], rule=Counter(8, norm="adagrad", every=2)) for t in (table, other))
    train(table, optimizer, range(3))
    train(other, reference, range(3))
    optimizer.param_groups[0]["rule"] = Counter(8, norm="rms", every=3)
    train(table, optimizer, [3])
    optimizer.param_groups[0]["rule"] = Counter(8, norm="adagrad", every=3)
    reference.param_groups[0]["rule"] = Counter(8, norm="adagrad", every=3)
    train(table, optimizer, range(4, 8))
    train(other, reference, range(3, 8))
    assert_same(everything(table, optimizer), everything(other, reference))


@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
@pytest.mark.parametrize("copied", [False, True])
def test_from_adagrad_to_rms_is_for_good(scale_lr, copied):
    """Sums of squares that miss an update are none: it drops them, and "adagrad" cannot go on."""
    table, other = make(), make()
    optimizer, fresh = dbt.XOR([table], rule=ADAGRAD, scale_lr=scale_lr), dbt.XOR([other], rule=RMS, scale_lr=scale_lr)
    train(table, optimizer, range(3))
    before = optimizer.export_state()["0"]
    if copied:
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["rule"] = RMS
    with torch.no_grad():
        other.copy_(table)
    without = {name: np.zeros_like(array) if name == "squares" else array for name, array in before.items()}
    fresh.import_state({"0": without if scale_lr else {name: array for name, array in before.items() if name != "squares"}})
    for t, o in ((table, optimizer), (other, fresh)):
        train(t, o, range(3, 6))
    assert_same(everything(table, optimizer), everything(other, fresh))
    kept = everything(table, optimizer)
    optimizer.param_groups[0]["rule"] = ADAGRAD
    dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"no sums of squares.*or a fresh state .an update with another norm drops the sums"):
        optimizer.step()
    table.grad = None
    assert_same(everything(table, optimizer), kept)


def test_a_step_that_fails_keeps_the_sums():
    table, other = make(), make()
    optimizer = dbt.XOR([{"params": [table]}, {"params": [other]}], rule=ADAGRAD)
    train(table, optimizer, range(2))
    sums = optimizer.export_state()["0"]["squares"]
    optimizer.param_groups[0]["rule"] = RMS
    dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    other.grad = dbt.RowGrad(torch.tensor([V]), torch.zeros(1, D), (V, D))
    with pytest.raises(IndexError):
        optimizer.step()
    np.testing.assert_array_equal(optimizer.export_state()["0"]["squares"], sums)
    other.grad = None
    optimizer.param_groups[0]["rule"] = ADAGRAD
    optimizer.step()
    assert (optimizer.export_state()["0"]["squares"] > sums).any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("squares", -1.0, "states.'0'.: state 'squares' must be 0 or more in every row"),
        ("squares", np.nan, "state 'squares' must be 0 or more in every row"),
        ("scale_v", -1e-9, "state 'scale_v' must be 0 or more"),
        ("count", -1, "state 'count' must be 0 or more"),
        ("counter", 255, f"state 'counter' has bits set beyond column {D - 1}"),
    ],
)
def test_numbers_that_no_update_leaves_are_refused(name, value, message):
    table, other = make(), make()
    optimizer, target = dbt.XOR([table], rule=ADAGRAD), dbt.XOR([other], rule=ADAGRAD)
    train(table, optimizer, range(2))
    states = optimizer.export_state()
    states["0"][name][-1] = value
    with pytest.raises(ValueError, match=message):
        target.import_state(states)
    assert not target.state


@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
def test_a_state_that_no_gradient_has_reached_is_loaded(scale_lr):
    """Updates by zeros, and those of a shard whose rows are elsewhere, leave the sums at zero."""
    w = torch.randn(V, D)
    tables = [nn.Parameter(dbt.BinaryTable.from_float(w)), nn.Parameter(dbt.BinaryTable.from_float(w))]
    tables += [
        nn.Parameter(dbt.BinaryTable(t.bits, t.scale, D, first_row=80)) for t in (tables[0].detach().clone(), tables[0].detach().clone())
    ]
    for a, b, grad in (
        (*tables[:2], dbt.RowGrad(torch.tensor([1, 2]), torch.zeros(2, D), (V, D))),
        (*tables[2:], dbt.RowGrad(torch.empty(0, dtype=torch.int64), torch.empty(0, D), (V, D))),
    ):
        first, second = (dbt.XOR([table], rule=ADAGRAD, scale_lr=scale_lr) for table in (a, b))
        a.grad = grad
        first.step()
        a.grad = None
        assert first.state[a]["step"] == 1
        second.load_state_dict(first.state_dict())
        assert second.state[b]["step"] == 1
        second.import_state(first.export_state())
        train(a, first, [1])
        train(b, second, [1])
        assert_same(everything(a, first), everything(b, second))
