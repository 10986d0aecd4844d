"""dualbin.torch.convert: what is replaced, what is kept and why, and what the report says."""

import pytest
import torch
from torch import nn

import dualbin.torch as dbt


class Scaled(nn.Embedding):
    """An embedding with code of its own."""

    def forward(self, input):
        return super().forward(input) * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(200, 20, padding_idx=3)
        self.again = self.words
        self.bag = nn.EmbeddingBag(150, 12, mode="sum", dtype=torch.bfloat16)
        self.small = nn.Embedding(10, 20)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Embedding(100, 7), nn.Linear(7, 3)), Scaled(100, 20)])
        self.tied = nn.Embedding(120, 20)
        self.head = nn.Linear(20, 120, bias=False)
        self.head.weight = self.tied.weight


def test_replaces_what_is_large_and_reports_it():
    model = Model()
    words = model.words.weight.detach().clone()
    before = sum(parameter.nbytes for parameter in model.parameters())
    report = dbt.convert(model, min_rows=100)
    assert type(model.words) is dbt.BinaryEmbedding
    assert model.again is model.words
    assert model.words.padding_idx == 3
    assert torch.equal(model.words.weight, dbt.BinaryTable.from_float(words, padding_idx=3))
    assert type(model.bag) is dbt.BinaryEmbeddingBag
    assert (model.bag.mode, model.bag.weight.dtype) == ("sum", torch.bfloat16)
    assert type(model.blocks[0][0]) is dbt.BinaryEmbedding
    assert [entry.name for entry in report.replaced] == ["words", "bag", "blocks.0.0"]
    assert {entry.name: entry.reason for entry in report.kept} == {
        "small": "fewer than 100 rows",
        "blocks.1": "a Scaled, a subclass with code of its own",
        "tied": "shares its weight with head.weight",
    }
    assert type(model.tied) is nn.Embedding
    assert model.head.weight is model.tied.weight
    tables = [model.words.weight, model.bag.weight, model.blocks[0][0].weight]
    packed = sum(table.bits.nbytes + table.scale.nbytes for table in tables)
    dense = sum(p.nbytes for p in model.parameters() if not isinstance(p, dbt.BinaryTable))
    assert report.bytes_saved == before - dense - packed == 200 * 80 + 150 * 24 + 100 * 28 - packed
    assert "replaced words: 200 x 20, 0.0 -> 0.0 MiB" in str(report)
    assert "kept tied: 120 x 20, shares its weight with head.weight" in str(report)
    assert str(report).endswith("3 replaced, 3 kept, 0.0 MiB saved")
    (model.words(torch.tensor([1, 2])).sum() + model.bag(torch.tensor([[1, 2]])).float().sum()).backward()
    assert type(model.words.weight.grad) is type(model.bag.weight.grad) is dbt.RowGrad
    assert dbt.convert(model, min_rows=1).replaced[0].name == "small"  # what is a table already is not looked at


def test_modules_that_share_a_weight_share_a_table():
    model = nn.ModuleDict({"a": nn.Embedding(50, 8), "b": nn.Embedding(50, 8)})
    model["b"].weight = model["a"].weight
    report = dbt.convert(model, min_rows=50)
    assert model["a"].weight is model["b"].weight
    assert [(entry.before, entry.after) for entry in report.replaced] == [(1600, 250), (0, 0)]
    assert report.bytes_saved == 1350


def test_a_frozen_weight_stays_frozen_and_modes_stay():
    model = nn.Sequential(nn.Embedding(50, 8)).requires_grad_(False).eval()
    dbt.convert(model, min_rows=50)
    assert not model[0].weight.requires_grad
    assert not model[0].training


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (lambda: nn.Embedding(50, 8, max_norm=1.0), "uses max_norm or scale_grad_by_freq"),
        (lambda: nn.Embedding(50, 8, dtype=torch.float64), "its dtype is torch.float64"),
        (lambda: nn.EmbeddingBag(50, 8, mode="max"), "mode 'max'"),
    ],
)
def test_what_a_table_cannot_do_is_kept(embedding, reason):
    model = nn.Sequential(embedding())
    report = dbt.convert(model, min_rows=1)
    assert [entry.reason for entry in report.kept] == [reason]
    assert not isinstance(model[0].weight, dbt.BinaryTable)


def test_hooks_are_not_lost():
    model = nn.Sequential(nn.Embedding(50, 8))
    model[0].register_forward_hook(lambda _module, _args, output: output + 1)
    assert dbt.convert(model, min_rows=1).kept[0].reason == "has hooks"


def test_nothing_that_a_user_added_is_lost():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Embedding(50, 8))
    nn.utils.parametrizations.weight_norm(model[0])
    model[1].register_buffer("counts", torch.zeros(50))
    reasons = [entry.reason for entry in dbt.convert(model, min_rows=1).kept]
    assert reasons == ["a ParametrizedEmbedding, a subclass with code of its own", "has parameters, buffers or modules of its own"]


def test_bad_arguments_change_nothing():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Embedding(50, 8))
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="got nan at row 2, column 3"):
        dbt.convert(model, min_rows=1)
    assert [type(module) for module in model] == [nn.Embedding, nn.Embedding]
    with pytest.raises(TypeError, match=r"use BinaryEmbedding\.from_float"):
        dbt.convert(nn.Embedding(50, 8))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got a list"):
        dbt.convert([])
    with pytest.raises(ValueError, match="min_rows must be at least 1, got 0"):
        dbt.convert(model, min_rows=0)
