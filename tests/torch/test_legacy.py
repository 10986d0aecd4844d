"""BinaryEmbeddingForward and sparse_update_embedding_qweight: by value, on cases worked out by hand."""

import pytest
import torch
from torch import nn

import dualbin.torch as dbt

#: D = 3 in one byte: 0b101 is +1, -1, +1
BITS = [0b101, 0b010, 0b111, 0b000]
SCALE = [0.5, 2.0, 1.0, 0.0]


@pytest.fixture
def qweight():
    return nn.Parameter(torch.tensor(BITS, dtype=torch.uint8).unsqueeze(1), requires_grad=False)


@pytest.fixture
def scale():
    return torch.tensor(SCALE).unsqueeze(1)


def apply(ids, qweight, scale, dim=3, is_train=True):
    return dbt.BinaryEmbeddingForward.apply(torch.tensor(ids), qweight, scale, dim, is_train)


def test_forward(qweight, scale):
    assert issubclass(dbt.BinaryEmbeddingForward, torch.autograd.Function)
    out = apply([[0, 1], [2, 3]], qweight, scale)
    assert out.tolist() == [[[0.5, -0.5, 0.5], [-2.0, 2.0, -2.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]]
    assert out.dtype == torch.float32
    assert apply([[0]], qweight, scale.bfloat16()).dtype == torch.bfloat16


def test_backward_leaves_the_packed_gradient(qweight, scale):
    """Row 0 occurs twice; only the signs of its sum (1, -1, 0) count. Row 2 gets -1, 0, 2; row 3 is a padding row."""
    ids = torch.tensor([[0, 2], [3, 0]])
    out = dbt.BinaryEmbeddingForward.apply(ids, qweight, scale, 3, True)
    dy = torch.tensor([[[3.0, -3.0, 1.0], [-1.0, 0.0, 2.0]], [[1.0, 1.0, 1.0], [-2.0, 2.0, -1.0]]])
    out.backward(dy)
    assert (qweight.grad.dtype, qweight.grad.shape) == (torch.uint8, qweight.shape)
    # row 0 is + - +: sums + - 0 agree in columns 0 and 1. Row 2 is + + +: only column 2 agrees. A sum of 0 is never set.
    assert qweight.grad.flatten().tolist() == [0b011, 0, 0b100, 0]
    assert qweight.active_indices is ids
    assert scale.grad is None


def test_xor_with_the_gradient_is_a_descent_step(scale):
    qweight = torch.randint(0, 256, (6, 3), dtype=torch.uint8)
    qweight[:, 2] &= 0b1111
    scale = torch.tensor([[0.5], [2.0], [-1.0], [0.3], [1.0], [-0.2]])
    ids, target = torch.randint(0, 6, (4, 5)), torch.randn(4, 5, 20)

    def loss():
        return (dbt.BinaryEmbeddingForward.apply(ids, qweight, scale, 20, True) * target).sum()  # linear in every weight

    before = loss()
    before.backward()
    assert not bool((qweight.grad[:, 2] >> 4).any())
    returned = dbt.sparse_update_embedding_qweight(qweight, qweight.grad, qweight.active_indices)
    assert returned is qweight
    after = loss()
    assert after.item() < before.item()
    after.backward()
    assert not qweight.grad.any()  # nothing is left to gain on a linear loss
    assert not bool((qweight[:, 2] >> 4).any())


def test_frozen_scale_and_plain_tensor_weight(scale):
    qweight = torch.tensor(BITS, dtype=torch.uint8).unsqueeze(1)
    assert not scale.requires_grad
    apply([[1]], qweight, scale).sum().backward()
    assert qweight.grad.flatten().tolist() == [0, 0b010, 0, 0]


def test_scale_gets_its_gradient_if_it_wants_one(qweight, scale):
    scale.requires_grad_()
    out = apply([[0, 1], [0, 3]], qweight, scale)
    out.backward(torch.arange(12.0).reshape(2, 2, 3))
    # row 0: w = + - +, g = (0+6, 1+7, 2+8); row 1: w = - + -, g = (3, 4, 5); row 3: w = - - -, g = (9, 10, 11)
    assert scale.grad.flatten().tolist() == [8.0, -4.0, 0.0, -30.0]


def test_every_backward_replaces_the_last_one(qweight, scale):
    apply([[0]], qweight, scale).sum().backward()
    first = qweight.grad
    apply([[2]], qweight, scale).sum().backward()
    assert first.flatten().tolist() == [0b101, 0, 0, 0]
    assert qweight.grad.flatten().tolist() == [0, 0, 0b111, 0]
    assert qweight.active_indices.tolist() == [[2]]


def test_two_lookups_in_one_backward_are_refused(qweight, scale):
    loss = apply([[0]], qweight, scale).sum() + apply([[2]], qweight, scale).sum()
    with pytest.raises(RuntimeError, match="looked up twice"):
        loss.backward()
    apply([[2]], qweight, scale).sum().backward()
    assert qweight.grad.flatten().tolist() == [0, 0, 0b111, 0]


def test_without_training_nothing_is_saved(qweight, scale):
    scale.requires_grad_()
    out = apply([[0, 1]], qweight, scale, is_train=False)
    assert not out.requires_grad
    assert out.grad_fn is None
    with torch.no_grad():
        assert not apply([[0, 1]], qweight, scale).requires_grad
    assert len(apply([[0, 1]], qweight, scale).grad_fn.saved_tensors) == 3


def test_half_precision_gradient(qweight, scale):
    out = apply([[0, 0]], qweight, scale.half())
    out.backward(torch.ones_like(out))
    assert qweight.grad.flatten().tolist() == [0b101, 0, 0, 0]


def test_a_gradient_that_is_not_finite_sets_nothing(qweight, scale):
    out = apply([[0, 2]], qweight, scale)
    out.backward(torch.tensor([[[float("nan"), 1.0, 1.0], [1.0, 1.0, 1.0]]]))
    assert qweight.grad.flatten().tolist() == [0, 0, 0b111, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(1, 1)}, TypeError, "input must be a tensor of int32 or int64"),
        ({"input": torch.tensor([[4]])}, IndexError, "4"),
        ({"qweight": torch.zeros(4, 1)}, TypeError, "qweight must be a tensor of uint8, got torch.float32"),
        (
            {"qweight": torch.zeros(4, 2, dtype=torch.uint8)},
            ValueError,
            r"qweight must have shape \[V, 1\], one bit a weight, for ori_embedding_dim 3",
        ),
        ({"qweight": torch.zeros(4, 2, dtype=torch.uint8)[:, :1]}, ValueError, "qweight must be contiguous"),
        ({"embed_scale": torch.ones(4)}, ValueError, r"embed_scale must have shape \[4, 1\]"),
        ({"embed_scale": torch.ones(4, 1).double()}, TypeError, "embed_scale must be a tensor of float32"),
        ({"ori_embedding_dim": 0}, ValueError, "ori_embedding_dim must be at least 1"),
        ({"ori_embedding_dim": 9}, ValueError, "qweight must have shape"),
    ],
)
def test_bad_arguments(qweight, scale, change, error, message):
    arguments = {"input": torch.tensor([[0]]), "qweight": qweight, "embed_scale": scale, "ori_embedding_dim": 3, "is_train": True} | change
    with pytest.raises(error, match=message):
        dbt.BinaryEmbeddingForward.apply(**arguments)


