"""Shards of a table, as far as one process can tell; tests/ranks trains them on several."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import dualbin.torch as dbt
from dualbin import reference, rules
from dualbin.torch._sharded import shard_range


def shard(rows: int = 6, dim: int = 11, first_row: int | None = 1 << 33) -> Any:
    w = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1))
    whole = dbt.BinaryTable.from_float(w)
    return torch.nn.Parameter(dbt.BinaryTable(whole.bits, whole.scale, dim, first_row=first_row))


# ---- tables with a first row -------------------------------------------------------------------------------------------------------------


def test_copies_and_slices_of_a_shard_keep_its_place() -> None:
    table = shard()
    buffer = io.BytesIO()
    torch.save(table, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(table),
        table.detach().clone(),
        table.detach().to(torch.bfloat16),
        torch.empty_like(table),
        pickle.loads(pickle.dumps(table)),
        torch.load(buffer, weights_only=True),
        torch.nn.Parameter(table.detach()),
    ]
    assert [each.first_row for each in copies] == [1 << 33] * len(copies)
    whole = dbt.BinaryTable.from_float(torch.ones(5, 3))
    for part, place in ((table.detach()[1:3], 1), (table.detach()[-2:], 4), (table.detach()[9:], 6), (table.detach().split(4)[1], 4)):
        assert part.first_row == (1 << 33) + place
    assert [whole.first_row, whole[1:].first_row, whole.split(2)[1].first_row] == [None] * 3


@pytest.mark.parametrize(("first_row", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_bad_first_row(first_row: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="first_row must be"):
        shard(first_row=first_row)


@pytest.mark.parametrize("rule", [rules.Counter(2), rules.Counter(8, every=2)])
def test_updates_are_those_of_the_reference(rule: Any) -> None:
    table = shard()
    bits, scale, state = table.bits.numpy().copy(), table.scale.numpy().copy(), reference.init_state(rule, 6, 11)
    start = bits.copy()
    optimizer = dbt.XOR([table], rule=rule, seed=4)
    for step in range(6):
        ids, dy = torch.randint(0, 6, (9,)), torch.randn(9, 11)
        optimizer.zero_grad()
        table.grad = dbt.RowGrad(ids, dy, table.shape)
        optimizer.step()
        reference.update(bits, scale, state, ids.numpy(), dy.numpy(), rule=rule, dim=11, seed=4, first_row=1 << 33)
        assert np.array_equal(table.bits.numpy(), bits), step
    assert np.array_equal(table.scale.numpy(), scale)
    assert not np.array_equal(bits, start)


def test_a_gradient_without_rows_is_a_step_of_a_shard_only() -> None:
    for first_row, steps in ((None, 0), (0, 1)):
        table = shard(first_row=first_row)
        bits = table.bits.clone()
        optimizer = dbt.XOR([table])
        table.grad = dbt.RowGrad(torch.empty(0, dtype=torch.int64), torch.empty(0, 11), table.shape)
        optimizer.step()
        assert optimizer.state.get(table, {"step": 0})["step"] == steps
        assert torch.equal(table.bits, bits)


# ---- the module --------------------------------------------------------------------------------------------------------------------------


def test_ranges_of_rows() -> None:
    assert [shard_range(101, rank, 4) for rank in range(4)] == [(0, 26), (26, 52), (52, 78), (78, 101)]
    assert shard_range(5, 0, 1) == (0, 5)
    with pytest.raises(ValueError, match="must give each of 4 ranks a row: with 9 rows, 3 a rank"):
        shard_range(9, 0, 4)


@pytest.mark.usefixtures("alone")
def test_one_rank_holds_everything_and_trains_as_a_plain_table() -> None:
    torch.manual_seed(5)
    sharded = dbt.ShardedBinaryEmbedding(50, 11, padding_idx=-1, dtype=torch.bfloat16)
    assert repr(sharded) == "ShardedBinaryEmbedding(50, 11, padding_idx=49, dtype=torch.bfloat16, rows=0..49)"
    plain = dbt.BinaryEmbedding(50, 11, padding_idx=49, dtype=torch.bfloat16)
    plain.weight.data.copy_(sharded.weight)
    ids = torch.randint(0, 50, (4, 3), dtype=torch.int32)
    for module in (sharded, plain):
        optimizer = dbt.XOR([module.weight])
        for _ in range(3):
            optimizer.zero_grad()
            y = module(ids)
            assert y.dtype == torch.bfloat16
            y.float().cos().sum().backward()
            optimizer.step()
    assert torch.equal(sharded.weight.bits, plain.weight.bits)
    assert torch.equal(sharded.weight.scale, plain.weight.scale)
    assert sharded(ids.new_empty(0, 3)).shape == (0, 3, 11)


@pytest.mark.usefixtures("alone")
def test_a_new_table_is_random_everywhere() -> None:
    bits = dbt.ShardedBinaryEmbedding(10_000, 64, generator=torch.Generator().manual_seed(1)).weight.bits
    assert abs(np.unpackbits(bits.numpy()).mean() - 0.5) < 0.01
    assert len(bits.unique(dim=0)) == 10_000
    assert not torch.equal(bits, dbt.ShardedBinaryEmbedding(10_000, 64, generator=torch.Generator().manual_seed(2)).weight.bits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_embeddings": 0}, ValueError, "num_embeddings must be at least 1"),
        ({"num_embeddings": 2**60}, ValueError, "num_embeddings must be at most"),
        ({"embedding_dim": 2.5}, TypeError, "embedding_dim must be an integer"),
        ({"embedding_dim": 2**40}, ValueError, "embedding_dim must be at most"),
        ({"padding_idx": 50}, ValueError, "padding_idx must be between -50 and 49"),
        ({"dtype": torch.float64}, TypeError, "dtype must be"),
        ({"scale": 0.0}, ValueError, "scale must be"),
        ({"spread": 0.6}, ValueError, "spread must be"),
        ({"grad_dtype": torch.float16}, TypeError, r"grad_dtype must be torch\.float32 or torch\.bfloat16, got torch\.float16"),
        ({"capacity": 51}, ValueError, "capacity must be between 1 and 50, got 51"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dbt.ShardedBinaryEmbedding(**{"num_embeddings": 50, "embedding_dim": 11, **arguments})


@pytest.mark.usefixtures("alone")
def test_one_rank_of_bags_is_the_unsharded_module() -> None:
    sharded = dbt.ShardedBinaryEmbeddingBag(50, 11, "sum", include_last_offset=True, padding_idx=4)
    assert repr(sharded) == "ShardedBinaryEmbeddingBag(50, 11, padding_idx=4, mode='sum', include_last_offset=True, " + (
        "dtype=torch.float32, rows=0..49)"
    )
    plain = dbt.BinaryEmbeddingBag(50, 11, "sum", include_last_offset=True, padding_idx=4)
    plain.load_state_dict({name: array.to_local() for name, array in sharded.state_dict().items()})
    ids, offsets = torch.randint(0, 50, (300,)), torch.tensor([0, 3, 3, 200, 300])
    y = sharded(ids, offsets)
    assert torch.equal(y, plain(ids, offsets))
    for each in (y, plain(ids, offsets)):
        each.cos().sum().backward()
    assert torch.equal(sharded.weight.grad.coalesce().rows, plain.weight.grad.coalesce().rows)
    with pytest.raises(ValueError, match="mode of a ShardedBinaryEmbeddingBag must be 'sum' or 'mean', got 'majority'"):
        dbt.ShardedBinaryEmbeddingBag(50, 11, "majority")
    with pytest.raises(TypeError, match="offsets must be a tensor"):
        sharded(ids)
    with pytest.raises(ValueError, match=r"ids must have shape \[N\] or \[G, L\], got \[1, 1, 300\]"):
        sharded(ids.view(1, 1, -1))
    with pytest.raises(TypeError, match="capacity"):
        dbt.ShardedBinaryEmbeddingBag(50, 11, capacity=4)


@pytest.mark.usefixtures("alone")
def test_a_collection_names_what_is_wrong() -> None:
    for tables, error, message in (
        ([5, 6], TypeError, r"tables must be a mapping of names to numbers of rows, got \[5, 6\]"),
        ({}, TypeError, "tables must be a mapping"),
        ({"a": 0}, ValueError, r"tables\['a'\] must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            dbt.ShardedBinaryEmbeddingCollection(tables, 8)
    collection = dbt.ShardedBinaryEmbeddingCollection({"a": 3, "b": 4}, 8)
    assert collection.first_rows == {"a": 0, "b": 3}
    for given, error, message in (
        (torch.tensor([1]), TypeError, "input must be a mapping of names of tables to ids, or what prefetch returned, got a Tensor"),
        ({"c": torch.tensor([1])}, ValueError, r"input must have names of tables, \['a', 'b'\], got 'c'"),
        ({"a": torch.ones(2)}, TypeError, r"input\['a'\] must be a tensor of int32 or int64"),
        ({"b": torch.tensor([3]), "a": torch.tensor([[0], [3]])}, IndexError, r"input\['a'\] must be in \[0, 3\).*got 3 at position 1"),
    ):
        with pytest.raises(error, match=message):
            collection(given)
    assert collection({}) == {}
    y = collection({"b": torch.tensor([[3, 0]]), "a": torch.empty(0, dtype=torch.int32)})
    assert [(name, rows.shape) for name, rows in y.items()] == [("b", (1, 2, 8)), ("a", (0, 8))]
    assert torch.equal(y["b"][0], collection.weight.dequantize()[[6, 3]])


@pytest.mark.usefixtures("alone")
def test_prefetched_ids_belong_to_their_module() -> None:
    one, other = dbt.ShardedBinaryEmbedding(50, 11), dbt.ShardedBinaryEmbedding(50, 11)
    ids = torch.tensor([[3, 1, 3]], dtype=torch.int32)
    early = one.prefetch(ids)
    before = one(ids)
    one.weight.bits.bitwise_xor_(3)
    ids.zero_()
    assert early.shape == (1, 3)
    assert torch.equal(one(early), one(torch.tensor([[3, 1, 3]])))  # as the rows are now
    assert not torch.equal(one(early), before)
    with pytest.raises(ValueError, match="input must be ids, or those that this module has prefetched"):
        other(early)


@pytest.mark.usefixtures("alone")
def test_bad_ids() -> None:
    sharded = dbt.ShardedBinaryEmbedding(50, 11)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 50\), the rows of the table, got -3 at position 1"):
        sharded(torch.tensor([4, -3]))
    with pytest.raises(TypeError, match=r"ids must be a tensor of int32 or int64, got torch\.float32"):
        sharded(torch.ones(3))
    with pytest.raises(ValueError, match="ids must be on the device of the table"):
        sharded(torch.ones(3, dtype=torch.int64, device="meta"))


@pytest.mark.usefixtures("alone")
def test_state_dict() -> None:
    sharded, other = dbt.ShardedBinaryEmbedding(50, 11), dbt.ShardedBinaryEmbedding(50, 11, device="meta")
    state = sharded.state_dict()
    assert list(state) == ["weight.bits", "weight.scale"]
    assert all(isinstance(array, DTensor) for array in state.values())
    assert state["weight.bits"].shape == (50, 2)
    assert state["weight.bits"].to_local().data_ptr() == sharded.weight.bits.data_ptr()
    other.load_state_dict(state, assign=True)
    assert torch.equal(other.weight.bits, sharded.weight.bits)
    assert other.weight.first_row == 0
    filled = dbt.ShardedBinaryEmbedding(50, 11, device="meta").to_empty(device="cpu")
    filled.load_state_dict(dbt.BinaryEmbedding(50, 11).state_dict())
    before = filled.weight.bits.clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight\.bits: expected torch\.uint8 of shape \[50, 2\]"):
        filled.load_state_dict(dbt.BinaryEmbedding(51, 11).state_dict())
    assert torch.equal(filled.weight.bits, before)


@pytest.mark.usefixtures("alone")
def test_deepcopy_stays_on_the_same_ranks() -> None:
    sharded = dbt.ShardedBinaryEmbedding(50, 11, process_group=torch.distributed.group.WORLD)
    sharded(torch.tensor([1, 2])).sum().backward()
    again = copy.deepcopy(sharded)
    assert again.process_group is sharded.process_group
    assert again.weight.first_row == 0
    assert again.weight is not sharded.weight
    again.weight.bits.zero_()
    assert not torch.equal(again(torch.tensor([1, 2])), sharded(torch.tensor([1, 2])))


@pytest.mark.usefixtures("alone")
def test_checkpoint_of_the_optimizer_names_what_is_wrong() -> None:
    module, stranger = dbt.BinaryEmbedding(20, 8), dbt.BinaryEmbedding(20, 8)
    with pytest.raises(ValueError, match="optimizer must train tables of the module only, but parameter 0 of group 0"):
        dbt.XORCheckpoint(module, dbt.XOR([stranger.weight]))
    optimizer = dbt.XOR([module.weight], rule=rules.Counter(4, every=2))
    checkpoint = dbt.XORCheckpoint(module, optimizer)
    state = checkpoint.state_dict()
    assert set(state) == {"weight"}
    assert set(state["weight"]) == {"format_version", "planes", "step", "counter", "count", "squares", "scale_m", "scale_v"}
    with pytest.raises(ValueError, match="must hold 'weight', got"):
        checkpoint.load_state_dict({})
    with pytest.raises(ValueError, match=r"state_dict\['weight'\]: state 'counter' must be"):
        checkpoint.load_state_dict({"weight": {**state["weight"], "counter": torch.zeros(3)}})
    assert not optimizer.state
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="weight has an open window of every=2: save after a multiple of 2 steps"):
        checkpoint.state_dict()


@pytest.mark.usefixtures("alone")
def test_bags_take_no_number_for_a_bool() -> None:
    with pytest.raises(TypeError, match="include_last_offset must be True or False"):
        dbt.ShardedBinaryEmbeddingBag(50, 11, include_last_offset=1)


@pytest.mark.usefixtures("alone")
def test_a_bad_id_is_named_after_its_buffer_was_filled_again() -> None:
    module, ids = dbt.ShardedBinaryEmbedding(50, 11), torch.tensor([3, 50])
    early = module.prefetch(ids)
    ids.zero_()
    with pytest.raises(IndexError, match="got 50 at position 1"):
        module(early)
