"""What a small step launches on a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # those of the profiler differ between releases
]

#: kernels, copies and fills of a step of at most 512 ids
MOST = 7

STEPS = 4


def launched(call: Any) -> list[str]:
    """Names of what each of STEPS calls launches, in order."""
    from torch.profiler import ProfilerActivity, profile

    call()
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # not the ranges that torch.optim gives names to
    events = [event for event in events if not (getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer."))]
    assert events
    assert len(events) % STEPS == 0, [event.name for event in events]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)][: len(events) // STEPS]


@pytest.mark.parametrize("count", [1, 64, 512])
@pytest.mark.parametrize(("rule", "planes"), [(rules.Counter(8), 1), (rules.Counter(8), 4), (rules.Counter(1), 1)], ids=str)
def test_a_step_launches_few(rule: Any, planes: int, count: int) -> None:
    import dualbin.torch as dbt

    table = torch.nn.Parameter(dbt.BinaryTable.from_float(torch.randn(5000, 128, device="cuda"), planes=planes))
    xor = dbt.XOR([table], rule=rule)
    ids, dy = torch.randint(0, 5000, (count,), device="cuda"), torch.randn(count, 128, device="cuda")

    def step() -> None:
        table.grad = dbt.RowGrad(ids, dy, table.shape)
        xor.step()

    names = launched(step)
    assert len(names) <= MOST, names
    assert not any("HtoD" in name for name in names), "the numbers of a step go with its launches"


def test_a_lookup_launches_one_kernel() -> None:
    import dualbin.torch as dbt

    table = dbt.BinaryTable.from_float(torch.randn(5000, 128, device="cuda"))
    ids = torch.randint(0, 5000, (512,), device="cuda")
    names = launched(torch.no_grad()(lambda: dbt.lookup(table, ids)))
    assert len(names) == 1, names
