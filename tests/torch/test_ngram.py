"""NGramEmbedding: the rows of the reference, streaming, states, training."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from ngram_cases import texts

import dualbin.torch as dbt
from dualbin import NGrams, reference
from dualbin.rules import Counter


def tensors(*arrays):
    return [None if array is None else torch.from_numpy(array) for array in arrays]


@given(texts())
@settings(max_examples=100, deadline=None)
def test_rows_are_those_of_the_reference(text):
    ids, context, starts = tensors(text.ids, text.context, text.starts)
    found = dbt.ngram_rows(ids, text.ngrams, context, starts)
    expected = reference.ngram_rows(*text)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), expected)


@given(texts())
@settings(max_examples=50, deadline=None)
def test_a_text_in_pieces_is_the_whole_text(text):
    ids, context, starts = tensors(text.ids, text.context, text.starts)
    memory = dbt.NGramEmbedding(50, 3, orders=text.ngrams.orders, heads=1, boundary=text.ngrams.boundary)
    whole = memory(ids, context, starts)
    pieces, position = [], 0
    for length in (0, 1, 2, 1, ids.shape[-1]):
        here = slice(position, position + length)
        piece, begins = ids[..., here], None if starts is None else starts[..., here]
        pieces.append(memory(piece, context, begins))
        context = memory.next_context(piece, context, begins)
        assert context.shape == (*ids.shape[:-1], memory.ngrams.longest - 1)
        position += piece.shape[-1]
    assert torch.equal(torch.cat(pieces, -2), whole)


def test_what_a_decoder_knows_is_enough():
    memory = dbt.NGramEmbedding(1000, 4, orders=(1, 4), heads=2, boundary=3, projection=5)
    ids = torch.tensor([[5, 3, 5, 7, 7, 1], [0, 0, 0, 3, 3, 0]])
    for length in range(1, 6):
        torch.testing.assert_close(memory(ids[:, length:], ids[:, :length]), memory(ids)[:, length:])
    assert memory.next_context(ids, starts=ids == 7).tolist() == [[-1, 7, 1], [-1, -1, 0]]


def test_output_is_rows_side_by_side():
    memory = dbt.NGramEmbedding(100, 3, orders=(2, 1), heads=2, planes=2)
    ids = torch.randint(0, 9, (2, 5), dtype=torch.int32)
    rows = memory.rows(ids)
    assert torch.equal(memory(ids), torch.cat([memory.embed(rows[..., part]) for part in range(4)], -1))
    assert dbt.NGramEmbedding(100, 3, projection=7)(ids).shape == (2, 5, 7)
    assert dbt.NGramEmbedding(100, 3, projection=True).projection.shape == (24, 24)
    assert "orders=(2, 1), heads=2" in repr(memory)


def test_compiled_code_has_the_same_rows():
    ngrams = NGrams(2**33 - 4, (2, 3), 2, boundary=1, seed=2**40)
    ids, context, starts = torch.randint(0, 2**31 - 1, (3, 40)), torch.randint(-1, 3, (3, 5)), torch.rand(3, 40) < 0.2
    compiled = torch.compile(dbt.ngram_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, ngrams, context, starts), dbt.ngram_rows(ids, ngrams, context, starts))
    ids[1, 7] = -5
    bad = compiled(ids, ngrams, context, starts)[1] == -1
    assert bad.all(-1)[7]
    assert not bad.all(-1)[:7].any()
    assert not bad[10:].any()
    with pytest.raises(IndexError, match="-1"):  # the lookup tells
        dbt.BinaryEmbedding(9, 2)(torch.where(bad, -1, 0))


def test_a_wrong_token_makes_the_rows_wrong_that_see_it(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU nothing is checked beforehand
    found = dbt.ngram_rows(torch.tensor([1, 2**31, 1, 1, 1]), NGrams(1000, (3, 1), 2))
    assert (found == -1).tolist() == [[False] * 4, [True] * 4, [True, True, False, False], [True, True, False, False], [False] * 4]


def test_training_learns_what_only_a_trigram_knows():
    torch.manual_seed(0)
    memory = dbt.NGramEmbedding(6_000, 16, orders=(3,), heads=2, projection=8)
    xor, adam = dbt.XOR([memory.embed.weight], rule=Counter(8, norm="rms")), torch.optim.Adam([memory.projection], lr=3e-3)
    ids = torch.randint(0, 8, (32, 34), generator=torch.Generator().manual_seed(1))
    target = (ids[:, 2:] + 3 * ids[:, 1:-1] + 5 * ids[:, :-2]) % 8
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(memory(ids)[:, 2:].flatten(0, 1), target.flatten())
        loss.backward()
        for optimizer in (xor, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.9
    assert losses[-1] < 0.6


# ---- states ------------------------------------------------------------------------------------------------------------------------------


def test_state_dict():
    memory = dbt.NGramEmbedding(100, 3, projection=4, planes=2, boundary=0)
    state = memory.state_dict()
    assert set(state) == {"embed.weight.bits", "embed.weight.scale", "projection", "_extra_state"}
    other = dbt.NGramEmbedding(100, 3, projection=4, planes=2, boundary=0)
    other.load_state_dict(state)
    ids = torch.randint(0, 9, (5,))
    assert torch.equal(other(ids), memory(ids))
    assert torch.equal(copy.deepcopy(memory)(ids), memory(ids))


@pytest.mark.parametrize("options", [{"orders": (3, 2)}, {"heads": 2}, {"boundary": 1}, {"seed": 1}])
def test_the_state_of_another_hash_is_refused(options):
    memory, state = dbt.NGramEmbedding(100, 3, **options), dbt.NGramEmbedding(100, 3).state_dict()
    with pytest.raises(RuntimeError, match=r"_extra_state: the state_dict is of other n-grams"):
        memory.load_state_dict(state)
    model = torch.nn.ModuleDict({"memory": memory})
    with pytest.raises(RuntimeError, match=r"memory\._extra_state: the state_dict is of other n-grams"):
        model.load_state_dict({f"memory.{name}": value for name, value in state.items()})


def test_a_state_without_the_hash_is_incomplete():
    memory = dbt.NGramEmbedding(100, 3)
    state = {name: value for name, value in memory.state_dict().items() if name != "_extra_state"}
    with pytest.raises(RuntimeError, match="_extra_state"):
        memory.load_state_dict(state)


# ---- other modules' rows -----------------------------------------------------------------------------------------------------------------


def test_rows_of_floats_and_their_conversion():
    memory = dbt.NGramEmbedding.from_embedding(torch.nn.Embedding(5000, 8), orders=(2,), heads=3, projection=4)
    ids = torch.randint(0, 9, (3, 7))
    dense = memory(ids)
    assert dense.shape == (3, 7, 4)
    dbt.convert(memory, min_rows=1000, planes=8)
    assert isinstance(memory.embed, dbt.BinaryEmbedding)
    torch.testing.assert_close(memory(ids), dense, atol=0.1, rtol=0)


@pytest.mark.usefixtures("alone")
def test_rows_of_several_ranks():
    sharded = dbt.ShardedBinaryEmbedding(500, 8, generator=torch.Generator().manual_seed(1))
    memory = dbt.NGramEmbedding.from_embedding(sharded, boundary=2, projection=4)
    whole = dbt.NGramEmbedding(500, 8, boundary=2, projection=4)
    whole.load_state_dict({name: value.to_local() if hasattr(value, "to_local") else value for name, value in memory.state_dict().items()})
    ids = torch.randint(0, 9, (3, 7))
    assert torch.equal(memory(ids), whole(ids))
    assert torch.equal(memory(memory.prefetch(ids)), whole(ids))
    with pytest.raises(ValueError, match="context belongs to prefetch"):
        memory(memory.prefetch(ids), ids)
    with pytest.raises(TypeError, match=r"embed must be a ShardedBinaryEmbedding, it is a BinaryEmbedding"):
        whole.prefetch(ids)
    memory(ids).sum().backward()
    assert memory.embed.weight.grad.rows.shape[1] == 8


@pytest.mark.parametrize(
    ("embed", "error", "message"),
    [
        (lambda: torch.zeros(9, 3), TypeError, "embed must be a BinaryEmbedding, a ShardedBinaryEmbedding or an nn.Embedding, got"),
        (lambda: dbt.BinaryEmbedding(9, 3, padding_idx=0), ValueError, "embed must have no padding row"),
        (lambda: dbt.BinaryEmbedding(9, 3, projection=2), ValueError, "embed must have no projection of its own"),
        (lambda: dbt.BinaryEmbedding(7, 3), ValueError, "embed: rows must be between 8 and"),
    ],
)
def test_modules_that_cannot_hold_the_rows(embed, error, message):
    with pytest.raises(error, match=message):
        dbt.NGramEmbedding.from_embedding(embed())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": torch.tensor(3)}, ValueError, r"ids must be a dense tensor \[..., T\] of at least one dimension"),
        ({"ids": torch.zeros(2, 3)}, TypeError, "ids must be a tensor of int32 or int64, got torch.float32"),
        ({"ids": torch.tensor([1, -1])}, IndexError, r"ids must be in \[0, 2147483648\), got -1"),
        ({"context": torch.zeros(2, dtype=torch.int64)}, ValueError, r"context must be \[2, 'C'\]"),
        ({"context": torch.full((2, 1), -2)}, IndexError, r"context must be in \[-1, 2147483648\), got -2"),
        ({"starts": torch.zeros(2, 3)}, TypeError, "starts must be a tensor of bool, got torch.float32"),
        ({"starts": torch.zeros(2, 1, dtype=torch.bool)}, ValueError, r"starts must be \[2, 3\] on cpu"),
    ],
)
def test_bad_arguments(arguments, error, message):
    memory = dbt.NGramEmbedding(100, 3)
    with pytest.raises(error, match=message):
        memory(**{"ids": torch.zeros(2, 3, dtype=torch.int64)} | arguments)
    with pytest.raises(error, match=message):
        memory.next_context(**{"ids": torch.zeros(2, 3, dtype=torch.int64)} | arguments)


def test_too_few_rows_are_named_by_the_module():
    with pytest.raises(ValueError, match="num_embeddings: rows must be between 8 and"):
        dbt.NGramEmbedding(7, 3)
