"""Tables of several planes on a GPU: the bits of the CPU, from packing to a captured step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

V, D = 60, 20
PAIRS = [(2, 2), (8, 2), (8, 4), (8, 8)]


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    return module


def tables(dbt: Any, planes: int, dtype: Any = None) -> list[Any]:
    """The same on the CPU and on the GPU."""
    w = torch.randn(V, D, generator=torch.Generator().manual_seed(planes)).to(dtype or torch.float32)
    return [torch.nn.Parameter(dbt.BinaryTable.from_float(w.to(device), padding_idx=3, planes=planes)) for device in ("cpu", "cuda")]


def train(dbt: Any, table: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids, dy = torch.randint(0, V, (40,), generator=generator), torch.randn(40, D, generator=generator)
        dbt.lookup(table, ids.to(table.device)).backward(dy.to(table.device))
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(a.bits.cpu(), b.bits.cpu())
    assert torch.equal(a.scale.cpu(), b.scale.cpu())


def assert_same_states(a: Any, b: Any) -> None:
    mine, theirs = a.export_state()["0"], b.export_state()["0"]
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("planes", [2, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tables_and_what_is_made_of_them(dbt: Any, planes: int, dtype: str) -> None:
    here, there = tables(dbt, planes, getattr(torch, dtype))
    assert there.planes == planes
    assert_same(here, there)
    assert torch.equal(here.dequantize(), there.dequantize().cpu())
    for fewer in range(1, planes + 1):
        for rescale in (False, True):
            assert_same(here.with_planes(fewer, rescale=rescale), there.with_planes(fewer, rescale=rescale))
    other = torch.randn(V, D, generator=torch.Generator().manual_seed(99), dtype=torch.float32).to(here.dtype)
    others = [dbt.BinaryTable.from_float(other.to(device), planes=planes) for device in ("cpu", "cuda")]
    assert_same(*(dbt.average(mine, theirs, 0.4, step=1) for mine, theirs in zip((here, there), others, strict=True)))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(dbt: Any, mode: str) -> None:
    outcomes = []
    for device in ("cpu", "cuda"):
        bag = dbt.BinaryEmbeddingBag.from_float(torch.randn(V, D, generator=torch.Generator().manual_seed(0)).to(device), mode, 3, planes=4)
        ids = torch.arange(24, device=device).view(4, 6)
        weights = torch.linspace(-1, 2, 24, device=device).view(4, 6).requires_grad_() if mode == "sum" else None
        y = bag(ids, None, weights)
        y.pow(2).sum().backward()
        outcomes.append([y, bag.weight.grad.coalesce().rows, *([weights.grad] if mode == "sum" else [])])
    for here, there in zip(*outcomes, strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize(("bits", "planes"), PAIRS)
@pytest.mark.parametrize("norm", rules.NORMS)
@pytest.mark.parametrize("every", [1, 2])
def test_training(dbt: Any, bits: int, planes: int, norm: str, every: int) -> None:
    """With a scale that is trained, frozen, and trained again."""
    pair = tables(dbt, planes)
    before = pair[0].detach().clone()
    optimizers = [dbt.XOR([table], rule=rules.Counter(bits, norm=norm, every=every), seed=7) for table in pair]
    for table, optimizer in zip(pair, optimizers, strict=True):
        train(dbt, table, optimizer, range(5))
        optimizer.param_groups[0]["scale_lr"] = 0.0
        train(dbt, table, optimizer, range(5, 8))
        assert "record" not in optimizer.state[table]
        optimizer.param_groups[0]["scale_lr"] = 3e-3
        train(dbt, table, optimizer, range(8, 10))
    assert not torch.equal(pair[0].bits, before.bits)
    assert_same(*pair)
    assert_same_states(*optimizers)
    assert optimizers[0].stats() == optimizers[1].stats()


def test_a_captured_step_of_adagrad(dbt: Any) -> None:
    eager, table = tables(dbt, 4)[1], tables(dbt, 4)[1]
    optimizers = [dbt.XOR([eager], seed=3), dbt.XOR([table], seed=3, capturable=True)]
    train(dbt, eager, optimizers[0], range(12))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(dbt, table, optimizers[1], range(2))  # the warm-up
    torch.cuda.current_stream().wait_stream(side)
    ids, dy = torch.zeros(40, dtype=torch.int64, device="cuda"), torch.zeros(40, D, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dbt.lookup(table, ids).backward(dy)
        optimizers[1].step()
        optimizers[1].zero_grad()
    for step in range(2, 12):
        generator = torch.Generator().manual_seed(step)
        ids.copy_(torch.randint(0, V, (40,), generator=generator))
        dy.copy_(torch.randn(40, D, generator=generator))
        graph.replay()
    assert_same(eager, table)
    assert_same_states(*optimizers)


def test_a_state_without_squares(dbt: Any) -> None:
    table = tables(dbt, 2)[1]
    optimizer = dbt.XOR([table], rule=rules.Counter(8, norm="rms"))
    train(dbt, table, optimizer, range(2))
    optimizer.param_groups[0]["rule"] = rules.Counter(8, norm="adagrad")
    before = table.detach().clone()
    with pytest.raises(ValueError, match=r'use Counter\(norm="rms"\) with it'):
        train(dbt, table, optimizer, range(2, 3))
    assert_same(before, table)
