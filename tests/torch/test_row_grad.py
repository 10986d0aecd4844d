"""RowGrad: accumulation, clipping, scaling and hooks, each against autograd on a dense float table."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dualbin.torch as dbt
from dualbin import reference

IDS = torch.tensor([[3, 3, 7], [0, 3, 38]])


def make(ids=(5, 2, 5), dim=4, rows=9):
    return dbt.RowGrad(torch.tensor(ids, dtype=torch.int64), torch.randn(len(ids), dim), (rows, dim))


def test_coalesce_sums_in_the_documented_order():
    ids = torch.randint(0, 6, (1000,), dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        rows = (torch.randn(1000, 5) * 10.0 ** torch.randint(-6, 6, (1000, 1))).to(dtype)
        total = dbt.RowGrad(ids, rows, (6, 5)).coalesce()
        expected_ids, expected = reference.row_gradient(ids.numpy(), rows.float().numpy(), 6)
        assert total.dtype == torch.float32
        assert total.ids.dtype == torch.int64
        np.testing.assert_array_equal(total.ids.numpy(), expected_ids)
        np.testing.assert_array_equal(total.rows.numpy(), expected)


def test_coalesce_of_nothing_and_of_bad_ids():
    assert make(()).coalesce().rows.shape == (0, 4)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 9\), the rows of the table, got 9"):
        make((3, 9)).coalesce()


@pytest.mark.parametrize(
    ("ids", "rows", "shape", "error", "message"),
    [
        (torch.zeros(2), torch.zeros(2, 4), (9, 4), TypeError, "ids must be a tensor of int32 or int64"),
        ([1, 2], torch.zeros(2, 4), (9, 4), TypeError, "ids must be a tensor of int32 or int64, got a list"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4).double(), (9, 4), TypeError, "rows must be a tensor of float32"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2, 4), (9, 4), ValueError, r"ids must have shape \[N\]"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4), (9, 4), ValueError, r"rows must have shape \[2, 4\]"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4), (9, 5), ValueError, r"rows must have shape \[2, 5\]"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4), (9,), ValueError, r"shape must be \(V, D\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, 4), (9, 4), ValueError, "ids must be on the device of rows"),
    ],
)
def test_bad_arguments(ids, rows, shape, error, message):
    with pytest.raises(error, match=message):
        dbt.RowGrad(ids, rows, shape)


def test_accumulates_over_micro_batches(table, dense, summed):
    weight = dense(table)
    for shift in range(3):
        ids = (IDS + shift) % 39
        target = torch.randn(2, 3, 20)
        (dbt.lookup(table, ids) * target).sum().backward()
        (F.embedding(ids, weight) * target).sum().backward()
    assert table.grad.ids.tolist() == sorted({int(i) for shift in range(3) for i in ((IDS + shift) % 39).flatten()})
    torch.testing.assert_close(summed(table.grad), weight.grad)


def test_accumulates_over_two_uses_in_one_graph(table, dense, summed):
    weight, other = dense(table), torch.tensor([3, 11], dtype=torch.int32)
    (dbt.lookup(table, IDS).sin().sum() + dbt.lookup(table, other).pow(2).sum()).backward()
    (F.embedding(IDS, weight).sin().sum() + F.embedding(other, weight).pow(2).sum()).backward()
    torch.testing.assert_close(summed(table.grad), weight.grad)


def test_accumulation_does_not_touch_dy(table):
    rows = dbt.lookup(table, IDS)
    dy = torch.ones_like(rows)
    rows.backward(dy)
    dbt.lookup(table, IDS).sum().backward()
    assert bool((dy == 1).all())


def test_retain_graph_and_autograd_grad(table, summed):
    loss = dbt.lookup(table, IDS).pow(2).sum()
    (once,) = torch.autograd.grad(loss, [table], retain_graph=True)
    assert type(once) is dbt.RowGrad
    assert table.grad is None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(summed(table.grad), 2 * summed(once))


def test_a_gradient_that_a_hook_keeps_does_not_change(table, summed):
    kept = []
    table.register_hook(kept.append)
    for _ in range(2):
        dbt.lookup(table, IDS).pow(2).sum().backward()
    torch.testing.assert_close(summed(table.grad), 2 * summed(kept[0]))


def test_hooks_can_change_it(table, summed):
    dbt.lookup(table, IDS).pow(2).sum().backward()
    plain, table.grad = summed(table.grad), None
    seen = []
    table.register_hook(lambda grad: grad * 0.5)
    table.register_post_accumulate_grad_hook(lambda parameter: seen.append(type(parameter.grad)))
    dbt.lookup(table, IDS).pow(2).sum().backward()
    torch.testing.assert_close(summed(table.grad), plain / 2)
    assert seen == [dbt.RowGrad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(table, dense, summed, reentrant):
    weight, x = dense(table), torch.ones(1, requires_grad=True)
    checkpoint(lambda x: (dbt.lookup(table, IDS) * x).sin(), x, use_reentrant=reentrant).sum().backward()
    F.embedding(IDS, weight).sin().sum().backward()
    torch.testing.assert_close(summed(table.grad), weight.grad)


def with_head(table):
    """A loss of the table and a dense weight, and both as parameters."""
    head = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(1)))
    (dbt.lookup(table, IDS) @ head).pow(2).sum().mul(10).backward()
    return [table, head]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_clip_grad_norm(table, summed, foreach, order):
    parameters = with_head(table)
    expected = torch.linalg.vector_norm(torch.cat([summed(table.grad).flatten(), parameters[1].grad]), order)
    total = nn.utils.clip_grad_norm_(parameters, 1.0, norm_type=order, foreach=foreach)
    torch.testing.assert_close(total, expected)
    after = torch.linalg.vector_norm(torch.cat([summed(table.grad).flatten(), parameters[1].grad]), order)
    torch.testing.assert_close(after, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_clipping_does_not_touch_dy(table):
    rows = dbt.lookup(table, IDS)
    dy = torch.full_like(rows, 100.0)
    for scale in (lambda: nn.utils.clip_grad_norm_([table], 1.0, foreach=False), lambda: table.grad.mul_(0.5), lambda: table.grad.div_(2)):
        table.grad = None
        rows.backward(dy, retain_graph=True)
        scale()
        assert bool((dy == 100).all())
        assert float(table.grad.rows.max()) < 100


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_value_bounds_the_summed_rows(table, summed, foreach):
    parameters = with_head(table)
    expected = summed(table.grad).clamp(-0.5, 0.5)
    nn.utils.clip_grad_value_(parameters, 0.5, foreach=foreach)
    torch.testing.assert_close(summed(table.grad), expected)


class Nothing(torch.optim.Optimizer):
    """An optimizer that only counts its steps."""

    def __init__(self, params):
        super().__init__(params, {})
        self.steps = 0

    def step(self, _closure=None):
        self.steps += 1


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_grad_scaler(table, summed, value):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), Nothing([table])
    dy = torch.full((2, 3, 20), value)
    rows = dbt.lookup(table, IDS)
    scaler.scale(torch.ones(1))
    rows.backward(dy)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(dy.nan_to_num(7.0), torch.full((2, 3, 20), value).nan_to_num(7.0))
    assert optimizer.steps == (value == 1.0)
    if value == 1.0:
        torch.testing.assert_close(summed(table.grad)[3], torch.full((20,), 3 / 1024))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(table, to_none):
    optimizer = dbt.XOR([table])
    dbt.lookup(table, IDS).sum().backward()
    optimizer.zero_grad(set_to_none=to_none)
    assert table.grad is None if to_none else table.grad.ids.numel() == 0
    before = table.detach().clone()
    optimizer.step()
    assert torch.equal(table, before)
    dbt.lookup(table, IDS).sum().backward()
    assert table.grad.ids.numel() == 6


def test_half_precision_is_not_cast():
    table = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(5, 8)))
    for dtype in (torch.bfloat16, torch.float32):  # a sum is made in float32
        dbt.lookup(table, torch.tensor([1, 1]), dtype=torch.bfloat16).sum().backward()
        assert table.grad.dtype == table.grad.rows.dtype == dtype
    assert float(table.grad.coalesce().rows[0, 0]) == 4
    dbt.lookup(table, torch.tensor([1])).sum().backward()
    assert float(table.grad.coalesce().rows[0, 0]) == 5


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in _LookupBackward")
def test_nan_and_infinity_are_looked_for_in_the_rows(table):
    """Anomaly mode asks every gradient."""
    rows = torch.zeros(2, 4)
    rows[1, 2], rows[0, 3] = float("nan"), float("inf")
    grad = dbt.RowGrad(torch.tensor([5, 5]), rows, (9, 4))
    assert torch.isnan(grad).nonzero().tolist() == [[1, 2]]
    assert torch.isinf(grad).nonzero().tolist() == [[0, 3]]
    with torch.autograd.detect_anomaly():
        dbt.lookup(table, IDS).sum().backward()
        broken = dbt.lookup(table, IDS) * float("nan")
        with pytest.raises(RuntimeError, match="returned nan values"):
            broken.sum().backward()
    assert table.grad.ids.numel() == 6


def test_arithmetic(summed):
    a, b = make((5, 2, 5)), make((1, 5))
    torch.testing.assert_close(summed(a + b), summed(a) + summed(b))
    torch.testing.assert_close(summed(torch.add(a, b, alpha=-2)), summed(a) - 2 * summed(b))
    torch.testing.assert_close(summed(-a * 3 / 2), -1.5 * summed(a))
    torch.testing.assert_close(summed(torch.tensor(3.0) * a), 3 * summed(a))
    torch.testing.assert_close(summed(a - b), summed(a) - summed(b))
    torch.testing.assert_close(summed(a * b), summed(a) * summed(b))
    torch.testing.assert_close(summed(a.pow(2)), summed(a) ** 2)
    torch.testing.assert_close(summed(a.abs()), summed(a).abs())
    torch.testing.assert_close([a.sum(), a.mean(), a.norm()], [summed(a).sum(), summed(a).mean(), summed(a).norm()])
    assert (a + b).ids.tolist() == [1, 2, 5]
    assert a.ids.tolist() == [5, 2, 5]
    assert a.half().dtype == torch.float16


def test_copies():
    a = make()
    for again in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), a.clone()):
        assert torch.equal(again.ids, a.ids)
        assert torch.equal(again.rows, a.rows)
        assert again.rows.data_ptr() != a.rows.data_ptr()
    assert "occurrences=3" in repr(a)


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g + torch.zeros(9, 4),
        lambda g: g.add_(torch.zeros(9, 4)),
        lambda g: g * torch.zeros(9, 4),
        lambda g: g.sum(0),
        lambda g: g.pow(0),
        lambda g: g.clamp_(min=0.5),
        lambda g: torch.linalg.vector_norm(g, dim=1),
        lambda g: torch.linalg.vector_norm(g, 0),
        lambda g: g[0],
    ],
)
def test_what_needs_a_dense_gradient_raises_and_says_what_to_call(operation):
    with pytest.raises(NotImplementedError, match=r"XOR.*\.coalesce\(\)"):
        operation(make())


def test_gradients_of_two_tables_do_not_add():
    with pytest.raises(ValueError, match="both RowGrads must belong to one table"):
        make() + make(rows=10)


# ---- memory: what else changes when a gradient does, and what must not -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_shares_no_memory_with_the_gradient_of_another_parameter(batch, compiled):
    """The gradient of rows and that of a bias added to them are one tensor, which the engine gives to the bias, as it is or as a view."""
    ids = torch.arange(6 * batch).view(batch, 6)

    def grads(embedding):
        bias = nn.Parameter(torch.zeros(batch, 6, 8) if batch > 1 else torch.zeros(6, 8))

        def loss(ids):
            return ((embedding(ids) + (bias if batch > 1 else bias.unsqueeze(0))).tanh() * 2).sum()

        for _ in range(2):  # the second backward pass adds to the bias's gradient in place
            (torch.compile(loss, fullgraph=True) if compiled else loss)(ids).backward()
        torch.nn.utils.clip_grad_norm_([embedding.weight, bias], 1.0)
        norm = embedding.weight.grad.norm()
        bias.grad.zero_()
        torch.testing.assert_close(embedding.weight.grad.norm(), norm)
        return norm

    binary = dbt.BinaryEmbedding(50, 8)
    dense = nn.Embedding(50, 8)
    with torch.no_grad():
        dense.weight.copy_(binary.weight.dequantize())
    torch.testing.assert_close(grads(binary), grads(dense))


def test_a_buffer_of_gradients_can_be_filled_again(table, dense, summed):
    weight, ids, dy = dense(table), torch.tensor([1, 2, 1]), torch.empty(3, 20)
    for step in range(3):
        for rows in (dbt.lookup(table, ids), F.embedding(ids, weight)):
            rows.backward(dy.fill_(step))
    torch.testing.assert_close(summed(table.grad), weight.grad)


@pytest.mark.parametrize("alias", [lambda grad: grad.data, lambda grad: grad.detach(), lambda grad: grad.view(40, 20)])
def test_in_place_operations_on_an_alias(table, summed, alias):
    dbt.lookup(table, torch.tensor([1, 2, 1])).sum().backward()
    before = summed(table.grad)
    alias(table.grad).mul_(0.5)
    alias(table.grad).div_(2)
    torch.testing.assert_close(summed(table.grad), before / 4)
    copy = alias(table.grad).clone()
    alias(table.grad).zero_()
    assert len(table.grad.ids) == 0
    torch.testing.assert_close(summed(copy), before / 4)


def test_clamp_in_a_hook(table, dense, summed):
    weight, ids = dense(table), torch.tensor([1, 2, 1])
    for parameter in (table, weight):
        parameter.register_hook(lambda grad: grad.clamp(-1.5, 1.5))
        F.embedding(ids, parameter).sum().backward()
    torch.testing.assert_close(summed(table.grad), weight.grad)


def test_allclose():
    a = make()
    assert torch.allclose(a, a.coalesce())
    assert not torch.allclose(a, a * 1.1)
    assert not torch.allclose(a, make())
    assert torch.allclose(make((), 4), make((3,), 4) * 0)
