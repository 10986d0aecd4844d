"""What stands for a write on a gradient takes effect as on a dense one, or raises: it is never ignored."""

import copy

import pytest
import torch
from torch import nn

import dualbin.torch as dbt

IDS = torch.tensor([[1, 2, 3], [3, 3, 4]])


def pair():
    """A dense and a binary embedding with the same values and gradients."""
    binary, dense = dbt.BinaryEmbedding(9, 4), nn.Embedding(9, 4)
    with torch.no_grad():
        dense.weight.copy_(binary.weight.dequantize())
    for module in (dense, binary):
        module(IDS).pow(3).sum().backward()
    return dense.weight, binary.weight


def assign(target, name, value):
    setattr(target, name, value)


TAKES_EFFECT = {
    "grad.data = scaled": lambda p: assign(p.grad, "data", p.grad.data / 1024),
    "grad.data = other dtype": lambda p: assign(p.grad, "data", p.grad.data.bfloat16()),
    "grad = scaled": lambda p: assign(p, "grad", p.grad * 2),
    "grad.data.mul_": lambda p: p.grad.data.mul_(0.5),
    "grad.mul_": lambda p: p.grad.mul_(0.5),
    "grad.div_ of a tensor": lambda p: p.grad.div_(torch.tensor(4.0)),
    "grad.detach().mul_": lambda p: p.grad.detach().mul_(2),
    "grad.detach_().mul_": lambda p: p.grad.detach_().mul_(2),
    "grad.copy_": lambda p: p.grad.copy_(p.grad * 3),
    "grad.data.copy_": lambda p: p.grad.data.copy_(p.grad * 3),
    "grad.zero_": lambda p: p.grad.zero_(),
    "grad.fill_(0)": lambda p: p.grad.fill_(0),
    "init.zeros_": lambda p: nn.init.zeros_(p.grad),
    "grad.add_": lambda p: p.grad.add_(p.grad, alpha=-0.25),
    "grad.sub_": lambda p: p.grad.sub_(p.grad * 0.5),
    "grad.neg_": lambda p: p.grad.neg_(),
    "grad.clamp_": lambda p: p.grad.clamp_(-0.1, 0.1),
    "foreach_mul_": lambda p: torch._foreach_mul_([p.grad], 2),
    "foreach_div_": lambda p: torch._foreach_div_([p.grad], 2),
    "foreach_zero_": lambda p: torch._foreach_zero_([p.grad]),
    "foreach_neg_": lambda p: torch._foreach_neg_([p.grad]),
    "foreach_add_": lambda p: torch._foreach_add_([p.grad], [p.grad * 2]),
    "foreach_copy_": lambda p: torch._foreach_copy_([p.grad], [p.grad * 2]),
    "clip_grad_norm_": lambda p: nn.utils.clip_grad_norm_([p], 0.1),
    "no_grad mul_": torch.no_grad()(lambda p: p.grad.mul_(3)),
}

