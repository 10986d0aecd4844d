"""BinaryTable: construction, contents, and what PyTorch does with it as a tensor and a parameter."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin
import dualbin.torch as dbt


def make(rows=5, dim=11):
    return dbt.BinaryTable.from_float(torch.randn(rows, dim))


def test_from_float_by_value():
    w = torch.tensor([[1.0, -2.0, 0.0, -0.0, 3.0, -1.0, 2.0, -1.0, 8.0], [0.0] * 9])
    table = dbt.BinaryTable.from_float(w)
    assert table.bits.tolist() == [[0b01011101, 1], [0b11111111, 1]]
    np.testing.assert_array_equal(table.scale.numpy(), np.array([[2.0], [1e-4]], np.float32))
    assert (table.shape, table.dtype, table.dim) == ((2, 9), torch.float32, 9)
    expected = torch.tensor([[2.0, -2, 2, 2, 2, -2, 2, -2, 2], [1e-4] * 9])
    assert torch.equal(table.dequantize(), expected)


def test_from_float_agrees_with_pack_and_takes_any_layout():
    w = torch.randn(37, 50)
    for source in (w, w.t().contiguous().t(), w.bfloat16()):
        table = dbt.BinaryTable.from_float(source)
        np.testing.assert_array_equal(table.bits.numpy(), dualbin.pack(w.numpy()))
        assert table.dtype == source.dtype
        assert table.scale.dtype == torch.float32


@pytest.mark.parametrize("padding_idx", [2, -3])
def test_padding_row(padding_idx):
    table = dbt.BinaryTable.from_float(torch.randn(5, 11), padding_idx=padding_idx)
    assert (table.scale == 0).flatten().tolist() == [False, False, True, False, False]
    assert torch.equal(table.dequantize()[2], torch.zeros(11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_rounds_the_scale_once(dtype):
    table = make()
    signs = torch.from_numpy(dualbin.unpack(table.bits.numpy(), 11))
    assert torch.equal(table.dequantize(dtype), signs.to(dtype) * table.scale.to(dtype))


def test_dim_is_a_number_and_a_method():
    table = make(5, 11)
    assert isinstance(table.dim, int)
    assert (table.dim, table.dim(), table.ndim, table.dim + 1) == (11, 2, 2, 12)


BITS, SCALE = torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((BITS.int(), SCALE, 12), TypeError, "bits must be uint8, got int32"),
        ((BITS, SCALE.double(), 12), TypeError, "scale must be float32, got float64"),
        ((BITS, SCALE, 17), ValueError, "bits must have shape"),
        ((BITS, SCALE[:3], 12), ValueError, "scale must have shape"),
        ((BITS[:0], SCALE[:0], 12), ValueError, "bits must have shape"),
        ((BITS, SCALE, 0), ValueError, "dim must be at least 1"),
        ((BITS, SCALE, 12.0), TypeError, "dim must be an integer"),
        ((BITS.numpy(), SCALE, 12), TypeError, "bits must be a tensor, got a ndarray"),
        ((BITS.t().contiguous().t(), SCALE, 12), ValueError, "bits must be contiguous"),
        ((torch.full((4, 2), 255, dtype=torch.uint8), SCALE, 12), ValueError, "bits has bits set beyond column 11"),
        ((BITS, SCALE.to("meta"), 12), ValueError, "scale must be on the device of bits"),
        ((BITS, SCALE, 12, torch.float64), TypeError, "dtype must be torch.float32"),
        ((BITS, SCALE, 12, "float32"), TypeError, "dtype must be torch.float32"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        dbt.BinaryTable(*arguments)


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "w must be a tensor of float32"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "w must be a tensor of float32"),
        (np.zeros((3, 4), np.float32), TypeError, "got a ndarray"),
        (torch.zeros(3), ValueError, r"w must have shape \[V, D\]"),
        (torch.zeros(3, 0), ValueError, r"w must have shape \[V, D\]"),
        (torch.tensor([[1.0, float("nan")]]), ValueError, "w must be finite"),
    ],
)
def test_from_float_names_what_is_wrong(w, error, message):
    with pytest.raises(error, match=message):
        dbt.BinaryTable.from_float(w)


def test_from_float_refuses_a_padding_row_that_is_not_there():
    with pytest.raises(ValueError, match="padding_idx must be between -3 and 2, got 3"):
        dbt.BinaryTable.from_float(torch.randn(3, 4), padding_idx=3)


def test_parameter():
    parameter = nn.Parameter(make())
    assert isinstance(parameter, nn.Parameter)
    assert type(parameter) is dbt.BinaryTable
    assert parameter.requires_grad
    assert parameter.grad_dtype is None
    assert "rows=5, dim=11" in repr(parameter)
    assert "BinaryTable" in f"{[parameter]}"


def test_copies_are_independent_and_detach_is_not():
    table = make()
    clone, deep, same = table.clone(), copy.deepcopy(nn.Parameter(table)), table.detach()
    table.bits[0, 0] ^= 1
    assert not torch.equal(clone, table)
    assert not torch.equal(deep, table)
    assert torch.equal(same, table)
    assert isinstance(deep, nn.Parameter)
    assert deep.grad_dtype is None


def test_copy_():
    table, other = make(), make()
    address = table.bits.data_ptr()
    table.copy_(other)
    assert torch.equal(table, other)
    assert table.bits.data_ptr() == address
    with pytest.raises(ValueError, match="source must have the shape"):
        table.copy_(make(4))
    with pytest.raises(NotImplementedError, match="from_float"):
        table.copy_(torch.zeros(5, 11))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_change_the_dtype_of_rows_only(dtype):
    table = make()
    cast = table.to(dtype)
    assert cast.dtype == dtype
    assert torch.equal(cast.scale, table.scale)
    assert cast.scale.dtype == torch.float32
    assert torch.equal(cast.bits, table.bits)
    assert cast.bits.data_ptr() != table.bits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_casts_to_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="dtype of a BinaryTable must be"):
        make().to(dtype)


def test_row_slices_and_splits_are_views():
    table = make(7)
    for part, start in ((table[2:5], 2), (table.split(4)[1], 4)):
        assert torch.equal(part.bits, table.bits[start : start + part.shape[0]])
        assert part.bits.data_ptr() == table.bits[start:].data_ptr()
    for refused in (lambda: table[::2], lambda: table[:, :3], lambda: table.split(3, dim=1)):
        with pytest.raises(NotImplementedError, match="dequantize"):
            refused()


def test_empty_like_is_a_table_of_zeros():
    empty = torch.empty_like(make())
    assert type(empty) is dbt.BinaryTable
    assert not empty.bits.any()


def test_equal():
    table = make()
    assert torch.equal(table, table.clone())
    assert not torch.equal(table, make())
    assert not torch.equal(table, table.dequantize())
    assert not table.is_pinned()


def test_share_memory():
    table = make()
    assert not table.is_shared()
    assert table.share_memory_() is table
    assert table.is_shared()
    assert table.bits.is_shared()


def test_a_module_with_a_gradient_moves_to_shared_memory():
    module = dbt.BinaryEmbedding(5, 8)
    module(torch.arange(3)).sum().backward()
    ids = module.weight.grad.ids.clone()
    assert not module.weight.grad.is_shared()
    assert module.share_memory() is module
    assert module.weight.grad.is_shared()
    assert torch.equal(module.weight.grad.ids, ids)
    optimizer = dbt.XOR(module.parameters())
    optimizer.step()
    assert optimizer.stats()["rows"] == 3


@pytest.mark.parametrize("what", ["table", "gradient"])
def test_there_is_no_memory_to_read(what):
    """These pass by the dispatcher: a null pointer would be read."""
    module = dbt.BinaryEmbedding(5, 8)
    module(torch.arange(3)).sum().backward()
    packed = module.weight.detach() if what == "table" else module.weight.grad
    for call, arguments in ((packed.__dlpack__, ()), (np.from_dlpack, (packed,)), (packed.apply_, (abs,))):
        with pytest.raises(NotImplementedError, match=r"(__dlpack__|apply_) on a (BinaryTable|RowGrad)"):
            call(*arguments)


def test_pickle():
    parameter = nn.Parameter(make(), requires_grad=False)
    again = pickle.loads(pickle.dumps(parameter))
    assert torch.equal(parameter, again)
    assert not again.requires_grad
    assert isinstance(again, nn.Parameter)


def test_torch_save_and_weights_only_load():
    parameter = nn.Parameter(make())
    file = io.BytesIO()
    torch.save({"w": parameter}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["w"]
    assert torch.equal(parameter, again)
    assert again.requires_grad
    ids = torch.tensor([1, 3])
    dbt.lookup(again, ids, dtype=torch.bfloat16).sum().backward()
    assert again.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("operation", "advice"),
    [
        (lambda t: t + 1, r"XOR.*torch\.average.*dequantize"),
        (lambda t: t.mul_(2), r"XOR.*torch\.average.*scale\.mul_"),
        (lambda t: 0.9 * t + 0.1 * t, r"torch\.average.*torch\.lerp"),
        (lambda t: t @ torch.zeros(11, 3), r"Untie.*dequantize"),
        (lambda t: torch.zeros(2, 11) @ t.T, r"Untie.*dequantize"),
        (lambda t: F.linear(torch.zeros(2, 11), t), r"Untie.*dequantize"),
        (lambda t: t[torch.tensor([0])], r"torch\.lookup.*padding_idx=.*freeze_rows"),
        (lambda t: t[0].fill_(0), r"torch\.lookup.*padding_idx=.*freeze_rows"),
        (list, r"torch\.lookup.*dequantize"),
        (lambda t: t.sum(), r"torch\.lookup.*XOR.*dequantize"),
        (lambda t: t.view(11, 5), r"prepare_ddp.*sync_row_grads.*dequantize"),
        (lambda t: nn.init.normal_(t, std=0.02), r"random already.*scale=.*padding_idx=.*reset_parameters.*from_float"),
        (lambda t: t.data.uniform_(-0.1, 0.1), r"random already.*leave this line out"),
        (nn.init.xavier_uniform_, r"random already.*leave this line out"),
        (nn.init.trunc_normal_, r"random already.*leave this line out"),
        (lambda t: nn.init.constant_(t, 0.0), r"random already.*leave this line out"),
        (nn.init.orthogonal_, r"from_float"),
        (lambda t: t[1:3].zero_(), r"random already.*padding_idx="),
    ],
)
def test_what_a_table_has_not_raises_and_says_what_to_call(operation, advice):
    table = make()
    before = table.clone()
    with pytest.raises(NotImplementedError, match=advice):
        operation(table)
    assert torch.equal(table, before)


@pytest.mark.parametrize("convert", [np.asarray, lambda t: t.numpy(), lambda t: t.tolist()])
def test_dense_copies_outside_torch_have_to_be_asked_for(convert):
    with pytest.raises(TypeError, match="dequantize"):
        convert(make())


def test_stable_hash_for_the_compiler_cache():
    table = make()
    assert table._stable_hash_for_caching() == make()._stable_hash_for_caching()
    assert table._stable_hash_for_caching() != make(6)._stable_hash_for_caching()
    assert table._stable_hash_for_caching() != table.half()._stable_hash_for_caching()


def test_zeros_like_is_the_zero_gradient():
    parameter = nn.Parameter(make())
    (zero,) = torch.autograd.grad(torch.ones(1, requires_grad=True).sum(), [parameter], allow_unused=True, materialize_grads=True)
    for grad in (zero, torch.zeros_like(parameter)):
        assert type(grad) is dbt.RowGrad
        assert (grad.shape, grad.dtype, len(grad.ids)) == (parameter.shape, torch.float32, 0)


def test_assigning_data_moves_another_table_in():
    parameter, other = nn.Parameter(make()), make(7, 20).bfloat16()
    optimizer = dbt.XOR([parameter])
    parameter.data = other
    assert (parameter.shape, parameter.dtype) == ((7, 20), torch.bfloat16)
    assert parameter.bits is other.bits
    dbt.lookup(parameter, torch.tensor([6])).sum().backward()
    optimizer.step()
    assert optimizer.stats(parameter)["rows"] == 1
    assert torch.equal(parameter.data, other)
    with pytest.raises(TypeError, match=r"data must be a BinaryTable, got a Tensor: .*from_float"):
        parameter.data = torch.zeros(7, 20)


def test_graphs_that_are_alive_stop_nothing():
    emb = dbt.BinaryEmbedding(5, 11)
    model = nn.Sequential(nn.Linear(3, 3), emb)
    seen = []
    torch.autograd.graph.register_multi_grad_hook([emb.weight, model[0].weight], seen.append)
    loss = emb(torch.tensor([1, 2])).sum() + model[0](torch.ones(3)).sum()
    loss.backward()
    assert [type(grad) for grad in seen[0]] == [dbt.RowGrad, torch.Tensor]
    assert torch.autograd.graph.get_gradient_edge(emb.weight).node is not None
    model.half()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert loss.requires_grad
