"""BinaryEmbeddingBag: values against dualbin.reference, gradients against nn.EmbeddingBag on the dense table, training, and bad input."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import dualbin
import dualbin.torch as dbt
from dualbin import reference, rules

V, D = 30, 20
IDS = torch.tensor([3, 3, 7, 0, 29, 5, 5, 5, 11, 2])
OFFSETS = torch.tensor([0, 2, 2, 3, 9])
MODES = ["sum", "mean", "majority"]


def pair(mode, padding_idx=None, include_last_offset=False):
    """A binary bag, and nn.EmbeddingBag on the same values (its "sum" for "majority")."""
    bag = dbt.BinaryEmbeddingBag(V, D, mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset)
    with torch.no_grad():
        bag.weight.scale.mul_(torch.rand(V, 1) + 0.5)
    kind = "sum" if mode == "majority" else mode
    dense = nn.EmbeddingBag(V, D, mode=kind, padding_idx=padding_idx, include_last_offset=include_last_offset)
    with torch.no_grad():
        dense.weight.copy_(bag.weight.dequantize())
    return bag, dense


def expected(bag, ids, offsets, dtype=np.float32, weights=None):
    bounds = np.append(offsets.numpy(), len(ids))
    return reference.lookup_bag(bag.weight.bits.numpy(), bag.weight.scale.numpy(), ids.numpy(), bounds, D, bag.mode, weights, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_values_of_the_reference(mode, kind):
    bag, dense = pair(mode, padding_idx=5)
    rows = bag(IDS.to(kind), OFFSETS.to(kind))
    np.testing.assert_array_equal(rows.detach().numpy(), expected(bag, IDS, OFFSETS))
    assert not rows[1].any()  # an empty bag
    if mode != "majority":
        torch.testing.assert_close(rows, dense(IDS, OFFSETS))


@pytest.mark.parametrize("mode", [*MODES, "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_reference(mode, dtype):
    """Bit for bit, with rows in the dtype of the bags."""
    bag, _ = pair("sum" if mode == "weighted" else mode, padding_idx=5)
    bag.to(dtype)
    weights = torch.randn(10, requires_grad=True) if mode == "weighted" else None
    rows = bag(IDS, OFFSETS, weights)
    dy = torch.randn(5, D).to(dtype)
    rows.backward(dy.t().contiguous().t())
    bits, scale, ids = bag.weight.bits.numpy(), bag.weight.scale.numpy(), IDS.numpy()
    bounds, given = np.append(OFFSETS.numpy(), 10), dy.float().numpy().astype("float32" if dtype == torch.float32 else ml_dtypes.bfloat16)
    counts = reference.bag_counts(scale, ids, bounds, 5) if mode == "mean" else None
    factors = None if weights is None else weights.detach().numpy()
    want = reference.bag_gradient(ids, bounds, given, bag.mode, counts, factors, 5)
    grad = bag.weight.grad
    assert grad.rows.dtype == dtype
    assert grad.rows.float().numpy().tobytes() == want.astype(np.float32).tobytes()
    if weights is not None:
        want = reference.bag_weight_gradient(bits, scale, ids, bounds, given, D, 5)
        assert weights.grad.numpy().tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    bag, _ = pair("sum")
    exact = torch.from_numpy(expected(bag, IDS, OFFSETS))
    bag.to(dtype)
    assert torch.equal(bag(IDS, OFFSETS), exact.to(dtype))


def test_majority_by_hand():
    table = torch.tensor([[1.0, 1.0, -1.0], [-9.0, 1.0, -9.0], [1.0, -1.0, -1.0]])
    bag = dbt.BinaryEmbeddingBag.from_float(table, mode="majority")
    assert bag(torch.tensor([[0, 1]])).tolist() == [[1.0, 1.0, -1.0]]  # a tie counts as +1, and scales do not count
    assert bag(torch.tensor([[0, 1, 2], [1, 1, 0]])).tolist() == [[1.0, 1.0, -1.0], [-1.0, 1.0, -1.0]]


@pytest.mark.parametrize("mode", MODES)
def test_two_dimensional_ids_are_bags_of_one_length(mode):
    bag, _ = pair(mode)
    ids = torch.randint(0, V, (4, 7))
    assert torch.equal(bag(ids), bag(ids.flatten(), torch.arange(0, 28, 7)))
    assert torch.equal(bag(ids.t().contiguous().t()), bag(ids))
    assert bag(torch.empty(3, 0, dtype=torch.int64)).tolist() == [[0.0] * D] * 3
    assert bag(torch.empty(0, 4, dtype=torch.int64)).shape == (0, D)


def test_include_last_offset():
    bag, dense = pair("mean", include_last_offset=True)
    bounds = torch.cat([OFFSETS, torch.tensor([10])])
    torch.testing.assert_close(bag(IDS, bounds), dense(IDS, bounds))
    with pytest.raises(ValueError, match="offsets must start at 0 and end at the number of ids, 10, got 0 and 9"):
        bag(IDS, OFFSETS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 5])
def test_gradient_against_a_dense_table(mode, padding_idx, summed):
    bag, dense = pair(mode, padding_idx)
    dy = torch.randn(5, D)
    bag(IDS, OFFSETS).backward(dy)
    dense(IDS, OFFSETS).backward(dy)
    assert type(bag.weight.grad) is dbt.RowGrad
    assert bag.weight.grad.rows.shape == (10, D)
    torch.testing.assert_close(summed(bag.weight.grad), dense.weight.grad)


CALLS = [
    (mode, two_dimensional, weighted, include_last, padding_idx)
    for mode in ("sum", "mean")
    for two_dimensional in (False, True)
    for weighted in (False, True)
    for include_last in (False, True)
    for padding_idx in (None, 5, -V)
    if mode == "sum" or not weighted
]


@pytest.mark.parametrize(("mode", "two_dimensional", "weighted", "include_last", "padding_idx"), CALLS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_every_call_of_nn_embedding_bag(mode, two_dimensional, weighted, include_last, padding_idx, kind, summed):
    """All ways to call it together: outputs, row gradients and gradients of the weights are those of the dense module."""
    bag, dense = pair(mode, padding_idx, include_last)
    assert bag.padding_idx == dense.padding_idx
    ids, offsets = (IDS.view(5, 2), None) if two_dimensional else (IDS, OFFSETS)
    if include_last and offsets is not None:
        offsets = torch.cat([offsets, torch.tensor([10])])
    factors = torch.randn(ids.shape) if weighted else None
    results, dy = [], torch.randn(5, D)
    for module in (bag, dense):
        weights = None if factors is None else factors.clone().requires_grad_()
        output = module(ids.to(kind), None if offsets is None else offsets.to(kind), weights)
        output.backward(dy)
        results.append([output, None if weights is None else weights.grad])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(summed(bag.weight.grad), dense.weight.grad)


def test_per_sample_weights(summed):
    bag, dense = pair("sum", padding_idx=5)
    factors = [torch.randn(10).requires_grad_() for _ in range(2)]
    factors[1].data.copy_(factors[0].data)
    dy = torch.randn(5, D)
    outputs = [module(IDS, OFFSETS, per_sample_weights=factor) for module, factor in zip((bag, dense), factors, strict=True)]
    np.testing.assert_array_equal(outputs[0].detach().numpy(), expected(bag, IDS, OFFSETS, weights=factors[0].detach().numpy()))
    for output in outputs:
        output.backward(dy)
    torch.testing.assert_close(summed(bag.weight.grad), dense.weight.grad)
    torch.testing.assert_close(factors[0].grad, factors[1].grad)
    assert not factors[0].grad[5:8].any()  # padding


def test_gradient_of_per_sample_weights_alone():
    bag, dense = pair("sum")
    bag.requires_grad_(False)
    weights = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    ids = IDS.view(2, 5)
    bag(ids, per_sample_weights=weights).sum().backward()
    assert bag.weight.grad is None
    torch.testing.assert_close(weights.grad, dense.weight[ids].sum(-1).bfloat16())


@pytest.mark.parametrize("mode", MODES)
def test_training_gives_the_bits_of_the_same_row_gradient(mode):
    """A step after a bag is the step of a table that got the bag's row gradient."""
    bag, _ = pair(mode)
    other = nn.Parameter(bag.weight.detach().clone())
    optimizers = [dbt.XOR([table], rule=rules.Counter(3)) for table in (bag.weight, other)]
    before = bag.weight.detach().clone()
    for step in range(4):
        (bag((IDS + step) % V, OFFSETS) * torch.randn(5, D)).sum().backward()
        other.grad = dbt.RowGrad(bag.weight.grad.ids, bag.weight.grad.rows, (V, D))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(bag.weight, other)
    assert not torch.equal(bag.weight.bits, before.bits)


