"""XOR.load_state_dict: whatever torch's own optimizers survive. Each load goes on with the same bits."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import dualbin.torch as dbt
from dualbin import rules
from xor_steps import assert_same, everything, make, train


def through_state_dict(table, source, target):
    for _ in range(2):
        target.load_state_dict(source.state_dict())


def through_deepcopy(table, source, target):
    target.load_state_dict(copy.deepcopy(source).state_dict())
    copy.deepcopy(target).load_state_dict(source.state_dict())


def through_pickle(table, source, target):
    pickle.loads(pickle.dumps(target)).load_state_dict(source.state_dict())
    target.load_state_dict(pickle.loads(pickle.dumps(source)).state_dict())


def through_setstate(table, source, target):
    target.__setstate__({"state": target.state, "param_groups": target.param_groups})
    target.load_state_dict(source.state_dict())


def through_torch_distributed(options):
    def load(table, source, target):
        old, new = nn.Module(), nn.Module()
        old.weight, new.weight = source.param_groups[0]["params"][0], table
        for _ in range(2):
            set_optimizer_state_dict(new, target, get_optimizer_state_dict(old, source, options=options), options=options)

    return load


@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(2, every=3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "load",
    [
        through_state_dict,
        through_deepcopy,
        through_pickle,
        through_setstate,
        through_torch_distributed(StateDictOptions()),
        through_torch_distributed(StateDictOptions(full_state_dict=True, cpu_offload=True)),
        through_torch_distributed(StateDictOptions(flatten_optimizer_state_dict=True)),
    ],
    ids=["state_dict", "deepcopy", "pickle", "setstate", "distributed", "distributed_full", "distributed_flat"],
)
def test_every_way_to_load_goes_on_with_the_same_bits(load, dtype, rule):
    a = nn.Parameter(make().detach().to(dtype))
    first = dbt.XOR([a], lr=0.5, rule=rule, seed=3)
    train(a, first, range(4))
    b = nn.Parameter(a.detach().clone())
    second = dbt.XOR([b], rule=rule)
    a_grad, a.grad, b.grad = a.grad, None, None
    load(b, first, second)
    a.grad = a_grad
    assert_same(everything(a, first), everything(b, second))
    train(a, first, range(4, 8))
    train(b, second, range(4, 8))
    assert_same(everything(a, first), everything(b, second))


def test_a_rule_with_integers_of_numpy_is_plain_data(tmp_path):
    optimizer = dbt.XOR([make()], rule=rules.Counter(np.int64(4), every=np.int32(2)))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == optimizer.state_dict()


def test_a_state_dict_from_before_there_were_norms_is_refused():
    """Its counters have their planes in the opposite order; with a frozen scale the arrays have the names and shapes of today."""
    table = make()
    optimizer = dbt.XOR([table], rule=rules.Counter(4), scale_lr=0.0)
    train(table, optimizer, range(3))
    old, before = optimizer.state_dict(), everything(table, optimizer)
    del old["param_groups"][0]["rule"]["Counter"]["norm"]
    with pytest.raises(ValueError, match=r'opposite order .*import_state and Counter\(norm="rms"\)'):
        optimizer.load_state_dict(old)
    assert_same(before, everything(table, optimizer))


def test_groups_can_be_added_after_a_load():
    a, b = make(), make(rows=10, dim=9)
    first = dbt.XOR([a], seed=5)
    train(a, first, range(2))
    second = dbt.XOR([a])
    second.load_state_dict(first.state_dict())
    second.add_param_group({"params": [b], "lr": 0.5})
    train(b, second, range(2))
    assert [group["seed"] for group in second.param_groups] == [5, 0]
    third = dbt.XOR([{"params": [a]}, {"params": [b]}])
    third.load_state_dict(second.state_dict())
    assert_same(everything(b, second), everything(b, third))
    with pytest.raises(ValueError, match=r"param groups of \[1\] parameters, as this optimizer has, got groups of \[1, 1\]"):
        first.load_state_dict(second.state_dict())


def test_hooks_see_plain_tensors_before_and_the_loaded_state_after():
    table, seen = make(), []
    optimizer = dbt.XOR([table])
    train(table, optimizer, range(2))
    saved = optimizer.state_dict()

    def with_frozen_scales(_, state):
        seen.append({type(value) for value in state["state"][0].values()})
        groups = [group | {"scale_lr": 0.0} for group in state["param_groups"]]
        return {"state": state["state"], "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(lambda _, state: state.update(state=copy.deepcopy(state["state"])))
    optimizer.register_load_state_dict_pre_hook(with_frozen_scales)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(sorted(loaded.state[table])))
    optimizer.load_state_dict(saved)
    assert seen == [{int, torch.Tensor}, ["counter", "squares", "step"]]
    assert "record" in saved["state"][0]
    assert optimizer.param_groups[0]["scale_lr"] == 0


def test_a_step_on_the_device_is_loaded_as_it_is():
    table = make()
    first = dbt.XOR([table], capturable=True)
    train(table, first, range(2))
    second = dbt.XOR([table])
    second.load_state_dict(first.state_dict())
    step = second.state[table]["step"]
    assert (step.dtype, int(step)) == (torch.int64, 2)
    assert step is not first.state[table]["step"]


def test_accelerate_saves_and_loads_twice(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(dbt.BinaryEmbedding(40, 20), nn.Linear(20, 2))
    xor = dbt.XOR([model[0].weight], rule=rules.Counter(4))
    accelerator = accelerate.Accelerator(cpu=True)
    model, xor = accelerator.prepare(model, xor)

    def steps():
        for ids in torch.arange(12).view(3, 4):
            accelerator.backward(model(ids).pow(2).sum())
            xor.step()
            xor.zero_grad()
        return model[0].weight.bits.clone(), xor.optimizer.export_state()["0"]

    steps()
    accelerator.save_state(str(tmp_path))
    bits, state = steps()
    for _ in range(2):
        accelerator.load_state(str(tmp_path))
        again_bits, again = steps()
        assert torch.equal(again_bits, bits)
        assert again["step"] == state["step"] == 6
        assert all(torch.equal(torch.as_tensor(again[name]), torch.as_tensor(state[name])) for name in state)