RAISES = {
    "grad = dense": lambda p: assign(p, "grad", torch.ones(9, 4)),
    "grad.data = dense": lambda p: assign(p.grad, "data", torch.ones(9, 4)),
    "grad.copy_(dense)": lambda p: p.grad.copy_(torch.ones(9, 4)),
    "grad.set_": lambda p: p.grad.set_(torch.ones(9, 4)),
    "grad.data.set_": lambda p: p.grad.data.set_(torch.ones(9, 4)),
    "grad.set_(storage)": lambda p: p.grad.set_(torch.ones(9, 4).untyped_storage()),
    "grad.fill_(1)": lambda p: p.grad.fill_(1),
    "grad.add_(1)": lambda p: p.grad.add_(1),
    "grad.add_(dense)": lambda p: p.grad.add_(torch.ones(9, 4)),
    "grad.mul_(mask)": lambda p: p.grad.mul_(torch.ones(9, 1)),
    "grad.pow_": lambda p: p.grad.pow_(2),
    "grad.sign_": lambda p: p.grad.sign_(),
    "grad.nan_to_num_": lambda p: p.grad.nan_to_num_(),
    "grad[row] =": lambda p: p.grad.__setitem__(1, 0.0),
    "grad[row].zero_": lambda p: p.grad[1].zero_(),
    "grad.index_fill_": lambda p: p.grad.index_fill_(0, torch.tensor([1]), 0),
    "grad.masked_fill_": lambda p: p.grad.masked_fill_(torch.ones(9, 4, dtype=torch.bool), 0),
    "grad.view(-1).mul_": lambda p: p.grad.view(-1).mul_(2),
    "grad.lerp_": lambda p: p.grad.lerp_(p.grad, 0.5),
    "grad.addcmul_": lambda p: p.grad.addcmul_(p.grad, p.grad),
    "grad.normal_": lambda p: p.grad.normal_(),
    "grad.resize_": lambda p: p.grad.resize_(3, 4),
    "mul(out=)": lambda p: torch.mul(torch.ones(9, 4), 2, out=p.grad),
    "foreach_add_(1)": lambda p: torch._foreach_add_([p.grad], 1),
    "foreach_copy_(dense)": lambda p: torch._foreach_copy_([p.grad], [torch.ones(9, 4)]),
    "grad.numpy()": lambda p: p.grad.numpy().fill(0),
    "grad.untyped_storage()": lambda p: p.grad.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("write", TAKES_EFFECT.values(), ids=list(TAKES_EFFECT))
@pytest.mark.parametrize("backwards", [1, 2])
def test_a_write_has_the_effect_that_it_has_on_a_dense_gradient(write, backwards, summed):
    dense, binary = pair()
    for parameter in (dense, binary):
        if backwards == 2:
            torch.nn.functional.embedding(IDS + 2, parameter).sin().sum().backward()
        before = parameter.grad.clone()
        write(parameter)
        assert not torch.allclose(parameter.grad.float(), before)
    assert dense.grad.dtype == binary.grad.dtype == binary.grad.rows.dtype
    torch.testing.assert_close(
        summed(binary.grad), dense.grad.float(), rtol=1e-2 if dense.grad.dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("write", RAISES.values(), ids=list(RAISES))
def test_a_write_that_needs_the_dense_gradient_raises(write, summed):
    _, binary = pair()
    before = summed(binary.grad)
    with pytest.raises((NotImplementedError, TypeError, RuntimeError)):
        write(binary)
    assert torch.equal(summed(binary.grad), before)


def test_messages_say_what_to_assign():
    _, table = pair()
    with pytest.raises(TypeError, match=r"grad must be a RowGrad or None, got a Tensor: RowGrad\(ids, rows, shape\)"):
        table.grad = torch.ones(9, 4)
    with pytest.raises(TypeError, match=r"data must be a RowGrad, got a Tensor: RowGrad\(ids, rows, shape\)"):
        table.grad.data = torch.ones(9, 4)
    with pytest.raises(NotImplementedError, match=r"change \.rows, or assign a RowGrad\(ids, rows, shape\) to table\.grad"):
        table.grad.add_(1)


def test_ids_and_rows_can_be_changed_and_replaced(summed):
    _, table = pair()
    before = summed(table.grad)
    table.grad.rows.mul_(2)
    table.grad.rows = table.grad.rows * 2
    torch.testing.assert_close(summed(table.grad), before * 4)
    table.grad.ids.copy_(table.grad.ids.flip(0))
    table.grad.ids = table.grad.ids.flip(0)
    table.grad.data.rows = table.grad.rows / 4
    torch.testing.assert_close(summed(table.grad), before)
    with pytest.raises(ValueError, match=r"rows must have shape \[6, 4\]"):
        table.grad.rows = torch.zeros(5, 4)
    with pytest.raises(TypeError, match=r"rows must be torch.float32.*table\.grad = RowGrad\(ids, rows, shape\)"):
        table.grad.rows = table.grad.rows.half()
    with pytest.raises(TypeError, match="ids must be a tensor of int32 or int64"):
        table.grad.ids = table.grad.rows


def test_unscaling_by_hand_then_clipping():
    """The dense part is clipped wrongly where the norm of the table's part is."""
    torch.manual_seed(0)
    binary = nn.Sequential(dbt.BinaryEmbedding(40, 12), nn.Linear(12, 3))
    dense = nn.Sequential(nn.Embedding(40, 12), copy.deepcopy(binary[1]))
    with torch.no_grad():
        dense[0].weight.copy_(binary[0].weight.dequantize())
    norms = []
    for model in (dense, binary):
        (model(IDS).sum() * 1024).backward()
        for parameter in model.parameters():
            parameter.grad.data = parameter.grad.data / 1024
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        norms.append(model[1].weight.grad.norm())
    torch.testing.assert_close(norms[2:], norms[:2])


def test_a_cast_module_casts_its_gradient():
    module = dbt.BinaryEmbedding(9, 4)
    module(IDS).sum().backward()
    module.half()
    assert module.weight.grad.dtype == module.weight.grad.rows.dtype == torch.float16
    assert float(module.weight.grad.coalesce().rows[2, 0]) == 3
