"""create_graph=True: what is made of a table's gradient is part of the graph. Each against autograd on a dense table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin.torch as dbt

IDS = torch.tensor([[1, 2, 3], [3, 3, 4]])


class DenseBag(nn.Embedding):
    """A bag of operations that can be differentiated twice, which nn.EmbeddingBag cannot."""

    def __init__(self, mode):
        super().__init__(20, 12)
        self.mode = mode

    def forward(self, ids, per_sample_weights=None):
        rows = super().forward(ids)
        rows = rows if per_sample_weights is None else rows * per_sample_weights.unsqueeze(2)
        return rows.sum(1) if self.mode == "sum" else rows.mean(1)


def modules(binary, dense):
    with torch.no_grad():
        dense.weight.copy_(binary.weight.dequantize())
    return dense, binary


PAIRS = {
    "embedding": lambda: modules(dbt.BinaryEmbedding(20, 12), nn.Embedding(20, 12)),
    "padding": lambda: modules(dbt.BinaryEmbedding(20, 12, padding_idx=2), nn.Embedding(20, 12, padding_idx=2)),
    "bag sum": lambda: modules(dbt.BinaryEmbeddingBag(20, 12, mode="sum"), DenseBag("sum")),
    "bag mean": lambda: modules(dbt.BinaryEmbeddingBag(20, 12, mode="mean"), DenseBag("mean")),
}

PENALTIES = {
    "norm": lambda g: g.norm() ** 2,
    "vector_norm": lambda g: torch.linalg.vector_norm(g, 3),
    "foreach_norm": lambda g: torch._foreach_norm([g])[0],
    "pow": lambda g: g.pow(2).sum(),
    "square": lambda g: g.square().mean(),
    "product": lambda g: (g * g).sum(),
    "abs": lambda g: (2 * g).abs().sum(),
    "sum": lambda g: (g / 3 - g).sum() ** 2,
    "clone": lambda g: g.clone().norm(),
}


def total(module, head, penalty, coefficients):
    """A loss with a penalty on the gradient of the table, and on that of the head."""
    loss = head(module(IDS).tanh()).pow(2).sum() + head(module(IDS[:1])).sin().sum()
    gradient, other = torch.autograd.grad(loss, [module.weight, head.weight], create_graph=True)
    return coefficients[0] * loss + coefficients[1] * penalty(gradient) + coefficients[2] * other.norm()


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=list(PENALTIES))
@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_penalties_on_a_gradient_have_the_right_second_derivatives(pair, penalty, summed):
    results = []
    for module in pair():
        torch.manual_seed(2)
        head = nn.Linear(12, 1)
        total(module, head, penalty, (1.0, 0.7, 0.3)).backward()
        table = module.weight.grad
        results.append((head.weight.grad, summed(table) if isinstance(table, dbt.RowGrad) else table))
    (head, table), (binary_head, binary_table) = results
    torch.testing.assert_close(binary_head, head, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(binary_table, table, rtol=1e-4, atol=1e-5)


def test_rows_of_a_bag_with_weights():
    results = []
    for module in PAIRS["bag sum"]():
        torch.manual_seed(2)
        head, weights = nn.Linear(12, 1), torch.rand(2, 3, requires_grad=True)
        loss = head(module(IDS, per_sample_weights=weights).tanh()).pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, module.weight, create_graph=True)
        gradient.norm().backward()
        results.append((head.weight.grad, weights.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_weights_of_a_bag(summed):
    """A penalty on the gradient of the weights reaches the table, the weights and the rest of the model."""
    results = []
    for module in PAIRS["bag sum"]():
        torch.manual_seed(2)
        head, weights = nn.Linear(12, 1), torch.rand(2, 3, requires_grad=True)
        loss = head(module(IDS, per_sample_weights=weights).tanh()).pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        gradient.norm().backward()
        table = module.weight.grad
        results.append((head.weight.grad, weights.grad, summed(table) if isinstance(table, dbt.RowGrad) else table))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_backward_with_create_graph_leaves_a_gradient_in_the_graph(table, dense, summed):
    weight, results = dense(table), []
    for parameter in (weight, table):
        head = torch.ones(20, requires_grad=True)
        for _ in range(2):  # the second adds to the first
            (F.embedding(IDS, parameter).tanh() @ head).pow(2).sum().backward(create_graph=True)
        assert parameter.grad.requires_grad
        assert parameter.grad.grad_fn is not None
        assert not parameter.grad.detach().requires_grad
        assert not parameter.grad.data.requires_grad
        (first,) = torch.autograd.grad(parameter.grad.norm(), head)
        results.append(first)
        parameter.grad.detach().mul_(2)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(summed(table.grad).detach(), weight.grad.detach())
    table.grad.detach_()
    assert not table.grad.requires_grad


def test_a_gradient_in_the_graph_can_be_stepped_with(table):
    plain = table.detach().clone().requires_grad_()
    for parameter, create_graph in ((table, True), (plain, False)):
        head = torch.ones(20, requires_grad=True)
        (gradient,) = torch.autograd.grad((dbt.lookup(parameter, IDS).tanh() @ head).pow(2).sum(), parameter, create_graph=create_graph)
        parameter.grad = gradient
        dbt.XOR([parameter]).step()
    assert torch.equal(table, plain)


def test_coalesce_of_half_precision_in_the_graph(table):
    results = []
    for parameter in (table.dequantize().requires_grad_(), table):
        head = torch.ones(20, requires_grad=True)
        rows = F.embedding(IDS, parameter).bfloat16()
        (gradient,) = torch.autograd.grad((rows.tanh().float() @ head).pow(2).sum(), parameter, create_graph=True)
        results.append(torch.autograd.grad(gradient.norm(), head)[0])
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=1e-2)


def test_no_graph_where_none_is_asked_for(table):
    head = torch.ones(20, requires_grad=True)
    (gradient,) = torch.autograd.grad((dbt.lookup(table, IDS).tanh() @ head).pow(2).sum(), table)
    assert not gradient.requires_grad
    assert gradient.grad_fn is None
    assert not gradient.norm().requires_grad
