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
from dualbin.torch._optim import checked_grad

RULES = [
    rules.Counter(8),
    rules.Counter(3, eta=4.0, dead_zone=0.0),
    rules.Counter(1, eta=0.2, dead_zone=0.0),
    rules.Counter(8, every=3),
    rules.Bop(),
    rules.Sign(),
]


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
    assert set(optimizer.state[table]) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(np.asarray(optimizer.state[table][name]), value, err_msg=name)
    if rule.every == 1:
        assert optimizer.stats(table) == stats._asdict()


def test_a_step_is_one_native_call_a_table(monkeypatch):
    calls = []

    class Counting:
        def __getattr__(self, name):
            function = getattr(native, name)
            return function if isinstance(function, type) else lambda *args: (calls.append(name), function(*args))[1]

    native = _native_call._native
    tables = [make(seed=0), make(seed=1)]
    optimizer = dbt.XOR(tables)
    for table in tables:
        for step in range(2):  # accumulated, with ids that repeat
            ids, dy = batch(step)
            dbt.lookup(table, ids).backward(dy)
    monkeypatch.setattr(_native_call, "_native", Counting())
    optimizer.step()
    assert [name for name in calls if name != "workspace_bytes"] == ["update", "update"]
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
    assert "scale_m" not in together.state[b]


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


# ---- saving and going on -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(4, every=3), rules.Bop(), rules.Sign()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_state_dict_goes_on_with_the_same_bits(rule, dtype, tmp_path):
    a = nn.Parameter(make().detach().to(dtype))
    first = dbt.XOR([a], lr=0.5, rule=rule, seed=3)
    train(a, first, range(4))
    torch.save({"table": a.detach(), "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    b = nn.Parameter(saved["table"])
    second = dbt.XOR([b])
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["rule"] == rule
    assert_same(everything(a, first), everything(b, second))
    train(a, first, range(4, 9))
    train(b, second, range(4, 9))
    assert_same(everything(a, first), everything(b, second))
    assert second.state[b].get("scale_m", torch.zeros(1)).dtype == torch.float32


def test_a_loaded_state_shares_nothing_with_its_source():
    a, b = make(), make()
    first, second = dbt.XOR([a]), dbt.XOR([b])
    train(a, first, range(2))
    second.load_state_dict(first.state_dict())
    kept = everything(a, first)
    train(b, second, range(2, 4))
    assert_same(everything(a, first), kept)


def test_deepcopy_of_the_optimizer():
    table = make()
    optimizer = dbt.XOR([table])
    train(table, optimizer, range(2))
    again = copy.deepcopy(optimizer)
    other = again.param_groups[0]["params"][0]
    train(table, optimizer, range(2, 4))
    train(other, again, range(2, 4))
    assert_same(everything(table, optimizer), everything(other, again))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["state"][0].pop("count"), "state must hold"),
        (lambda s: s["state"][0].update(other=1), "state must hold"),
        (lambda s: s["state"][0].update(step=-1), "state 'step' must be an int of at least 0"),
        (lambda s: s["state"][0].update(counter=torch.zeros(40, 20, dtype=torch.uint8)), r"state 'counter' must be.*\[40, 21\]"),
        (lambda s: s["state"][0].update(scale_m=torch.zeros(40).half()), "state 'scale_m' must be.*float32"),
        (lambda s: s["param_groups"][0].pop("rule"), "must come from an XOR optimizer"),
    ],
)
def test_load_state_dict_names_what_is_wrong(damage, message):
    table = make()
    optimizer = dbt.XOR([table])
    train(table, optimizer, range(2))
    kept, state = everything(table, optimizer), copy.deepcopy(optimizer.state_dict())
    damage(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(everything(table, optimizer), kept)


@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(2, every=3), rules.Bop()], ids=str)
def test_export_and_import_go_on_with_the_same_bits(rule):
    a = make()
    first = dbt.XOR([a], rule=rule)
    train(a, first, range(4))
    exported = first.export_state({"emb": a})
    assert all(isinstance(value, np.ndarray | int) for value in exported["emb"].values())
    assert exported["emb"]["step"] == 4 // rule.every
    b = copy.deepcopy(a)
    second = dbt.XOR([b], rule=rule)
    second.import_state(exported, {"emb": b})
    train(a, first, range(4, 8))
    train(b, second, range(4, 8))
    assert_same(everything(a, first), everything(b, second))


