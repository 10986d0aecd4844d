"""Nested ids, and what torch.func, forward-mode AD and torch.distributed are told when they meet a table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import dualbin.torch as dbt

IDS = torch.tensor([1, 2])


def model():
    return nn.Sequential(dbt.BinaryEmbedding(20, 8), nn.Linear(8, 1))


# ---- nested ids --------------------------------------------------------------------------------------------------------------------------


def jagged(dtype=torch.int64):
    return torch.nested.nested_tensor([torch.tensor([1, 2, 1], dtype=dtype), torch.tensor([3], dtype=dtype)], layout=torch.jagged)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_jagged_ids_give_jagged_rows_and_the_gradient_of_a_dense_table(dtype, padding_idx, summed):
    binary, dense = dbt.BinaryEmbedding(20, 8, padding_idx=padding_idx), nn.Embedding(20, 8, padding_idx=padding_idx)
    with torch.no_grad():
        dense.weight.copy_(binary.weight.dequantize())
    results = []
    for module in (dense, binary):
        ids = jagged(dtype)
        rows = module(ids)
        assert rows.is_nested
        assert rows.shape[:2] == ids.shape
        (rows * rows).values().sum().backward()
        results.append(rows.values().detach())
    assert torch.equal(*results)
    torch.testing.assert_close(summed(binary.weight.grad), dense.weight.grad)


def test_jagged_ids_with_a_projection_and_without_a_gradient():
    embedding, ids = dbt.BinaryEmbedding(20, 8, projection=True), jagged()
    with torch.no_grad():
        assert torch.equal(embedding(ids).values(), embedding(ids.values()))
        assert torch.equal(dbt.lookup(embedding.weight, ids).values(), dbt.lookup(embedding.weight, ids.values()))
    with pytest.raises(NotImplementedError, match=r"call dualbin\.torch\.lookup\(table, ids\), which takes jagged ids, too"):
        F.embedding(ids, embedding.weight)


def test_nested_ids_that_cannot_be_looked_up_say_what_to_do():
    table, ids = dbt.BinaryEmbedding(20, 8).weight, jagged()
    with pytest.warns(UserWarning, match="prototype"):
        strided = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])])
    with pytest.raises(ValueError, match=r"nested ids must have layout torch\.jagged, got torch\.strided: torch\.nested\.as_nested_tensor"):
        dbt.lookup(table, strided)
    holes = torch.nested.nested_tensor_from_jagged(ids.values(), ids.offsets(), lengths=torch.tensor([2, 1]))
    with pytest.raises(ValueError, match=r"nested ids must be .* without holes.*look ids\.values\(\) up"):
        dbt.lookup(table, holes)


# ---- transforms --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda net: grad(lambda table: dbt.lookup(table, IDS).sum())(net[0].weight),
        lambda net: grad(lambda parameters: functional_call(net, parameters, (IDS,)).sum())(dict(net.named_parameters())),
        lambda net: jacrev(lambda table: F.embedding(IDS, table).sum())(net[0].weight),
        lambda net: vmap(lambda table: dbt.lookup(table, IDS))(net[0].weight),
        lambda _: grad(lambda parameters: functional_call(BAG, parameters, (IDS[None],)).sum())(dict(BAG.named_parameters())),
    ],
)
def test_a_transform_of_a_table_says_what_to_call(call):
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad, vjp, jacrev and vmap cannot.*backward\(\) or torch\.autograd\.grad"):
        call(model())


BAG = dbt.BinaryEmbeddingBag(20, 8)


SCRIPTS = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch itself, for some derivatives


def dual(table):
    with forward_ad.dual_level():
        forward_ad.make_dual(table, table.detach())


@SCRIPTS
@pytest.mark.parametrize(
    "call",
    [
        lambda net: jvp(lambda table: dbt.lookup(table, IDS), (net[0].weight,), (torch.ones(20, 8),)),
        lambda net: dual(net[0].weight),
        lambda net: stack_module_state([net, model()]),
    ],
)
def test_forward_mode_and_stacked_tables_say_what_to_call(call):
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivatives, and vmap cannot stack.*torch\.autograd\.grad"):
        call(model())


def test_transforms_of_other_parameters_work():
    net = model()
    head = dict(net[1].named_parameters())

    def loss(parameters, ids):
        return functional_call(net[1], parameters, (net[0](ids),)).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(head, IDS)
    torch.testing.assert_close(each["weight"].squeeze(1), dbt.lookup(net[0].weight.detach(), IDS))


# ---- several processes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "call",
    [
        nn.parallel.DistributedDataParallel,
        lambda net: torch.distributed.broadcast(net[0].weight.data, 0),
        lambda net: torch.distributed.all_reduce(net[0].weight.grad),
        lambda net: torch._utils._flatten_dense_tensors([net[0].weight.grad, net[1].weight.grad]),
    ],
)
def test_what_flattens_or_sends_a_table_or_its_gradient_names_the_call_that_does(call):
    net = model()
    net(IDS).sum().backward()
    with pytest.raises(NotImplementedError, match=r"prepare_ddp\(module\) before DistributedDataParallel.*sync_row_grads\(tables\) after"):
        call(net)