def test_accumulation_and_no_grad(summed):
    bag, dense = pair("mean")
    for shift in range(3):
        for module in (bag, dense):
            module((IDS + shift) % V, OFFSETS).sin().sum().backward()
    torch.testing.assert_close(summed(bag.weight.grad), dense.weight.grad)
    with torch.no_grad():
        assert bag(IDS, OFFSETS).grad_fn is None
    with torch.inference_mode():
        assert bag(IDS, OFFSETS).is_inference()


def test_compiled():
    torch._dynamo.reset()
    for mode in MODES:
        bag, _ = pair(mode, padding_idx=5)
        function = torch.compile(lambda ids, offsets, bag=bag: bag(ids, offsets).sin().sum(), backend="aot_eager", fullgraph=True)
        rows = []
        for compiled in (False, True):
            bag.weight.grad = None
            (function(IDS, OFFSETS) if compiled else bag(IDS, OFFSETS).sin().sum()).backward()
            rows.append(bag.weight.grad.rows)
        assert torch.equal(*rows)


def test_operator_registrations():
    bag, _ = pair("sum", padding_idx=5)
    bounds = torch.tensor([0, 2, 10])
    table, weights = bag.weight, torch.rand(10)
    for mode, factors in (("mean", None), ("sum", weights)):
        arguments = (table.bits, table.scale, IDS, bounds, factors, D, mode, torch.float16)
        torch.library.opcheck(torch.ops.dualbin.lookup_bag_packed.default, arguments)