def test_an_export_shares_nothing_with_the_state():
    table = make()
    optimizer = dbt.XOR([table])
    train(table, optimizer, range(2))
    exported = optimizer.export_state()
    kept = {name: np.copy(value) for name, value in exported["0"].items()}
    train(table, optimizer, range(2, 4))
    for name, value in kept.items():
        np.testing.assert_array_equal(exported["0"][name], value)


def test_export_before_the_first_step_and_default_names():
    a, b = make(), make(rows=10, dim=9)
    exported = dbt.XOR([{"params": [a], "rule": rules.Sign(), "scale_lr": 0}, {"params": [b]}]).export_state()
    assert exported["0"] == {"step": 0}
    assert exported["1"]["counter"].shape == (10, 14)
    assert not exported["1"]["counter"].any()


def test_import_names_what_is_wrong():
    table = make()
    optimizer = dbt.XOR([table])
    train(table, optimizer, range(2))
    kept, good = everything(table, optimizer), optimizer.export_state({"emb": table})
    with pytest.raises(ValueError, match="states must hold 'emb', got"):
        optimizer.import_state({"other": good["emb"]}, {"emb": table})
    with pytest.raises(ValueError, match=r"states\['emb'\]: state 'count' must be"):
        optimizer.import_state({"emb": good["emb"] | {"count": np.zeros(40)}}, {"emb": table})
    with pytest.raises(ValueError, match=r"names\['emb'\] must be a table of this optimizer"):
        optimizer.import_state(good, {"emb": make()})
    assert_same(everything(table, optimizer), kept)


def test_capturable_keeps_the_step_on_the_device_and_the_bits():
    outcomes = []
    for capturable in (False, True):
        torch.manual_seed(0)
        table = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(30, 20)))
        rate = torch.tensor(1.0) if capturable else 1.0
        opt = dbt.XOR([table], lr=rate, rule=rules.Counter(3), seed=2**63 + 5, capturable=capturable)
        for step in range(6):
            ids = torch.randint(0, 30, (50,))
            dbt.lookup(table, ids).backward(torch.randn(50, 20))
            if capturable:
                rate.fill_(1 / (1 + step))
            else:
                opt.param_groups[0]["lr"] = 1 / (1 + step)
            opt.step()
            opt.zero_grad()
        assert isinstance(opt.state[table]["step"], torch.Tensor) is capturable
        outcomes.append((table.bits.clone(), table.scale.clone(), opt.export_state()["0"]))
        again = dbt.XOR([table], lr=rate, rule=rules.Counter(3), capturable=capturable)
        again.load_state_dict(opt.state_dict())
        assert int(again.state[table]["step"]) == 6
    for a, b in zip(outcomes[0][:2], outcomes[1][:2], strict=True):
        assert torch.equal(a, b)
    assert outcomes[0][2]["step"] == outcomes[1][2]["step"] == 6
    assert all((outcomes[0][2][name] == outcomes[1][2][name]).all() for name in ("counter", "count", "scale_m", "scale_v"))


def test_capturable_bad_options(table):
    with pytest.raises(ValueError, match="capturable needs a rule with every=1"):
        dbt.XOR([table], rule=rules.Counter(2, every=2), capturable=True)
    with pytest.raises(TypeError, match="capturable must be True or False"):
        dbt.XOR([table], capturable=1)
    with pytest.raises(TypeError, match="lr must be a number or a float tensor"):
        dbt.XOR([table], lr=torch.ones(2), capturable=True)
