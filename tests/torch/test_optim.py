"""XOR: updates by value, param groups, schedulers, every=K, refusals that change nothing."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin import reference, rules
from dualbin.torch import _native_call
from dualbin.torch._step import checked_grad
from xor_steps import batch, make, train

RULES = [
    rules.Counter(8),
    rules.Counter(3, eta=4.0, dead_zone=0.0),
    rules.Counter(1, eta=0.2, dead_zone=0.0),
    rules.Counter(8, every=3),
    rules.Bop(),
    rules.Sign(),
]


# ---- values ------------------------------------------------------------------------------------------------------------------------------


def test_sign_rule_by_hand():
    """Two rows of +1, -1, +1: bits that agree in sign with the summed gradient flip."""
    bits = torch.tensor([[0b101], [0b101], [0b101]], dtype=torch.uint8)
    table = nn.Parameter(dbt.BinaryTable(bits, torch.tensor([[1.0], [-1.0], [0.0]]), 3))
    dy = torch.tensor([[1.0, -1.0, -1.0], [-3.0, -1.0, 0.0], [1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    table.grad = dbt.RowGrad(torch.tensor([0, 0, 1, 2]), dy, (3, 3))
    optimizer = dbt.XOR([table], rule=rules.Sign(), scale_lr=0)
    optimizer.step()
    assert table.bits.flatten().tolist() == [0b101 ^ 0b010, 0b101 ^ 0b100, 0b101]
    assert optimizer.stats(table) == {"flips": 2, "rows": 2, "skipped": 0, "clipped": 0}
    assert optimizer.state[table] == {"step": 1}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scale_lr", [3e-3, 0.0])
def test_ten_steps_give_the_bits_of_the_reference(rule, scale_lr):
    table = make()
    bits, scale = table.bits.numpy().copy(), table.scale.numpy().copy()
    state = reference.init_state(rule, 40, 20, scale_lr=scale_lr)
    optimizer = dbt.XOR([table], lr=0.7, rule=rule, scale_lr=scale_lr, seed=5)
    for step in range(10):
        ids, dy = batch(step)
        dbt.lookup(table, ids).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        options = {"rule": rule, "dim": 20, "lr": 0.7, "scale_lr": scale_lr, "seed": 5}
        stats = reference.update(bits, scale, state, ids.numpy(), dy.numpy(), **options)
    np.testing.assert_array_equal(table.bits.numpy(), bits)
    np.testing.assert_array_equal(table.scale.numpy(), scale)
    exported = optimizer.export_state()["0"]
    assert set(exported) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
    window = {"pending_ids", "pending_rows", "pending_steps"} if rule.every > 1 else set()
    assert set(optimizer.state[table]) == {"step", *rules.state_layout(rule, 40, 20, train_scale=scale_lr > 0), *window}
    if rule.every == 1:
        assert optimizer.stats(table) == stats._asdict()


def test_a_step_is_one_native_call(monkeypatch):
    calls = []

    class Counting:
        def __getattr__(self, name):
            function = getattr(native, name)
            return function if name == "Rule" else lambda *args, **options: (calls.append(name), function(*args, **options))[1]

    native = _native_call._native
    tables = [make(seed=0), make(seed=1)]
    optimizer = dbt.XOR(tables)
    for table in tables:
        for step in range(2):  # accumulated, with ids that repeat
            ids, dy = batch(step)
            dbt.lookup(table, ids).backward(dy)
    monkeypatch.setattr(_native_call, "_native", Counting())
    optimizer.step()
    assert [name for name in calls if name != "workspace_bytes"] == ["Update", "Update", "apply_steps"]
    assert optimizer.stats()["flips"] > 0


def test_the_number_of_threads_changes_nothing():
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        table = make(rows=300, dim=64)
        train(table, dbt.XOR([table]), range(2))
        runs.append(table)
    assert torch.equal(*runs)


def test_same_seed_same_bits_other_seed_other_bits():
    runs = []
    for seed in (3, 3, 4):
        table = make()
        train(table, dbt.XOR([table], rule=rules.Counter(2, dead_zone=0.0), seed=seed), range(3))
        runs.append(table.bits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_stats_sum_over_tables_and_start_at_zero():
    a, b = make(), make(rows=10, dim=9)
    optimizer = dbt.XOR([a, b])
    assert optimizer.stats(a) == optimizer.stats() == dict.fromkeys(("flips", "rows", "skipped", "clipped"), 0)
    for table in (a, b):
        dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    a.grad.rows[0, 0] = float("nan")
    optimizer.step()
    assert (optimizer.stats(a)["rows"], optimizer.stats(a)["skipped"]) == (1, 1)
    assert (optimizer.stats(b)["rows"], optimizer.stats()["rows"]) == (2, 3)
    assert all(type(value) is int for value in optimizer.stats().values())
    with pytest.raises(ValueError, match="table must be one of this optimizer's"):
        optimizer.stats(make())


def test_step_bumps_the_version_and_keeps_the_memory():
    table = make()
    address, versions = table.bits.data_ptr(), (table._version, table.bits._version, table.scale._version)
    train(table, dbt.XOR([table]), range(2))
    assert table.bits.data_ptr() == address
    assert all(new > old for new, old in zip((table._version, table.bits._version, table.scale._version), versions, strict=True))


def test_a_step_without_a_gradient_counts_nothing():
    a, b = make(), make(seed=1)
    optimizer = dbt.XOR([a, b])
    train(a, optimizer, range(3))
    assert optimizer.state[a]["step"] == 3
    assert b not in optimizer.state


# ---- groups, schedulers, closures --------------------------------------------------------------------------------------------------------


def test_param_groups_have_their_own_options():
    a, b = make(), make(seed=1)
    alone_a, alone_b = copy.deepcopy(a), copy.deepcopy(b)
    groups = [{"params": [a], "rule": rules.Sign()}, {"params": [b], "lr": 0.25, "scale_lr": 0.0, "seed": 9}]
    together = dbt.XOR(groups, lr=0.5)
    for table in (a, b):
        train(table, together, range(3))
    train(alone_a, dbt.XOR([alone_a], lr=0.5, rule=rules.Sign()), range(3))
    train(alone_b, dbt.XOR([alone_b], lr=0.25, scale_lr=0.0, seed=9), range(3))
    assert torch.equal(a, alone_a)
    assert torch.equal(b, alone_b)
    assert "record" not in together.state[b]


def test_lr_schedulers():
    a, b = make(), make()
    scheduled = dbt.XOR([a], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.5)
    by_hand = dbt.XOR([b], lr=1.0)
    for step in range(4):
        train(a, scheduled, [step])
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.5**step
        train(b, by_hand, [step])
    assert scheduled.param_groups[0]["lr"] == 0.0625
    assert torch.equal(a, b)


def test_lr_zero_flips_nothing():
    table = make()
    before = table.detach().clone()
    train(table, dbt.XOR([table], lr=0.0), range(3))
    assert torch.equal(table, before)


def test_closure_and_hooks():
    table, log = make(), []
    optimizer = dbt.XOR([table])
    optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    optimizer.register_step_post_hook(lambda *_: log.append("after"))

    def closure():
        loss = dbt.lookup(table, torch.tensor([1, 2])).pow(2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert optimizer.state[table]["step"] == 1
    assert log == ["before", "after"]


# ---- every=K -----------------------------------------------------------------------------------------------------------------------------


def test_window_holds_sorted_sums_and_becomes_one_update():
    table, once = make(), make()
    optimizer = dbt.XOR([table], rule=rules.Counter(8, every=2))
    first, second = batch(0), batch(1)
    for number, (ids, dy) in enumerate((first, second)):
        before = table.detach().clone()
        dbt.lookup(table, ids).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            expected = reference.row_gradient(ids.numpy(), dy.numpy(), 40)
            state = optimizer.state[table]
            np.testing.assert_array_equal(state["pending_ids"].numpy(), expected[0])
            np.testing.assert_array_equal(state["pending_rows"].numpy(), expected[1])
            assert (state["step"], state["pending_steps"]) == (0, 1)
            assert torch.equal(table, before)
    rows = torch.cat([dbt.RowGrad(ids, dy, (40, 20)).coalesce().rows for ids, dy in (first, second)])
    ids = torch.cat([torch.unique(ids) for ids, _ in (first, second)])
    once.grad = dbt.RowGrad(ids, rows, (40, 20))
    dbt.XOR([once]).step()
    assert torch.equal(table, once)
    state = optimizer.state[table]
    assert (state["step"], state["pending_steps"], state["pending_ids"].numel(), state["pending_rows"].shape) == (1, 0, 0, (0, 20))


def test_an_open_window_survives_a_change_to_every_1():
    table = make()
    optimizer = dbt.XOR([table], rule=rules.Counter(8, every=4))
    train(table, optimizer, range(2))
    optimizer.param_groups[0]["rule"] = rules.Counter(8)
    train(table, optimizer, [2])
    assert optimizer.state[table]["step"] == 1
    assert "pending_ids" not in optimizer.state[table]


# ---- refusals ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0.0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "1"}, TypeError, "lr must be a number"),
        ({"scale_lr": -1e-3}, ValueError, "scale_lr must be finite"),
        ({"seed": -1}, ValueError, "seed must be between 0"),
        ({"seed": 2**64}, ValueError, "seed must be between 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"rule": "counter"}, TypeError, "rule must be a dualbin.rules.Counter, Bop or Sign, got str"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        dbt.XOR([make()], **options)
    with pytest.raises(error, match=message):
        dbt.XOR([{"params": [make()], **options}])


def test_other_parameters_are_refused():
    head = nn.Linear(3, 4)
    with pytest.raises(TypeError, match=re.escape("params must be BinaryTables, got a Parameter of shape (4, 3) as parameter 1")):
        dbt.XOR([make(), head.weight])
    optimizer = dbt.XOR([make()])
    with pytest.raises(TypeError, match="params must be BinaryTables"):
        optimizer.add_param_group({"params": head.parameters()})
    assert len(optimizer.param_groups) == 1


def two_tables():
    a, b = make(), make(rows=10, dim=9)
    optimizer = dbt.XOR([("first", a), ("second", b)])
    for table in (a, b):
        dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    return a, b, optimizer


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda table, _: setattr(table, "grad", dbt.RowGrad(torch.tensor([10]), torch.ones(1, 9), (10, 9))),
            IndexError,
            r"second: ids.*\[0, 10\).*10",
        ),
        (lambda _, optimizer: optimizer.param_groups[0].update(lr=-1.0), ValueError, "lr must be finite"),
        (lambda _, optimizer: optimizer.param_groups[0].update(rule=None), TypeError, "rule must be"),
        (
            lambda table, optimizer: optimizer.state[table].update(count=torch.zeros(11, dtype=torch.int32)),
            ValueError,
            r"second: state 'count' must be.*\[10\]",
        ),
        (
            lambda table, optimizer: optimizer.state[table].update(counter=torch.zeros(10, 14)),
            ValueError,
            r"second: state 'counter' must be.*uint8",
        ),
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_refused_step_changes_no_table(damage, error, message, every):
    a, b, optimizer = two_tables()
    optimizer.param_groups[0]["rule"] = rules.Counter(8, every=every)
    before = a.detach().clone(), b.detach().clone()
    damage(b, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    assert a not in optimizer.state


def test_the_gradient_of_another_table_is_refused():
    a, b, _ = two_tables()
    before = a.detach().clone()
    with pytest.raises(RuntimeError, match="same size"):  # torch's own check
        b.grad = a.grad
    b.grad = None
    with pytest.raises(ValueError, match=r"RowGrad of a table of shape \(40, 20\), but this table has \(10, 9\)"):
        checked_grad("second", SimpleNamespace(grad=a.grad, shape=b.shape))
    assert torch.equal(a, before)


def test_capturable_bad_options(table):
    with pytest.raises(ValueError, match="capturable needs a rule with every=1"):
        dbt.XOR([table], rule=rules.Counter(2, every=2), capturable=True)
    with pytest.raises(TypeError, match="capturable must be True or False"):
        dbt.XOR([table], capturable=1)
    with pytest.raises(TypeError, match="lr must be a number or a float tensor"):
        dbt.XOR([table], lr=torch.ones(2), capturable=True)
