"""Tables, modules and optimizers that are written, read, copied and handed to other processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dualbin
import dualbin.torch as dbt
from dualbin import rules


class Net(nn.Module):
    def __init__(self, rows: int = 40, dim: int = 11, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = dbt.BinaryEmbedding(rows, dim, padding_idx=1)
        self.fc = nn.Linear(dim, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.emb(ids))


def train(net: nn.Module, optimizer: dbt.XOR, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 40, (25,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(ids).cos().sum().backward()
        optimizer.step()


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RULES = [rules.Counter(2), rules.Counter(8, every=3), rules.Bop()]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_everything_in_one_file(rule: rules.Rule) -> None:
    net, other = Net(), Net(seed=1)
    a, b = (dbt.XOR([n.emb.weight], rule=rule, seed=7) for n in (net, other))
    train(net, a, range(5))
    state = saved_and_loaded({"net": net.state_dict(), "xor": a.state_dict()})
    other.load_state_dict(state["net"])
    b.load_state_dict(state["xor"])
    for n, optimizer in ((net, a), (other, b)):
        train(n, optimizer, range(5, 9))
    assert torch.equal(net.emb.weight, other.emb.weight)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_safetensors_through_dualbin_io(rule: rules.Rule, tmp_path: Path) -> None:
    net, other = Net(), Net(seed=1)
    other.fc.load_state_dict(net.fc.state_dict())
    a, b = (dbt.XOR([n.emb.weight], rule=rule, seed=7) for n in (net, other))
    train(net, a, range(5))
    names = {"items": net.emb.weight}
    dualbin.io.save(tmp_path / "net.safetensors", names, a.export_state(names))
    tables, states = dualbin.io.load(tmp_path / "net.safetensors")
    bits, scale = torch.from_numpy(tables["items"].bits), torch.from_numpy(tables["items"].scale)
    other.emb.load_state_dict({"weight.bits": bits, "weight.scale": scale})
    b.import_state(states, {"items": other.emb.weight})
    for n, optimizer in ((net, a), (other, b)):
        train(n, optimizer, range(5, 9))
    assert torch.equal(net.emb.weight, other.emb.weight)


@pytest.mark.parametrize(("saved", "loading"), [(11, 16), (16, 11), (9, 10)])
def test_another_dim_in_the_same_bytes_is_named(saved: int, loading: int) -> None:
    """Both have two bytes a row, so the arrays alone may look right."""
    source, net = Net(dim=saved), nn.Sequential(dbt.BinaryEmbedding(40, loading))
    source.emb.weight.bits.zero_()
    before = net[0].weight.detach().clone()
    state = saved_and_loaded(nn.Sequential(source.emb).state_dict())
    with pytest.raises(RuntimeError, match=f"dim mismatch for 0.weight: this table has dim {loading}, the state_dict's has dim {saved}"):
        net.load_state_dict(state)
    assert torch.equal(net[0].weight, before)


def test_a_missing_module_and_a_prefix_do_not_disturb() -> None:
    net = Net()
    plain = dict(net.state_dict())  # without metadata, as safetensors gives it
    assert net.load_state_dict(plain).missing_keys == []
    assert "emb.weight.bits" in net.state_dict()
    assert "model.emb.weight.scale" in net.state_dict(prefix="model.")


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), copy.copy], ids=["deepcopy", "pickle", "copy"]
)
def test_copies_of_module_and_optimizer_together(duplicate: Any) -> None:
    """The copied optimizer trains the copied table."""
    net = Net()
    optimizer = dbt.XOR([net.emb.weight], rule=rules.Counter(4))
    train(net, optimizer, range(3))
    if duplicate is copy.copy:
        shallow = copy.copy(net)
        assert shallow.emb.weight is net.emb.weight
        return
    again, its_optimizer = duplicate((net, optimizer))
    assert its_optimizer.param_groups[0]["params"][0] is again.emb.weight
    train(net, optimizer, range(3, 6))
    before = again.emb.weight.detach().clone()
    train(again, its_optimizer, range(3, 6))
    assert torch.equal(again.emb.weight, net.emb.weight)
    assert not torch.equal(again.emb.weight, before)


def test_casts_and_back_keep_the_scale_to_the_last_bit() -> None:
    net = Net()
    scale = net.emb.weight.scale.clone()
    optimizer = dbt.XOR([net.emb.weight])
    train(net, optimizer, range(2))
    scale = net.emb.weight.scale.clone()
    for cast in (net.half, net.bfloat16, net.float, lambda: net.to(torch.float16), lambda: net.to("cpu")):
        cast()
        assert torch.equal(net.emb.weight.scale, scale)
        assert net.emb.weight.scale.dtype == torch.float32
    assert net.emb.weight.dtype == torch.float16
    net.float()
    train(net, optimizer, range(2, 4))  # the optimizer still has the parameter
    assert not torch.equal(net.emb.weight.scale, scale)


def test_double_is_refused_before_anything_changes() -> None:
    net = Net()
    with pytest.raises(TypeError, match="dtype of a BinaryTable must be"):
        net.emb.double()
    assert net.emb.weight.dtype == torch.float32


@pytest.mark.slow
def test_lookups_in_forked_and_spawned_workers() -> None:
    script = str(Path(__file__).with_name("workers.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, script], env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
