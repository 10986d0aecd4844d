"""What only a GPU can show of the PyTorch frontend: streams, graphs, bad ids, no waiting, errors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from dualbin import reference, rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

V, D = 300, 100


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    yield module
    with torch.no_grad():
        torch.cuda.synchronize()


def make_table(dbt: Any, seed: int = 0, device: str = "cuda", rows: int = V, dim: int = D) -> Any:
    w = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    bits, scale = torch.from_numpy(reference.pack(w)).to(device), torch.from_numpy(reference.row_scale(w)).to(device)
    return torch.nn.Parameter(dbt.BinaryTable(bits, scale, dim))


def batches(steps: int, n: int = 77) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(1)
    return [(rng.integers(0, V, n), rng.normal(size=(n, D)).astype(np.float32)) for _ in range(steps)]


def test_from_float_on_the_device_gives_the_bits_of_the_cpu(dbt: Any) -> None:
    w = torch.randn(50, 33)
    w[7] = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        here, there = dbt.BinaryTable.from_float(w.to(dtype)), dbt.BinaryTable.from_float(w.to(dtype).cuda())
        assert torch.equal(here.bits, there.bits.cpu())
        assert torch.equal(here.scale, there.scale.cpu())
        assert torch.equal(here.dequantize(), there.dequantize().cpu())
    with pytest.raises(ValueError, match=r"NaN|finite"):
        dbt.BinaryTable.from_float(torch.full((2, 2), float("nan")).cuda())


@pytest.mark.parametrize("bad", [-1, V, 2**40])
def test_bad_ids_give_nan_rows_and_a_later_error(dbt: Any, bad: int) -> None:
    table = make_table(dbt)
    opt = dbt.XOR([table], scale_lr=3e-3)
    dbt.check_errors()
    before = table.bits.clone()
    ids = torch.tensor([3, bad, 4, bad], device="cuda")
    y = dbt.lookup(table, ids)
    assert torch.isnan(y[[1, 3]]).all()
    assert torch.equal(y[[0, 2]], dbt.lookup(table, ids[[0, 2]]))
    y.nan_to_num().sum().backward()
    opt.step()
    changed = (before != table.bits).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= {3, 4}
    with pytest.raises(IndexError, match=rf"2 .*{bad}"):
        dbt.check_errors()
    dbt.check_errors()
    assert torch.ones(3, device="cuda").sum().item() == 3, "the context is alive"


def test_a_side_stream_orders_its_own_work(dbt: Any) -> None:
    """Two streams train two tables at once; each gets the bits of a run on its own."""
    steps = 20
    data = [(torch.from_numpy(i).cuda(), torch.from_numpy(g).cuda()) for i, g in batches(steps)]
    want = []
    for seed in (0, 1):
        table = make_table(dbt, seed)
        opt = dbt.XOR([table], seed=seed)
        for ids, dy in data:
            dbt.lookup(table, ids).backward(dy)
            opt.step()
            opt.zero_grad()
        want.append(table.bits.clone())
    torch.cuda.synchronize()
    tables = [make_table(dbt, seed) for seed in (0, 1)]
    opts = [dbt.XOR([table], seed=seed) for seed, table in enumerate(tables)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for ids, dy in data:
        for table, opt, stream in zip(tables, opts, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(200_000)  # the work of the default stream would overtake it
                dbt.lookup(table, ids).backward(dy)
                opt.step()
                opt.zero_grad()
    torch.cuda.synchronize()
    for table, bits in zip(tables, want, strict=True):
        assert torch.equal(table.bits, bits)


@pytest.mark.parametrize("rule", [rules.Counter(8), rules.Counter(1), rules.Bop()], ids=["counter8", "counter1", "bop"])
def test_a_captured_step_gives_the_bits_of_the_eager_run(dbt: Any, rule: rules.Rule) -> None:
    """Seed, step and lr advance on the device: 50 replays equal 50 eager steps with a schedule."""
    steps, data = 50, batches(50)
    rates = [1.0 - 0.015 * k for k in range(steps)]

    eager = make_table(dbt)
    opt = dbt.XOR([eager], rule=rule, seed=2**40 + 3)
    for (ids, dy), lr in zip(data, rates, strict=True):
        opt.param_groups[0]["lr"] = lr
        dbt.lookup(eager, torch.from_numpy(ids).cuda()).backward(torch.from_numpy(dy).cuda())
        opt.step()
        opt.zero_grad()

    table = make_table(dbt)
    lr = torch.tensor(rates[0], device="cuda")
    opt = dbt.XOR([table], lr=lr, rule=rule, seed=2**40 + 3, capturable=True)
    ids, dy = torch.from_numpy(data[0][0]).cuda(), torch.from_numpy(data[0][1]).cuda()
    start = [x.clone() for x in (table.bits, table.scale)]

    def step() -> None:
        dbt.lookup(table, ids).backward(dy)
        opt.step()
        opt.zero_grad()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()  # warm-up changes the table and the state: both are put back below
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    table.bits.copy_(start[0])
    table.scale.copy_(start[1])
    for value in opt.state[table].values():
        value.zero_()
    for (new_ids, new_dy), rate in zip(data, rates, strict=True):
        ids.copy_(torch.from_numpy(new_ids))
        dy.copy_(torch.from_numpy(new_dy))
        lr.fill_(rate)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(table.bits, eager.bits)
    assert torch.equal(table.scale, eager.scale)
    assert int(opt.state[table]["step"]) == steps


def test_a_graph_of_a_step_that_is_not_capturable_is_refused(dbt: Any) -> None:
    """A replay would repeat the random numbers of one step for ever."""
    table = make_table(dbt)
    opt = dbt.XOR([table])
    ids, dy = (torch.from_numpy(a).cuda() for a in batches(1)[0])
    dbt.lookup(table, ids).backward(dy)
    opt.step()
    torch.cuda.synchronize()
    before = [x.clone() for x in (table.bits, table.scale)]
    step = opt.state[table]["step"]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        ids.add(1)  # an empty graph is warned of
        try:
            with pytest.raises(RuntimeError, match=r"XOR\(capturable=True\)"):
                opt.step()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    assert torch.equal(table.bits, before[0])
    assert torch.equal(table.scale, before[1])
    assert opt.state[table]["step"] == step


def test_a_step_does_not_wait_for_the_device(dbt: Any) -> None:
    table = make_table(dbt)
    opt = dbt.XOR([table])
    ids, dy = (torch.from_numpy(a).cuda() for a in batches(1)[0])
    for _ in range(2):
        dbt.lookup(table, ids).backward(dy)
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        dbt.lookup(table, ids).backward(dy)
        opt.step()
        opt.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_native_cuda_error_is_an_exception_with_a_place(dbt: Any) -> None:
    from dualbin import _native

    table = make_table(dbt)
    slots, dy = torch.zeros(4, dtype=torch.int64, device=table.device), torch.zeros(4, 1, device=table.device)
    with pytest.raises(ValueError, match=r"workspace .*\[.*\.cpp:\d+\]"):
        _native.segment_sum(slots, dy, torch.empty(2, 1, device=table.device), torch.empty(0, dtype=torch.uint8, device=table.device))
