"""What a step takes over from the one before: nothing that was changed in between, in whatever way."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import profile

import dualbin.torch as dbt
from dualbin.rules import Bop, Counter, Sign
from xor_steps import assert_same, batch, everything, make

RULES = [Counter(8), Counter(8, norm="rms"), Counter(3, every=2), Counter(3), Bop(), Sign()]


def new_values(table, optimizer):
    """A load into the parameter as `load_state_dict(assign=True)` makes it: other memory, other rows."""
    table.data = make(rows=table.shape[0], seed=8).data


def as_copies(table, optimizer):
    optimizer.state[table] = copy.deepcopy(dict(optimizer.state[table]))


def fresh_state(table, optimizer):
    optimizer.state.pop(table, None)


def loaded(table, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def replaced_array(table, optimizer):
    state = optimizer.state[table]
    name = next((name for name, value in state.items() if isinstance(value, torch.Tensor) and value.ndim == 2), None)
    if name is not None:
        state[name] = state[name].clone()


def zeroed_step(table, optimizer):
    if "step" in optimizer.state[table]:
        optimizer.state[table]["step"] = 0


def resized_array(table, optimizer):
    state = optimizer.state[table]
    if "record" in state:
        state["record"].resize_(3, 4)


def renamed_array(table, optimizer):
    state = optimizer.state[table]
    if "record" in state:
        state["another"] = state.pop("record")


def other_dtype(table, optimizer):
    state = optimizer.state[table]
    if "record" in state:
        state["record"] = state["record"].float()


def other_step(table, optimizer):
    if "step" in optimizer.state[table]:
        optimizer.state[table]["step"] = torch.tensor(5)


def frozen(table, optimizer):
    dbt.freeze_rows(table, [1, 2, 3])


def as_it_is(table, optimizer):
    pass


def option(name, value):
    def change(table, optimizer):
        optimizer.param_groups[0][name] = value

    change.__name__ = f"{name} {value}"
    return change


OPTIONS = [
    *(option("rule", rule) for rule in RULES),
    *(option("lr", lr) for lr in (0.5, 1, -1.0, float("nan"), "1", torch.tensor(0.25), None)),
    *(option("scale_lr", rate) for rate in (0.0, 1e-2, torch.tensor(1e-3), -1.0, "1")),
    *(option("seed", seed) for seed in (3, -1, 2**64, 1.5)),
    *(option("capturable", flag) for flag in (True, False, 1)),
]
CHANGES = [new_values, as_copies, fresh_state, loaded, replaced_array, zeroed_step, resized_array, renamed_array]
CHANGES += [other_dtype, other_step, frozen, as_it_is, *OPTIONS]


def error_of(call, *arguments):
    try:
        call(*arguments)
    except (TypeError, ValueError) as error:
        return type(error)
    return None


def step(table, optimizer, number):
    table.grad = dbt.RowGrad(*batch(number), table.shape)
    return error_of(optimizer.step)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(RULES), st.lists(st.sampled_from(CHANGES), min_size=1, max_size=5))
def test_a_change_between_steps_means_what_it_means_to_a_first_step(rule, changes):
    runs = []
    for remembers in (True, False):
        table = make()
        optimizer = dbt.XOR([table], rule=rule)
        errors = []
        for number, change in enumerate([as_it_is, as_it_is, *changes]):
            errors.append(error_of(change, table, optimizer))
            if not remembers:
                for prepared in optimizer._prepared.values():
                    prepared._made_from = None
            errors.append(step(table, optimizer, number))
        runs.append((everything(table, optimizer), errors, optimizer.stats()))
    (a, errors_a, stats_a), (b, errors_b, stats_b) = runs
    assert errors_a == errors_b
    assert_same(a, b)
    assert stats_a == stats_b


@pytest.mark.parametrize("change", [resized_array, option("lr", -1.0), option("seed", -1), option("scale_lr", "1")])
def test_a_step_that_raises_has_changed_no_table(change):
    tables = [make(seed=seed) for seed in (0, 1)]
    optimizer = dbt.XOR([{"params": tables[:1]}, {"params": tables[1:]}])
    for number in range(2):
        for table in tables:
            ids, dy = batch(number)
            table.grad = dbt.RowGrad(ids, dy, table.shape)
        optimizer.step()
    before = everything(tables[0], optimizer)
    optimizer.param_groups.reverse()
    change(tables[1], optimizer)
    optimizer.param_groups.reverse()
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert_same(before, everything(tables[0], optimizer))


@pytest.mark.parametrize("lr", [1e39, 2.0**128])
def test_an_lr_that_float32_has_not_is_refused(lr):
    table = make()
    with pytest.raises(ValueError, match=r"lr must be finite and at most 3\.4028"):
        dbt.XOR([table], lr=lr)
    optimizer = dbt.XOR([table])
    optimizer.param_groups[0]["lr"] = lr
    table.grad = dbt.RowGrad(*batch(0), table.shape)
    before = table.bits.clone()
    with pytest.raises(ValueError, match=r"lr must be finite and at most 3\.4028"):
        optimizer.step()
    assert torch.equal(table.bits, before)


def test_two_groups_of_one_table_each_have_their_own_options():
    tables = [make(), make()]
    both = dbt.XOR([{"params": tables[:1], "rule": Counter(8)}, {"params": tables[1:], "rule": Counter(2), "lr": 0.5, "seed": 4}])
    alone = [make(), make()]
    each = [dbt.XOR(alone[:1], rule=Counter(8)), dbt.XOR(alone[1:], rule=Counter(2), lr=0.5, seed=4)]
    for number in range(4):
        for table in (*tables, *alone):
            table.grad = dbt.RowGrad(*batch(number), table.shape)
        for optimizer in (both, *each):
            optimizer.step()
    for mine, other in zip(tables, alone, strict=True):
        assert torch.equal(mine, other)


# ---- what torch.optim does around a step -------------------------------------------------------------------------------------------------


def test_hooks_of_all_kinds_run_once_and_in_order():
    table, log = make(), []
    optimizer = dbt.XOR([table])
    table.grad = dbt.RowGrad(*batch(0), table.shape)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: log.append("all before")),
        register_optimizer_step_post_hook(lambda *_: log.append("all after")),
        optimizer.register_step_pre_hook(lambda _, args, kwargs: log.append(("before", len(args), kwargs))),
        optimizer.register_step_post_hook(lambda *_: log.append("after")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert log == ["all before", ("before", 1, {}), "after", "all after"]
    optimizer.step()
    assert len(log) == 4


def test_a_profiler_sees_the_step_by_its_name():
    table = make()
    optimizer = dbt.XOR([table])
    table.grad = dbt.RowGrad(*batch(0), table.shape)
    with profile() as profiler:
        optimizer.step()
    assert "Optimizer.step#XOR.step" in {event.key for event in profiler.key_averages()}


def test_a_step_leaves_the_grad_mode_as_it_was():
    table = make()
    optimizer = dbt.XOR([table])
    seen = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            for bad in (False, True):
                table.grad = dbt.RowGrad(*batch(0), table.shape)
                optimizer.param_groups[0]["lr"] = "1" if bad else 1.0
                try:
                    optimizer.step()
                except TypeError:
                    seen.append("raised")
                seen.append(torch.is_grad_enabled())
    assert seen == [True, "raised", True, False, "raised", False]


def test_a_scheduler_sets_the_rate_of_the_next_step():
    modules = [nn.Module(), nn.Module()]
    for module in modules:
        module.table = make()
    runs = [dbt.XOR([module.table]) for module in modules]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(runs[0], 0.5)
    for number in range(4):
        for module, optimizer in zip(modules, runs, strict=True):
            module.table.grad = dbt.RowGrad(*batch(number), module.table.shape)
            optimizer.step()
        scheduler.step()
        runs[1].param_groups[0]["lr"] = 0.5 ** (number + 1)
    assert torch.equal(modules[0].table, modules[1].table)