# ---- the update --------------------------------------------------------------------------------------------------------------------------


def packed(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


def test_update_of_all_rows():
    qweight = packed([0b1100, 7], [1, 2], [255, 0])
    address = qweight.data_ptr()
    dbt.sparse_update_embedding_qweight(qweight, packed([0b1010, 0], [0, 0], [255, 1]))
    assert qweight.tolist() == [[0b0110, 7], [1, 2], [0, 1]]
    assert qweight.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_update_of_active_rows_with_repeats(dtype):
    qweight = packed([1], [1], [1])
    version = qweight._version
    dbt.sparse_update_embedding_qweight(qweight, packed([3], [3], [3]), torch.tensor([[2, 0], [2, 2]], dtype=dtype))
    assert qweight.tolist() == [[2], [1], [2]]
    assert qweight._version > version


def test_update_of_no_rows():
    qweight = packed([1], [1])
    dbt.sparse_update_embedding_qweight(qweight, packed([3], [3]), torch.tensor([], dtype=torch.int64))
    assert qweight.tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("grad", "active", "error", "message"),
    [
        (torch.zeros(3, 1), None, TypeError, "grad_weight must be a tensor of uint8"),
        (packed([3], [3]), None, ValueError, "grad_weight must have the shape and device of qweight"),
        (packed([3], [3], [3]), torch.tensor([0, 3]), IndexError, r"active_indices must be in \[0, 3\).*got 3"),
        (packed([3], [3], [3]), torch.tensor([-1]), IndexError, r"active_indices must be in \[0, 3\).*got -1"),
        (packed([3], [3], [3]), torch.tensor([0.0]), TypeError, "active_indices must be a tensor of int32 or int64"),
    ],
)
def test_update_refuses_bad_arguments(grad, active, error, message):
    qweight = packed([1], [1], [1])
    with pytest.raises(error, match=message):
        dbt.sparse_update_embedding_qweight(qweight, grad, active)
    assert qweight.tolist() == [[1], [1], [1]]


def test_update_refuses_a_weight_that_is_not_packed():
    with pytest.raises(TypeError, match="qweight must be a tensor of uint8"):
        dbt.sparse_update_embedding_qweight(torch.zeros(3, 1), packed([3], [3], [3]))
    with pytest.raises(ValueError, match="qweight must be contiguous"):
        dbt.sparse_update_embedding_qweight(packed([1, 2], [3, 4]).t(), packed([1, 2], [3, 4]))
