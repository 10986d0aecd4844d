"""Frozen rows: they never change, whatever reaches them, and the others train as if nothing was frozen."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin.torch as dbt
from dualbin.rules import Bop, Counter, Sign

V, D = 30, 13
FROZEN = [4, 0, 17, 4]
RULES = [Counter(8), Counter(1), Counter(4, every=3), Bop(), Sign()]


def trained(module, optimizer, steps, seed=0, call=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, V, (8, 5), generator=generator)
        (call or module)(ids).sub(0.3).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same_rows(a, b, rows):
    return torch.equal(a.bits[rows], b.bits[rows]) and torch.equal(a.scale[rows], b.scale[rows])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [dbt.BinaryEmbedding, dbt.BinaryEmbeddingBag])
def test_rows_frozen_in_mid_training_stay_and_the_others_go_on(rule, kind):
    module = kind(V, D)
    optimizer = dbt.XOR(module.parameters(), rule=rule, scale_lr=0.05)
    trained(module, optimizer, 7)  # the scales have moments, and the window of every=3 is open
    plain = copy.deepcopy(module)
    free = dbt.XOR(plain.parameters(), rule=rule, scale_lr=0.05)
    free.load_state_dict(optimizer.state_dict())
    dbt.freeze_rows(module, FROZEN)
    before = module.weight.detach().clone()
    for step in range(12):
        trained(module, optimizer, 1, seed=step)
        trained(plain, free, 1, seed=step)
        if kind is dbt.BinaryEmbeddingBag:  # else the frozen rows change the loss of the others
            break
    others = [row for row in range(V) if row not in FROZEN]
    assert same_rows(module.weight, before, FROZEN)
    assert same_rows(module.weight, plain.weight, others)
    for name, array in optimizer.state[module.weight].items():
        if isinstance(array, torch.Tensor) and len(array) == V:
            assert torch.equal(array[others], free.state[plain.weight][name][others])
    dbt.unfreeze_rows(module, [4])
    trained(module, optimizer, 12)
    assert not same_rows(module.weight, before, [4])
    assert same_rows(module.weight, before, [0, 17])
    dbt.unfreeze_rows(module)
    trained(module, optimizer, 12)
    assert not same_rows(module.weight, before, [0, 17])


@pytest.mark.parametrize(
    "look_up",
    [
        lambda m, ids: m(ids),
        lambda m, ids: F.embedding(ids, m.weight),
        lambda m, ids: F.embedding(ids % 10, m.weight[4:20]),
        lambda m, ids: torch.compile(m, fullgraph=True, backend="aot_eager")(ids),
        lambda m, ids: torch.func.functional_call(m, {"weight": m.weight}, (ids,)),
    ],
)
def test_gradients_of_frozen_rows_are_zeros(look_up, summed):
    module = dbt.BinaryEmbedding(V, D)
    dbt.freeze_rows(module, torch.tensor(FROZEN, dtype=torch.int32))
    look_up(module, torch.arange(V)).pow(2).sum().backward()
    grad = summed(module.weight.grad)
    assert not grad[FROZEN].any()
    assert grad[[5, 6, 7]].all()
    assert nn.utils.get_total_norm([module.weight.grad]) == grad.norm()


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_meta(module):
    state = copy.deepcopy(module.state_dict())
    module.to("meta").load_state_dict(state, assign=True)
    return module


def loaded(module):
    module.load_state_dict(dbt.BinaryEmbedding(V, D).state_dict())
    return module


def frozen_and_thawed(module):
    return module.requires_grad_(False).requires_grad_(True)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, through_pickle, through_a_file, through_meta, loaded, lambda m: m.bfloat16(), frozen_and_thawed]
)
def test_they_stay_frozen_through(way, summed):
    module = dbt.BinaryEmbedding(V, D)
    dbt.freeze_rows(module, FROZEN)
    module = way(module)
    before = module.weight.detach().clone()
    optimizer = dbt.XOR(module.parameters())
    module(torch.arange(V)).pow(2).sum().backward()
    assert not summed(module.weight.grad)[FROZEN].any()
    optimizer.step()
    trained(module, optimizer, 5)
    assert same_rows(module.weight, before, FROZEN)
    assert not same_rows(module.weight, before, list(range(V)))
    dbt.unfreeze_rows(module)
    module(torch.arange(V)).pow(2).sum().backward()
    assert summed(module.weight.grad)[FROZEN].all()


def test_a_frozen_table_may_have_frozen_rows():
    module = dbt.BinaryEmbedding(V, D).requires_grad_(False)
    dbt.freeze_rows(module.weight, [1])
    assert not module.weight.requires_grad
    module.weight.requires_grad = True
    module(torch.tensor([1, 2])).sum().backward()
    assert [bool(row.any()) for row in module.weight.grad.rows] == [False, True]


def test_shards_freeze_rows_of_the_whole_table(alone):
    sharded = dbt.ShardedBinaryEmbedding(V, D)
    table = sharded.weight
    table.first_row = 10  # as on a later rank
    sharded.num_embeddings = 50
    dbt.freeze_rows(sharded, [9, 10, 12, 41])
    assert table.frozen.nonzero().flatten().tolist() == [0, 2]
    dbt.unfreeze_rows(sharded, [10, 45])
    assert table.frozen.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    ("module", "ids", "error", "message"),
    [
        (
            nn.Embedding(V, D),
            [1],
            TypeError,
            "module of freeze_rows must be .* or a BinaryTable, got a Embedding",
        ),
        (dbt.BinaryEmbedding(V, D), [1, V], IndexError, r"ids must be in \[0, 30\), the rows of the table, got 30"),
        (dbt.BinaryEmbedding(V, D), [-1], IndexError, r"got -1"),
        (dbt.BinaryEmbedding(V, D), [1.0], TypeError, "ids must be integers, got 1.0"),
        (dbt.BinaryEmbedding(V, D), torch.ones(V, dtype=torch.bool), TypeError, "ids must be a tensor of int32 or int64, got"),
    ],
)
def test_arguments_that_are_refused(module, ids, error, message):
    with pytest.raises(error, match=message):
        dbt.freeze_rows(module, ids)
    assert getattr(module.weight, "frozen", None) is None
