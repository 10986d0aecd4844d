"""Padding rows that hold values, as where the padding token is the end-of-text token: kept, looked up, and not trained."""

import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin.rules import Bop, Counter, Sign

IDS = torch.tensor([[1, 2, 2], [3, 2, 0]])


def in_use(kind=nn.Embedding, **options):
    module = kind(20, 13, padding_idx=2, **options)
    with torch.no_grad():
        module.weight[2] = torch.randn(13)
    return module


def test_from_float_of_a_module_keeps_a_row_in_use():
    source = in_use()
    module = dbt.BinaryEmbedding.from_float(source)
    assert module.padding_idx == 2
    assert torch.equal(module.weight, dbt.BinaryTable.from_float(source.weight))
    assert torch.equal(module(torch.tensor(2)).sign(), source.weight[2].sign())
    assert repr(module) == "BinaryEmbedding(20, 13, padding_idx=2, dtype=torch.float32)"


@pytest.mark.parametrize("make", [dbt.BinaryEmbedding.from_float, dbt.BinaryEmbedding.from_pretrained, dbt.BinaryEmbeddingBag.from_float])
def test_a_row_of_zeros_stays_zero_and_a_table_has_no_row_in_use(make):
    weight = torch.randn(20, 13)
    assert make(weight, padding_idx=-18).weight.scale[2] != 0
    assert torch.equal(dbt.BinaryTable.from_float(weight, padding_idx=-18).dequantize()[2], torch.zeros(13))
    weight[2] = 0
    module = make(weight, padding_idx=2)
    assert module.weight.scale[2] == 0
    assert torch.equal(module.weight.dequantize()[2], torch.zeros(13))


@pytest.mark.parametrize("rule", [Counter(8), Counter(2), Counter(1), Counter(8, every=2), Bop(), Sign()])
def test_training_leaves_the_row_as_it_is(rule):
    module = dbt.BinaryEmbedding.from_float(in_use())
    before = module.weight.clone()
    optimizer = dbt.XOR(module.parameters(), rule=rule, scale_lr=0.1)
    for _ in range(20):
        module(IDS).sub(1).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for array, old in ((module.weight.bits, before.bits), (module.weight.scale, before.scale)):
        assert torch.equal(array[2], old[2])
    assert not torch.equal(module.weight.scale[1], before.scale[1])


def test_its_gradient_is_that_of_nn_embedding(summed, dense):
    module = dbt.BinaryEmbedding.from_float(in_use())
    reference = nn.Embedding.from_pretrained(dense(module.weight).detach(), freeze=False, padding_idx=2)
    for one in (module, reference):
        one(IDS).pow(3).sum().backward()
    assert torch.equal(module(IDS), reference(IDS))
    torch.testing.assert_close(summed(module.weight.grad), reference.weight.grad)
    assert not reference.weight.grad[2].any()


def test_convert_says_so():
    model = nn.Sequential(in_use(), nn.Embedding(20, 13, padding_idx=1), nn.Embedding(20, 13))
    report = dbt.convert(model, min_rows=1)
    assert [entry.note for entry in report.replaced] == ["padding row 2 holds values: it keeps them and is not trained", "", ""]
    assert "0.0 MiB; padding row 2 holds values: it keeps them and is not trained\nreplaced 1:" in str(report)
    assert [(float(part.weight.scale[part.padding_idx]) == 0) for part in model[:2]] == [False, True]


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_keeps_the_row(assign):
    module = dbt.BinaryEmbedding.from_float(in_use())
    other = dbt.BinaryEmbedding(20, 13, padding_idx=2)
    assert other.weight.scale[2] == 0
    other.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other(IDS), module(IDS))


def test_shards_keep_the_row(alone, summed):
    module = dbt.BinaryEmbedding.from_float(in_use())
    sharded = dbt.ShardedBinaryEmbedding(20, 13, padding_idx=2)
    sharded.load_state_dict(module.state_dict())
    for one in (module, sharded):
        one(IDS).pow(3).sum().backward()
    assert torch.equal(sharded(IDS), module(IDS))
    assert torch.equal(summed(sharded.weight.grad), summed(module.weight.grad))
    assert sharded.state_dict()["weight.scale"].to_local()[2] != 0


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("compiled", [False, True])
def test_bags_leave_the_row_out(mode, compiled, summed, dense):
    """As nn.EmbeddingBag does: in the values, in the number that a mean divides by, and in the gradients."""
    module = dbt.BinaryEmbeddingBag.from_float(in_use(nn.EmbeddingBag, mode=mode))
    assert module.weight.scale[2] != 0
    reference = nn.EmbeddingBag.from_pretrained(dense(module.weight).detach(), freeze=False, padding_idx=2, mode=mode)
    ids, offsets = torch.tensor([1, 2, 2, 2, 3, 2, 0]), torch.tensor([0, 3, 4])
    weights = torch.randn(7, requires_grad=True) if mode == "sum" else None
    again = None if weights is None else weights.detach().clone().requires_grad_()
    run = torch.compile(module, backend="aot_eager") if compiled else module
    rows, want = run(ids, offsets, weights), reference(ids, offsets, again)
    torch.testing.assert_close(rows, want)
    assert not rows[1].any()
    for each in (rows, want):
        each.pow(3).sum().backward()
    torch.testing.assert_close(summed(module.weight.grad), reference.weight.grad)
    if weights is not None:
        torch.testing.assert_close(weights.grad, again.grad)


def test_majorities_leave_the_row_out():
    module = dbt.BinaryEmbeddingBag.from_float(in_use(nn.EmbeddingBag, mode="sum"), mode="majority")
    assert torch.equal(module(torch.tensor([[1, 2, 2]])), module.weight.dequantize()[1:2].sign())
