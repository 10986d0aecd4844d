"""What goes wrong on a GPU leaves tables and states unchanged; and tables that move between devices go on with the same bits."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

V, D = 300, 20
DEVICE = "cuda"
RULES = [rules.Counter(8), rules.Counter(3, every=2), rules.Bop()]


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    return module


def make_net(dbt: Any, device: str = "cpu", dtype: Any = None) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(dbt.BinaryEmbedding(V, D, padding_idx=1, dtype=dtype)).to(device)


def train(net: Any, optimizer: Any, steps: range) -> None:
    """Steps whose gradient has the same bits on every device."""
    table = net[0].weight
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids, dy = torch.randint(0, V, (90,), generator=generator), torch.randn(90, D, generator=generator)
        net(ids.to(table.device)).backward(dy.to(table.device, table.dtype))
        optimizer.step()
        optimizer.zero_grad()


def everything(table: Any, optimizer: Any) -> dict[str, Any]:
    """Copies of all that a step may change, on the CPU."""
    state = optimizer.state[table]
    arrays = {"bits": table.bits, "scale": table.scale, **state}
    return {name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value for name, value in arrays.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


# ---- faults ------------------------------------------------------------------------------------------------------------------------------


def test_no_memory_for_the_workspace(dbt: Any) -> None:
    from dualbin import _native
    from dualbin.torch import _native_call

    net = make_net(dbt, DEVICE)
    table = net[0].weight
    optimizer = dbt.XOR([table])
    train(net, optimizer, range(1))
    device, count = _native_call.ordinal(table.device), 1 << 16
    while _native.workspace_bytes("update", device, 1, count, V, D) < 64 << 20:
        count *= 2
    ids = torch.randint(2, V, (count,), device=DEVICE)
    net(ids).backward(torch.ones(count, D, device=DEVICE))
    before, grad = everything(table, optimizer), table.grad
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(table.device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)  # room for scraps, not for the workspace
    try:
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(everything(table, optimizer), before)
    assert table.grad is grad
    optimizer.step()
    assert optimizer.state[table]["step"] == 2
    assert optimizer.stats()["rows"] > 0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_wrong_devices_are_refused_and_change_nothing(dbt: Any, rule: rules.Rule) -> None:
    net = make_net(dbt)
    table = net[0].weight
    optimizer = dbt.XOR([table], rule=rule)
    train(net, optimizer, range(3))
    state = optimizer.state_dict()
    net.to(DEVICE)
    assert net[0].weight is table
    before = everything(table, optimizer)
    ids = torch.tensor([2, 3], device=DEVICE)
    net(ids).sum().backward()
    with pytest.raises(ValueError, match="is on cpu, but the table is on cuda:0: make the optimizer after moving it"):
        optimizer.step()
    with pytest.raises(ValueError, match="ids must be on the device of the table, cuda:0, got cpu"):
        net(ids.cpu())
    with pytest.raises(ValueError, match="scale must be on the device of bits, cuda:0, got cpu"):
        dbt.BinaryTable(table.bits, table.scale.cpu(), D)
    with pytest.raises(RuntimeError, match="device"):  # torch's own check
        table.grad = dbt.RowGrad(ids.cpu(), torch.ones(2, D), (V, D))
    assert_same(everything(table, optimizer), before)
    optimizer.load_state_dict(state)  # moves it
    optimizer.step()
    assert optimizer.state[table]["step"] in {2, 4}


def test_bad_ids_in_an_update_change_no_other_row(dbt: Any) -> None:
    net = make_net(dbt, DEVICE)
    table = net[0].weight
    optimizer = dbt.XOR([table])
    train(net, optimizer, range(2))
    before = everything(table, optimizer)
    table.grad = dbt.RowGrad(torch.tensor([V, -1, 2**40], device=DEVICE), torch.ones(3, D, device=DEVICE), (V, D))
    optimizer.step()
    after = everything(table, optimizer)
    assert after.pop("step") == before.pop("step") + 1
    assert_same(after, before)
    assert torch.ones(3, device=DEVICE).sum().item() == 3, "the context is alive"


# ---- moving ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("there", ["cuda", "cpu"])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(dbt: Any, rule: rules.Rule, kind: str, there: str) -> None:
    here = "cpu" if there == DEVICE else DEVICE
    net = make_net(dbt, here, getattr(torch, kind))
    optimizer = dbt.XOR([net[0].weight], rule=rule, seed=3)
    train(net, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "xor": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location=there)
    again = make_net(dbt, there, getattr(torch, kind))
    its_optimizer = dbt.XOR([again[0].weight])
    again.load_state_dict(saved["net"])
    its_optimizer.load_state_dict(saved["xor"])
    assert again[0].weight.device.type == there
    for each, its in ((net, optimizer), (again, its_optimizer)):
        train(each, its, range(5, 11))
    assert_same(everything(again[0].weight, its_optimizer), everything(net[0].weight, optimizer))


def test_casts_copies_and_empty_modules(dbt: Any) -> None:
    net = make_net(dbt, DEVICE)
    table, bits, scale = net[0].weight, net[0].weight.bits.clone(), net[0].weight.scale.clone()
    for cast in (net.half, net.bfloat16, net.float, net.cpu, lambda: net.to(DEVICE)):
        cast()
        assert net[0].weight is table
        assert torch.equal(table.bits.cpu(), bits.cpu())
        assert torch.equal(table.scale.cpu(), scale.cpu())
        assert table.scale.dtype is torch.float32
    again = copy.deepcopy(net)
    again[0].reset_parameters()
    assert torch.equal(table.bits, bits)
    with torch.device("meta"):
        empty = torch.nn.Sequential(dbt.BinaryEmbedding(V, D, padding_idx=1))
    empty.to_empty(device=DEVICE)
    empty.load_state_dict(net.state_dict())
    ids = torch.arange(V, device=DEVICE)
    assert torch.equal(empty(ids), net(ids))
    pinned = table.detach().cpu().pin_memory()
    assert pinned.is_pinned()
    assert torch.equal(pinned.to(DEVICE, non_blocking=True).bits, bits)
