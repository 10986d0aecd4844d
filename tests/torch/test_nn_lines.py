"""Usual lines of code around nn.Embedding, in the places where a table stands for its weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import dualbin.torch as dbt

IDS = torch.tensor([0, 2, 2, 1])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (lambda t: t.new_zeros(2, 3), torch.zeros(2, 3)),
        (lambda t: t.new_zeros((2, 3), dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)),
        (lambda t: t.new_ones(2), torch.ones(2)),
        (lambda t: t.new_full((2,), 3.0), torch.full((2,), 3.0)),
        (lambda t: t.new_empty(2).fill_(1), torch.ones(2)),
        (lambda t: t.new_tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
        (lambda t: t.bfloat16().new_zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (lambda t: t.new_zeros(2, device="meta"), torch.zeros(2, device="meta")),
    ],
)
def test_new_tensors_are_plain(table, line, expected):
    """`weight.new_zeros(...)` is how many recurrent models make their first hidden state."""
    made = line(table)
    assert type(made) is torch.Tensor
    assert (made.dtype, made.device, made.shape, made.requires_grad) == (expected.dtype, expected.device, expected.shape, False)
    assert made.is_meta or torch.equal(made, expected)


def test_sizes_are_those_of_the_packed_form(table):
    """`nbytes`, and what tools that report the size of a model multiply."""
    packed = 40 * 3 + 40 * 4
    assert table.nbytes == table.data.nbytes == packed
    assert sum(p.numel() * p.element_size() for p in [table]) == packed
    assert (table.numel(), len(table), table.shape) == (800, 40, (40, 20))


@pytest.mark.parametrize(
    ("part", "first", "rows"),
    [
        (lambda t: t[5:10], 5, 5),
        (lambda t: t[-5:], 35, 5),
        (lambda t: t[:-30], 0, 10),
        (lambda t: t[10:][5:9], 15, 4),
        (lambda t: t.narrow(0, 30, 10), 30, 10),
        (lambda t: t.split(15)[1], 15, 15),
        (lambda t: t.split([10, 25, 5])[2], 35, 5),
        (lambda t: torch.chunk(t, 3)[1], 14, 14),
    ],
)
def test_lookups_in_some_rows_of_a_table(table, dense, summed, part, first, rows):
    reference = dense(table)
    F.embedding(IDS, reference[first : first + rows]).pow(2).sum().backward()
    piece = part(table)
    assert piece.shape == (rows, 20)
    out = F.embedding(IDS, piece)
    assert torch.equal(out, reference[first : first + rows][IDS])
    out.pow(2).sum().backward()
    assert torch.equal(summed(table.grad), reference.grad)


def test_split_refuses_sizes_that_do_not_add_up(table):
    with pytest.raises(ValueError, match=r"add up to the 40 rows of the table, got \[10, 5\]"):
        table.split([10, 5])


class Same(nn.Module):
    def forward(self, weight):
        return weight


def test_parametrized_tables_train_and_are_saved():
    first, second = dbt.BinaryEmbedding(20, 8), dbt.BinaryEmbedding(20, 8)
    for module in (first, second):
        parametrize.register_parametrization(module, "weight", Same())
    first(IDS).sum().backward()
    state = first.state_dict()
    assert list(state) == ["parametrizations.weight.original"]
    for assign in (False, True):
        second.load_state_dict(state, assign=assign)
        assert torch.equal(second(IDS), first(IDS))
    assert second.parametrizations.weight.original.requires_grad
    parametrize.remove_parametrizations(first, "weight")
    assert list(first.state_dict()) == ["weight.bits", "weight.scale"]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_convert_on_the_meta_device(kind):
    model = nn.Sequential(kind(20, 8, padding_idx=2))
    dbt.convert(model, min_rows=1)
    with torch.device("meta"):
        empty = nn.Sequential(kind(20, 8, padding_idx=2))
    assert dbt.convert(empty, min_rows=1).bytes_saved == 20 * 8 * 4 - 20 - 20 * 4
    assert empty[0].weight.is_meta
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty[0].weight, model[0].weight)
    assert empty[0].padding_idx == 2


def test_a_parameter_made_anew_from_itself(table):
    """accelerate writes `type(p)(p.to(device), requires_grad=p.requires_grad, **p.__dict__)`."""
    table._is_loaded = True
    table.first_row = 7
    again = type(table)(table.to("meta"), requires_grad=table.requires_grad, **table.__dict__)
    assert (again.device.type, again.shape, again.requires_grad, again.first_row, again._is_loaded) == ("meta", table.shape, True, 7, True)
    frozen = type(table)(table, requires_grad=False)
    assert torch.equal(frozen, table)
    assert (frozen.requires_grad, frozen.bits.data_ptr()) == (False, table.bits.data_ptr())
    with pytest.raises(TypeError, match="unexpected argument 'rows'"):
        dbt.BinaryTable(table.bits, table.scale, 20, rows=3)
