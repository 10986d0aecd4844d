"""The state of XOR: saved and loaded, copied, handed to the other frontend, kept on the device."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin import rules
from xor_steps import assert_same, everything, make, train


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
    assert second.param_groups[0]["rule"] == rules.resolve(rule, 1, 20)
    assert_same(everything(a, first), everything(b, second))
    train(a, first, range(4, 9))
    train(b, second, range(4, 9))
    assert_same(everything(a, first), everything(b, second))
    assert second.state[b]["record"].dtype == torch.int32


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
        (lambda s: s["state"][0].pop("record"), "state must hold"),
        (lambda s: s["state"][0].update(other=1), "state must hold"),
        (lambda s: s["state"][0].update(step=-1), "state 'step' must be an int of at least 0"),
        (lambda s: s["state"][0].update(counter=torch.zeros(40, 20, dtype=torch.uint8)), r"state 'counter' must be.*\[40, 21\]"),
        (lambda s: s["state"][0].update(record=torch.zeros(40, 4).half()), "state 'record' must be.*int32"),
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


def test_the_state_dict_functions_of_torch_distributed():
    """They make a step with empty gradients to learn what a fresh optimizer's state looks like."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    modules = [dbt.BinaryEmbedding(50, 11) for _ in range(2)]
    first, second = (dbt.XOR([module.weight], lr=0.5, rule=rules.Counter(4), seed=3) for module in modules)
    for module, optimizer in zip(modules, (first, second), strict=True):
        get_state_dict(module, optimizer)
    train(modules[0].weight, first, range(3))
    weights, state = get_state_dict(modules[0], first)
    set_state_dict(modules[1], second, model_state_dict=weights, optim_state_dict=state)
    for module, optimizer in zip(modules, (first, second), strict=True):
        train(module.weight, optimizer, range(3, 6))
    assert_same(*(everything(module.weight, optimizer) for module, optimizer in zip(modules, (first, second), strict=True)))
