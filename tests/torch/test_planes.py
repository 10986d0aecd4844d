"""Tables of several planes: made, converted, saved, looked up, cut down to fewer planes. tests/parity compares their arithmetic."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin
import dualbin.torch as dbt
from dualbin import reference, rules

V, D = 12, 13
PLANES = (1, 2, 3, 8)


def floats(seed=0, rows=V, dim=D):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def table(planes, **options):
    return dbt.BinaryTable.from_float(floats(), planes=planes, **options)


# ---- made from floats --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", PLANES)
def test_from_float_is_pack_and_row_scale(planes):
    w = floats()
    for made in (dbt.BinaryTable.from_float(w, planes=planes), dbt.BinaryEmbedding.from_float(w, planes=planes).weight):
        assert made.planes == planes
        assert made.bits.shape == (V, 2 * planes)
        np.testing.assert_array_equal(made.bits.detach().numpy(), dualbin.pack(w.numpy(), planes))
        np.testing.assert_array_equal(made.scale.detach().numpy(), dualbin.row_scale(w.numpy(), planes))


def test_more_planes_are_closer():
    errors = [float((table(planes).dequantize() - floats()).pow(2).mean()) for planes in range(1, 9)]
    assert all(more < 0.4 * fewer for fewer, more in itertools.pairwise(errors))
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("planes", PLANES)
def test_rows_are_those_of_the_reference(planes):
    made, ids = table(planes, padding_idx=3), torch.tensor([[0, 3], [11, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        expected = reference.lookup(made.bits.numpy(), made.scale.numpy(), ids.numpy(), D, planes=planes)
        for rows in (dbt.lookup(made, ids, dtype), F.embedding(ids, made.to(dtype)), made.dequantize(dtype)[ids]):
            assert torch.equal(rows, torch.from_numpy(expected).to(dtype))
    assert not dbt.lookup(made, torch.tensor([3])).any()


@pytest.mark.parametrize("planes", [2, 8])
def test_a_new_table_is_random_below_half_of_its_range(planes):
    module = dbt.BinaryEmbedding(2000, D, padding_idx=4, planes=planes, scale=0.5, generator=torch.Generator().manual_seed(1))
    numbers = dualbin.unpack(module.weight.bits.detach().numpy(), D, planes).astype(np.int64)
    assert abs((numbers > 0).mean() - 0.5) < 0.02
    assert np.unique(np.abs(numbers)).tolist() == list(range(1, 2 ** (planes - 1), 2))
    assert abs(np.abs(numbers).mean() / 2 ** (planes - 2) - 1) < 0.02
    assert not (module.weight.bits[:, 1::2] >> 5).any()
    assert module.weight.scale.unique().tolist() == [0.0, 0.5]
    near = dbt.BinaryEmbedding(2000, D, planes=planes, spread=0.1)
    signs = near.weight.bits.numpy()[:, :2]
    assert abs(np.unpackbits(signs ^ signs[:1], axis=1, count=D, bitorder="little").mean() - 0.18) < 0.1


# ---- arguments and names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda planes: dbt.BinaryTable(torch.zeros(V, 2, dtype=torch.uint8), torch.ones(V, 1), D, planes=planes),
        lambda planes: dbt.BinaryTable.from_float(floats(), planes=planes),
        lambda planes: dbt.BinaryEmbedding(V, D, planes=planes),
        lambda planes: dbt.BinaryEmbedding.from_float(nn.Embedding(V, D), planes=planes),
        lambda planes: dbt.BinaryEmbedding.from_pretrained(floats(), planes=planes),
        lambda planes: dbt.BinaryEmbeddingBag(V, D, planes=planes),
        lambda planes: dbt.BinaryEmbeddingBag.from_float(floats(), planes=planes),
        lambda planes: dbt.convert(nn.Sequential(nn.Embedding(V, D)), 1, planes=planes),
    ],
)
@pytest.mark.parametrize(("planes", "error"), [(0, ValueError), (9, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)])
def test_bad_planes(make, planes, error):
    with pytest.raises(error, match="planes must be"):
        make(planes)


@pytest.mark.parametrize(
    ("bits", "planes", "message"),
    [
        (torch.zeros(V, 4, dtype=torch.uint8), 1, r"bits must have shape \[V, 2\] with V >= 1 for dim 13, got \[12, 4\]"),
        (torch.zeros(V, 2, dtype=torch.uint8), 2, r"bits must have shape \[V, 4\] with V >= 1 for dim 13 and 2 planes, got \[12, 2\]"),
        (torch.tensor([[0, 0, 0, 32]], dtype=torch.uint8).expand(V, 4).contiguous(), 2, "bits has bits set beyond column 12"),
    ],
)
def test_bits_that_do_not_fit(bits, planes, message):
    with pytest.raises(ValueError, match=message):
        dbt.BinaryTable(bits, torch.ones(V, 1), D, planes=planes)


def test_repr():
    assert repr(table(2)) == "BinaryTable(rows=12, dim=13, planes=2, dtype=torch.float32, device=cpu, requires_grad=False)"
    assert "planes" not in repr(table(1)) + repr(dbt.BinaryEmbedding(V, D)) + repr(dbt.BinaryEmbeddingBag(V, D))
    assert repr(dbt.BinaryEmbedding(V, D, planes=4)) == "BinaryEmbedding(12, 13, planes=4, dtype=torch.float32)"
    assert repr(dbt.BinaryEmbeddingBag(V, D, planes=4)) == "BinaryEmbeddingBag(12, 13, mode='mean', planes=4, dtype=torch.float32)"


def test_memory_is_counted():
    made = table(3)
    assert made.nbytes == V * (3 * 2 + 4)
    assert made.element_size() * made.numel() == made.nbytes


# ---- fewer planes ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("rescale", [False, True])
def test_with_planes(planes, rescale):
    made = nn.Parameter(table(planes, padding_idx=2))
    for fewer in range(1, planes + 1):
        top = made.with_planes(fewer, rescale=rescale)
        assert (top.planes, top.shape, top.requires_grad, top.is_leaf) == (fewer, made.shape, False, True)
        bits, scale = reference.with_planes(made.bits.numpy(), made.scale.numpy(), D, planes, fewer, rescale=rescale)
        np.testing.assert_array_equal(top.bits.numpy(), bits)
        np.testing.assert_array_equal(top.scale.numpy(), scale)
        assert top.bits.data_ptr() != made.bits.data_ptr()
        assert top.scale.data_ptr() != made.scale.data_ptr()
        assert float(top.scale[2]) == 0
    with pytest.raises(ValueError, match=f"{planes + 1}|planes must be"):
        made.with_planes(planes + 1)
    with pytest.raises((TypeError, ValueError), match="planes must be"):
        made.with_planes(0)
    with pytest.raises(TypeError, match="rescale must be True or False, got None"):
        made.with_planes(1, rescale=None)


def test_fewer_planes_without_rescaling_are_the_top_of_the_integer():
    made = table(8)
    whole = dualbin.unpack(made.bits.numpy(), D, 8).astype(np.int64)
    for fewer in range(1, 9):
        top = made.with_planes(fewer, rescale=False)
        levels = np.abs(whole) // 2 >> 8 - fewer
        expected = np.sign(whole) * (2 * levels + 1) / 2 ** (fewer - 1)
        np.testing.assert_array_equal(top.dequantize().numpy(), (made.scale.numpy() * expected).astype(np.float32))


def test_rescaling_is_the_least_squared_error():
    made = table(4)
    for fewer in (1, 2, 3):
        errors = [
            float((t.dequantize() - made.dequantize()).pow(2).sum())
            for t in (made.with_planes(fewer), made.with_planes(fewer, rescale=False))
        ]
        assert errors[0] < errors[1]
        top = made.with_planes(fewer)
        best = errors[0]
        for factor in (0.99, 1.01):
            other = dbt.BinaryTable(top.bits, top.scale * factor, D, planes=fewer)
            assert float((other.dequantize() - made.dequantize()).pow(2).sum()) > best


def test_with_planes_keeps_dtype_place_and_frozen_rows():
    made = dbt.BinaryTable(table(4).bits, table(4).scale, D, torch.bfloat16, 4, first_row=7)
    dbt.freeze_rows(made, [3])
    top = made.with_planes(2)
    assert (top.dtype, top.first_row, top.frozen.nonzero().tolist()) == (torch.bfloat16, 7, [[3]])
    assert made.to("meta").with_planes(2).bits.shape == (V, 4)


# ---- modules -----------------------------------------------------------------------------------------------------------------------------


def test_convert():
    shared = nn.Embedding(V, D)
    model = nn.ModuleList([shared, nn.EmbeddingBag(V, D, mode="sum"), nn.Embedding(V, D)])
    model[2].weight = shared.weight
    dense = [copy.deepcopy(module.weight.detach()) for module in model]
    report = dbt.convert(model, 1, planes=4)
    assert model[0].weight is model[2].weight
    for module, w in zip(model, dense, strict=True):
        assert torch.equal(module.weight, dbt.BinaryTable.from_float(w, planes=4))
    assert [entry.after for entry in report.replaced] == [V * 12, V * 12, 0]


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode):
    bag = dbt.BinaryEmbeddingBag.from_float(floats(), mode, padding_idx=2, planes=3)
    dense = nn.EmbeddingBag.from_pretrained(bag.weight.dequantize(), freeze=False, mode=mode, padding_idx=2)
    ids = torch.tensor([[1, 2, 3], [1, 1, 5]])
    weights = torch.tensor([[0.5, 1, -2], [3, 1, 1]], requires_grad=True) if mode == "sum" else None
    ours, theirs = bag(ids, None, weights), dense(ids, None, weights)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.sin().sum(), weights) for y in (ours, theirs)] if mode == "sum" else []
    for grad in zip(*grads, strict=True):
        torch.testing.assert_close(*grad)
    (ours if mode == "mean" else bag(ids)).sin().sum().backward()
    (theirs if mode == "mean" else dense(ids)).sin().sum().backward()
    grad = bag.weight.grad.coalesce()
    torch.testing.assert_close(torch.zeros(V, D).index_add(0, grad.ids, grad.rows), dense.weight.grad)


def test_majority_is_for_one_plane():
    message = "mode 'majority' is defined for tables of one plane, got planes=2"
    with pytest.raises(ValueError, match=message):
        dbt.BinaryEmbeddingBag(V, D, mode="majority", planes=2)
    with pytest.raises(ValueError, match=message):
        dbt.BinaryEmbeddingBag.from_float(floats(), "majority", planes=2)
    bag = dbt.BinaryEmbeddingBag(V, D, planes=2)
    bag.mode = "majority"
    with pytest.raises(ValueError, match="majority"):
        bag(torch.tensor([[1, 2]]))
    model = nn.Sequential(dbt.BinaryEmbedding(V, D), nn.Linear(1, 1))
    model.bag = dbt.BinaryEmbeddingBag(V, D, mode="majority")
    model.bag.weight = nn.Parameter(table(2))
    with pytest.raises(ValueError, match="majority"):
        model.bag(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("planes", [1, 2, 4, 8])
def test_gradients_are_those_of_a_dense_float_model(planes):
    torch.manual_seed(0)
    module = dbt.BinaryEmbedding.from_float(floats(), padding_idx=3, projection=5, planes=planes)
    dense = nn.Embedding.from_pretrained(module.weight.dequantize(), freeze=False, padding_idx=3)
    projection = module.projection.detach().clone().requires_grad_()
    ids = torch.randint(0, V, (4, 6))
    losses = [y.tanh().pow(2).sum() for y in (module(ids), dense(ids) @ projection)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(module.projection.grad, projection.grad)
    grad = module.weight.grad.coalesce()
    torch.testing.assert_close(torch.zeros(V, D).index_add(0, grad.ids, grad.rows), dense.weight.grad)


def test_the_surface_of_bitorch_engine_is_for_one_plane():
    made = table(2)
    with pytest.raises(ValueError, match=r"qweight must have shape \[V, 2\], one bit a weight, for ori_embedding_dim 13, got \[12, 4\]"):
        dbt.BinaryEmbeddingForward.apply(torch.tensor([1]), made.bits, made.scale, D, True)


# ---- copies and files --------------------------------------------------------------------------------------------------------------------


def test_copies_have_the_planes():
    made = nn.Parameter(table(3))
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(made),
        made.detach().clone(),
        made.to(torch.bfloat16),
        torch.empty_like(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(buffer, weights_only=True),
        dbt.from_jax(made.detach(), copy=True),
        made[2:5],
        made.split(5)[1],
    ]
    assert [each.planes for each in copies] == [3] * len(copies)
    assert torch.equal(copies[5], made)
    assert torch.equal(copies[7].dequantize(), made.dequantize()[2:5])


@pytest.mark.parametrize(("dim", "planes"), [(D, 3), (8, 3)])
def test_copy_refuses_other_planes(dim, planes):
    """With 8 columns the bits of one plane would be broadcast to the others."""
    made, other = (dbt.BinaryTable.from_float(floats(dim=dim), planes=k) for k in (planes, 1))
    before = made.clone()
    with torch.no_grad(), pytest.raises(ValueError, match="the table and source must have the same planes, got 3 and 1: with_planes"):
        made.copy_(other)
    assert torch.equal(made, before)
    with torch.no_grad():
        other.copy_(made.with_planes(1))
    assert torch.equal(other, made.with_planes(1))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    module, other = (dbt.BinaryEmbedding(V, D, planes=2) for _ in range(2))
    state = module.state_dict()
    assert state._metadata[""]["planes"] == 2
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.weight, module.weight)
    assert other.weight.planes == 2
    before = other.weight.detach().clone()
    for wrong in (dbt.BinaryEmbedding(V, D), dbt.BinaryEmbedding(V, D, planes=3)):
        message = rf"planes mismatch for weight: this table has planes 2, the state_dict's has planes {wrong.weight.planes}\."
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(wrong.state_dict(), assign=assign)
        with pytest.raises(RuntimeError, match=r"size mismatch for weight\.bits: expected torch\.uint8 of shape \[12, 4\]"):
            other.load_state_dict(dict(wrong.state_dict()), assign=assign)
    with pytest.raises(RuntimeError, match="dim mismatch"):  # as many bytes a row
        other.load_state_dict(dbt.BinaryEmbedding(V, 32).state_dict(), assign=assign)
    assert torch.equal(other.weight, before)
    other.load_state_dict(dict(state), assign=assign)


def test_average_and_grow():
    a, b = table(3), dbt.BinaryTable.from_float(floats(1), planes=3)
    mean = sum(dbt.average(a, b, 0.25, step=step).dequantize() for step in range(400)) / 400
    expected = 0.75 * a.dequantize() + 0.25 * b.dequantize()
    assert float((mean - expected).abs().mean()) < 0.1
    with pytest.raises(ValueError, match="a and b of average must have the same planes, got 3 and 1"):
        dbt.average(a, table(1), 0.5)
    module = dbt.BinaryEmbedding.from_float(floats(), planes=3)
    optimizer = dbt.XOR([module.weight], rule=rules.Counter(4))
    module(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    kept, values = module.weight.detach().clone(), floats(2, rows=2)
    dbt.grow(module, V + 2, optimizer=optimizer, values=values)
    assert module.weight.planes == 3
    assert torch.equal(module.weight.detach()[:V], kept)
    assert torch.equal(module.weight.detach()[V:], dbt.BinaryTable.from_float(values, planes=3))
    dbt.grow(module, V + 40, optimizer=optimizer)
    assert module.weight.bits.shape == (V + 40, 6)
    assert {name: tuple(array.shape) for name, array in optimizer.state[module.weight].items() if name != "step"} == {
        "counter": (V + 40, 2),
        "record": (V + 40, 4),
    }
    module(torch.arange(V + 40)).pow(2).sum().backward()
    optimizer.step()
    assert optimizer.stats()["rows"] == V + 40


@pytest.mark.parametrize("planes", [2, 8])
def test_compiled_lookups(planes):
    module = dbt.BinaryEmbedding.from_float(floats(), planes=planes)
    compiled = torch.compile(lambda ids: module(ids).sin(), fullgraph=True, backend="aot_eager")
    ids = torch.tensor([3, 1, 3])
    assert torch.equal(compiled(ids), module(ids).sin())
    compiled(ids).sum().backward()
    grad, module.weight.grad = module.weight.grad.coalesce(), None
    module(ids).sin().sum().backward()
    assert torch.equal(grad.rows, module.weight.grad.coalesce().rows)
