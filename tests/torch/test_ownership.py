"""The gradient of a lookup is copied unless nobody else holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dualbin.torch as dbt
from dualbin.torch._ownership import Ownership

IDS = torch.tensor([3, 1, 3, 0])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def learned() -> None:
    """Two steps: the first backward pass asks, the next forward pass learns."""
    for _ in range(2):
        y, _table = looked_up()
        (y * 2).sum().backward()


def looked_up(device: str = "cpu") -> tuple[Tensor, nn.Parameter]:
    table = dbt.BinaryEmbedding(10, 8, device=device).weight
    return dbt.lookup(table, IDS.to(device)), table


class Watch(torch.autograd.Function):
    """Remembers where the gradient lies that it hands on, and the gradient itself if it is told to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, seen: list[int], held: list[Tensor] | None) -> Tensor:
        ctx.seen, ctx.held = seen, held
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        dy = dy * 3
        ctx.seen.append(dy.data_ptr())
        if ctx.held is not None:
            ctx.held.append(dy)
        return dy, None, None


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_of_nobody_else_is_not_copied(device: str) -> None:
    y, table = looked_up(device)
    seen: list[int] = []
    Watch.apply(y, seen, None).sum().backward()
    assert table.grad.rows.data_ptr() == seen[0]
    assert (table.grad.rows == 3).all()


def of_the_caller(y: Tensor) -> Tensor:
    dy = torch.ones_like(y)
    y.backward(dy)
    return dy


def of_the_caller_of_grad(y: Tensor) -> Tensor:
    (dy,) = torch.autograd.grad((y * 1).sum(), y, retain_graph=True)
    y.backward(dy)
    return dy


def of_a_hook(y: Tensor) -> Tensor:
    held: list[Tensor] = []
    y.register_hook(held.append)
    (y * 1).sum().backward()
    return held[0]


def of_a_node_hook(y: Tensor) -> Tensor:
    held: list[Tensor] = []
    y.grad_fn.register_prehook(held.extend)  # type: ignore[union-attr]
    (y * 1).sum().backward()
    return held[0]


def retained(y: Tensor) -> Tensor:
    y.retain_grad()
    (y * 1).sum().backward()
    assert y.grad is not None
    return y.grad


def of_a_parameter_after(y: Tensor) -> Tensor:
    other = nn.Parameter(torch.zeros_like(y))
    ((y + other) * 1).sum().backward()
    return other.grad  # type: ignore[return-value]


def of_a_parameter_before(y: Tensor) -> Tensor:
    other = nn.Parameter(torch.zeros_like(y))
    ((other + y) * 1).sum().backward()
    return other.grad  # type: ignore[return-value]


def of_a_function(y: Tensor) -> Tensor:
    held: list[Tensor] = []
    (Watch.apply(y, [], held) * (1 / 3)).sum().backward()
    return held[0]


def of_a_view(y: Tensor) -> Tensor:
    held: list[Tensor] = []

    class Part(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(_ctx: Any, dy: Tensor) -> Tensor:
            whole = torch.cat([dy, dy])
            held.append(whole)
            return whole[: len(dy)]

    (Part.apply(y) * 1).sum().backward()
    return held[0]


def of_detached(y: Tensor) -> Tensor:
    held: list[Tensor] = []

    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(_ctx: Any, dy: Tensor) -> Tensor:
            dy = dy * 1
            held.append(dy)
            return dy.detach()

    (Detached.apply(y) * 1).sum().backward()
    return held[0]


SHARED = [
    of_the_caller,
    of_the_caller_of_grad,
    of_a_hook,
    of_a_node_hook,
    retained,
    of_a_parameter_after,
    of_a_parameter_before,
    of_a_function,
    of_a_view,
    of_detached,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", SHARED, ids=lambda run: run.__name__)
def test_whoever_holds_the_same_gradient_does_not_change_the_tables(run: Callable[[Tensor], Tensor], device: str) -> None:
    y, table = looked_up(device)
    other = run(y)
    rows = table.grad.rows.clone()
    assert (rows - 1).abs().max() < 1e-6
    other.mul_(0).add_(7)
    torch.testing.assert_close(table.grad.rows, rows, rtol=0, atol=0)


def test_two_lookups_that_get_the_same_gradient() -> None:
    first, second = dbt.BinaryEmbedding(10, 8).weight, dbt.BinaryEmbedding(10, 8).weight
    ((dbt.lookup(first, IDS) + dbt.lookup(second, IDS)) * 2).sum().backward()
    assert first.grad.rows.data_ptr() != second.grad.rows.data_ptr()
    first.grad.rows.zero_()
    assert (second.grad.rows == 2).all()


def test_the_first_backward_pass_copies_and_asks() -> None:
    fresh = Ownership()
    dy = torch.ones(4, 8)
    assert not fresh.has(dy, 0)
    assert fresh.due
    assert not fresh.has(dy, 1000)


def test_what_other_threads_count_is_not_learned() -> None:
    fresh = Ownership()

    def example() -> Tensor:
        thread = threading.Thread(target=fresh.has, args=(torch.ones(1), 1000))
        thread.start()
        thread.join()
        return torch.ones(1, requires_grad=True)

    fresh.learn(example)
    assert fresh._alone is None


def test_without_counts_every_gradient_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    fresh = Ownership()
    assert not fresh.has(torch.ones(1), 0)
    assert not fresh.due