def test_state_dict_and_from_float():
    bag, _ = pair("mean")
    assert list(bag.state_dict()) == ["weight.bits", "weight.scale"]
    other = dbt.BinaryEmbeddingBag(V, D)
    other.load_state_dict(bag.state_dict())
    assert torch.equal(other(IDS, OFFSETS), bag(IDS, OFFSETS))
    dense = nn.EmbeddingBag(V, D, mode="sum", padding_idx=2, include_last_offset=True).requires_grad_(False).eval()
    packed = dbt.BinaryEmbeddingBag.from_float(dense)
    assert (packed.mode, packed.padding_idx, packed.include_last_offset) == ("sum", 2, True)
    assert not packed.weight.requires_grad
    assert not packed.training
    np.testing.assert_array_equal(packed.weight.bits, dualbin.pack(dense.weight.numpy()))
    assert repr(packed) == ("BinaryEmbeddingBag(30, 20, mode='sum', include_last_offset=True, padding_idx=2, dtype=torch.float32)")
    with pytest.raises(ValueError, match="mode must be one of 'sum', 'mean', 'majority', got 'max'"):
        dbt.BinaryEmbeddingBag.from_float(nn.EmbeddingBag(V, D, mode="max"))


def test_from_pretrained():
    w = torch.randn(V, D)
    bag = dbt.BinaryEmbeddingBag.from_pretrained(w, mode="sum", include_last_offset=True, padding_idx=-1, sparse=False)
    same = dbt.BinaryEmbeddingBag.from_float(w, mode="sum", padding_idx=V - 1)
    assert torch.equal(bag.weight, same.weight)
    assert (bag.mode, bag.include_last_offset, bag.padding_idx, bag.weight.requires_grad) == ("sum", True, V - 1, False)
    bag = dbt.BinaryEmbeddingBag.from_pretrained(w, freeze=False)
    assert (bag.mode, bag.include_last_offset, bag.padding_idx, bag.weight.requires_grad) == ("mean", False, None, True)
    with pytest.raises(ValueError, match=r"max_norm=1.0 of nn.EmbeddingBag cannot be used"):
        dbt.BinaryEmbeddingBag.from_pretrained(w, max_norm=1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ((IDS,), TypeError, "offsets must be a tensor of int32 or int64 where ids have shape"),
        ((IDS, OFFSETS.float()), TypeError, "offsets must be a tensor of int32 or int64"),
        ((IDS, OFFSETS[None]), ValueError, r"offsets must have shape \[G\], got \[1, 5\]"),
        ((IDS, torch.tensor([1, 4])), ValueError, "offsets must start at 0"),
        ((IDS, torch.tensor([0, 5, 4])), ValueError, "offsets"),
        ((IDS, torch.tensor([0, 11])), ValueError, "offsets"),
        ((IDS.view(2, 5), OFFSETS), ValueError, "offsets must be None where ids have shape"),
        ((IDS.view(1, 2, 5),), ValueError, r"ids must have shape \[N\] or \[G, L\], got \[1, 2, 5\]"),
        ((IDS.float(), OFFSETS), TypeError, "ids must be a tensor of int32 or int64, got torch.float32"),
        ((IDS + 1, OFFSETS), IndexError, "30"),
        ((IDS - 1, OFFSETS), IndexError, "-1"),
        ((IDS, OFFSETS, torch.ones(10)), ValueError, "per_sample_weights must be None with mode 'mean'"),
        ((torch.ones(2, 2, dtype=torch.int64, device="meta"),), ValueError, "ids must be on the device of the table, cpu, got meta"),
    ],
)
def test_bad_arguments(call, error, message):
    bag, _ = pair("mean")
    with pytest.raises(error, match=message):
        bag(*call)


def test_bad_weights_and_options():
    bag, _ = pair("sum")
    with pytest.raises(ValueError, match=r"per_sample_weights must have the shape and device of ids, \[10\]"):
        bag(IDS, OFFSETS, torch.ones(9))
    with pytest.raises(TypeError, match=r"per_sample_weights must be a dense tensor of float32.*got torch.int64"):
        bag(IDS, OFFSETS, torch.ones(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="mode must be one of"):
        dbt.BinaryEmbeddingBag(V, D, mode="max")
    with pytest.raises(ValueError, match=r"max_norm=1.0 of nn.EmbeddingBag cannot be used"):
        dbt.BinaryEmbeddingBag(V, D, max_norm=1.0)
