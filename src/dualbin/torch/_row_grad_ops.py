"""What PyTorch's own code does with row gradients: the engine, clipping, GradScaler, anomaly mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualbin.torch import _native_call
from dualbin.torch._row_grad import RowGrad

aten = torch.ops.aten


@RowGrad.handles(aten.alias.default)
def _alias(_func: Any, grad: RowGrad) -> RowGrad:
    return grad._alias(in_graph=True)


@RowGrad.handles(aten._has_compatible_shallow_copy_type.default)
def _can_become(_func: Any, grad: Any, new: Any) -> bool:
    """Asked before `data` is assigned."""
    return isinstance(grad, RowGrad) and isinstance(new, RowGrad)


@RowGrad.handles(aten.view.default)
def _view(func: Any, grad: RowGrad, size: Sequence[int]) -> RowGrad:
    if tuple(size) != tuple(grad.shape):
        raise RowGrad._dense(func, "with another shape")
    return _alias(func, grad)


@RowGrad.handles(aten.slice_backward.default)
def _slice_backward(_func: Any, grad: RowGrad, sizes: Sequence[int], _dim: int, start: int, _end: int, _step: int) -> RowGrad:
    """Of the rows of a table from `start` on, which are all that a table can be sliced to: the gradient of the table."""
    start = min(max(start + sizes[0] if start < 0 else start, 0), sizes[0])
    return RowGrad._wrap(grad.ids + start, grad.rows, sizes)


@RowGrad.handles(aten.detach_.default)
def _detach_(_func: Any, grad: RowGrad) -> RowGrad:
    return grad._hold(grad.ids, grad.rows.detach())


@RowGrad.handles(aten.clone.default)
def _clone(_func: Any, grad: RowGrad, **_: Any) -> RowGrad:
    return RowGrad._wrap(grad.ids.clone(), grad.rows.clone(), grad.shape)


@RowGrad.handles(aten._to_copy.default)
def _to_copy(_func: Any, grad: RowGrad, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> RowGrad:
    if dtype is not None and dtype not in _native_call.FLOAT_TYPES:
        msg = f"dtype of a RowGrad must be float32, float16 or bfloat16, got {dtype}"
        raise TypeError(msg)
    ids = grad.ids.to(device=device, non_blocking=non_blocking, copy=True)
    rows = grad.rows.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=True)
    return RowGrad._wrap(ids, rows, grad.shape)


@RowGrad.handles(aten.copy_.default)
def _copy_(func: Any, grad: RowGrad, source: Any, _non_blocking: bool = False) -> RowGrad:
    _check_same_table(func, grad, source)
    return grad._hold(source.ids.to(device=grad.device, copy=True), source.rows.to(device=grad.device, dtype=grad.dtype, copy=True))


# new_empty_strided and copy_ are what the engine does with a gradient that somebody else holds too
@RowGrad.handles(aten.zeros_like.default, aten.empty_like.default, aten.new_zeros.default, aten.new_empty_strided.default)
def _empty(_func: Any, grad: RowGrad, *_args: Any, **_: Any) -> RowGrad:
    return RowGrad._wrap(*_nothing(grad), grad.shape)


def _nothing(grad: RowGrad) -> tuple[Tensor, Tensor]:
    """No ids and no rows, without a look at those that are there: they may have to be summed first."""
    ids = torch.empty(0, dtype=torch.int64, device=grad.device)
    return ids, torch.empty(0, grad.shape[1], dtype=grad.dtype, device=grad.device)


@RowGrad.handles(aten.zero_.default)
def _zero_(_func: Any, grad: RowGrad) -> RowGrad:
    return grad._hold(*_nothing(grad))


@RowGrad.handles(aten.fill_.Scalar)
def _fill_(func: Any, grad: RowGrad, value: float) -> RowGrad:
    if value != 0:
        raise RowGrad._dense(func, "with another value than 0")
    return _zero_(func, grad)


_ONE_BY_ONE: dict[Any, Any] = {
    aten._foreach_zero_.default: torch.Tensor.zero_,
    aten._foreach_neg_.default: torch.Tensor.neg_,
    aten._foreach_add_.List: torch.Tensor.add_,
    aten._foreach_sub_.List: torch.Tensor.sub_,
    aten._foreach_copy_.default: torch.Tensor.copy_,
    aten._foreach_clamp_min_.Scalar: torch.Tensor.clamp_min_,
    aten._foreach_clamp_max_.Scalar: torch.Tensor.clamp_max_,
}


@RowGrad.handles(*_ONE_BY_ONE)
def _foreach(func: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> None:
    for index, tensor in enumerate(tensors):
        _ONE_BY_ONE[func](tensor, *(arg[index] if isinstance(arg, list) else arg for arg in args), **kwargs)


@RowGrad.handles(aten.add.Tensor)
def _add(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    _check_same_table(func, grad, other)
    if torch._C._current_graph_task_id() == -1 and not (grad.requires_grad or other.requires_grad):
        return _add_(func, RowGrad._wrap(grad.ids, grad.rows, grad.shape), other, alpha=alpha)
    # lookups that one backward pass has met: their occurrences stand one after the other
    ids_type = torch.promote_types(grad.ids.dtype, other.ids.dtype)
    rows_type = torch.promote_types(grad.dtype, other.dtype)
    more = other.rows if alpha == 1 else other.rows * alpha
    ids, rows = torch.cat([grad.ids.to(ids_type), other.ids.to(ids_type)]), torch.cat([grad.rows.to(rows_type), more.to(rows_type)])
    return RowGrad._wrap(ids, rows, grad.shape)


@RowGrad.handles(aten.add_.Tensor)
def _add_(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    _check_same_table(func, grad, other)
    if torch.is_grad_enabled() and (grad.requires_grad or other.requires_grad):
        total = _add(func, grad, other, alpha=alpha)
        return grad._hold(total.ids, total.rows)
    return grad._accumulate(other.ids, other.rows if alpha == 1 else other.rows * alpha)


@RowGrad.handles(aten.sub_.Tensor)
def _sub_(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    return _add_(func, grad, other, alpha=-alpha)


@RowGrad.handles(aten.sub.Tensor)
def _sub(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    return _add(func, grad, other, alpha=-alpha)


@RowGrad.handles(aten.neg.default)
def _neg(_func: Any, grad: RowGrad) -> RowGrad:
    return RowGrad._wrap(grad.ids, -grad.rows, grad.shape)


@RowGrad.handles(aten.neg_.default)
def _neg_(_func: Any, grad: RowGrad) -> RowGrad:
    return grad._hold(grad.ids, -grad.rows)


@RowGrad.handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _scaled(func: Any, grad: Any, factor: Any) -> RowGrad:
    if not isinstance(grad, RowGrad) and func is aten.mul.Tensor:
        grad, factor = factor, grad
    if isinstance(factor, RowGrad) and func is aten.mul.Tensor:
        ids, rows, other = _summed(func, grad, factor)
        return RowGrad._wrap(ids, rows * other, grad.shape)
    _check_scalar(func, factor)
    return RowGrad._wrap(grad.ids, func(grad.rows, factor).to(grad.dtype), grad.shape)


@RowGrad.handles(aten.mul_.Tensor, aten.mul_.Scalar)
def _mul_(func: Any, grad: Any, factor: Any) -> RowGrad:
    _check_scalar(func, factor)
    return grad._hold(grad.ids, (grad.rows * factor).to(grad.dtype))  # a new tensor: the rows may be those that RowGrad was made of


@RowGrad.handles(aten.div_.Tensor, aten.div_.Scalar)
def _div_(func: Any, grad: Any, divisor: Any) -> RowGrad:
    _check_scalar(func, divisor)
    return grad._hold(grad.ids, (grad.rows / divisor).to(grad.dtype))


@RowGrad.handles(
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.ScalarList,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.Tensor,
    aten._amp_foreach_non_finite_check_and_unscale_.default,
)
def _foreach_scale_(func: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    for tensor in tensors:
        if isinstance(tensor, RowGrad):
            tensor._hold(tensor.ids, tensor.rows.clone(memory_format=torch.contiguous_format))  # as in _mul_
    return func([_rows(tensor) for tensor in tensors], *args, **kwargs)


@RowGrad.handles(aten.linalg_vector_norm.default)
def _vector_norm(func: Any, grad: RowGrad, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if dim is not None or keepdim or order <= 0:
        raise RowGrad._dense(func, "with dim, keepdim or an order of 0 or below")
    _, rows = grad._sums()
    return rows.new_zeros((), dtype=dtype) if rows.numel() == 0 else func(rows, order, dtype=dtype)


@RowGrad.handles(aten.pow.Tensor_Scalar)
def _pow(func: Any, grad: RowGrad, exponent: float) -> RowGrad:
    if isinstance(exponent, complex) or not exponent > 0:
        raise RowGrad._dense(func, "with an exponent of 0 or below")
    ids, rows = grad._sums()
    return RowGrad._wrap(ids, func(rows, exponent), grad.shape)


@RowGrad.handles(aten.abs.default)
def _abs(func: Any, grad: RowGrad) -> RowGrad:
    ids, rows = grad._sums()
    return RowGrad._wrap(ids, func(rows), grad.shape)


@RowGrad.handles(aten.sum.default, aten.mean.default)
def _sum(func: Any, grad: RowGrad, *, dtype: torch.dtype | None = None) -> Tensor:
    total = grad._sums()[1].sum(dtype=dtype)
    return total / grad.numel() if func is aten.mean.default else total


@RowGrad.handles(aten.isnan.default, aten.isinf.default)
def _which(func: Any, grad: RowGrad) -> Tensor:
    """[N, D]: of the rows that are there, all others being zero. What autograd's anomaly mode asks before it reduces the answer."""
    return func(grad.rows)


@RowGrad.handles(aten._foreach_norm.Scalar)
def _foreach_norm(_func: Any, tensors: list[Tensor], order: float = 2, dtype: Any = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors]


@RowGrad.handles(aten.clamp_.default, aten.clamp_min_.default, aten.clamp_max_.default)
def _clamp_(func: Any, grad: RowGrad, *bounds: float | None) -> RowGrad:
    limits = torch.zeros(()).clamp_(*bounds) if func is aten.clamp_.default else func(torch.zeros(()), *bounds)
    if limits != 0:
        raise RowGrad._dense(func, "to a range without 0")
    ids, rows = grad._sums()  # the bound is on the gradient of a weight, not on one term of it
    func(rows, *bounds)
    return grad._hold(ids, rows.to(grad.dtype))


@RowGrad.handles(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(func: Any, grad: RowGrad, *bounds: float | None) -> RowGrad:
    in_place = {aten.clamp.default: aten.clamp_, aten.clamp_min.default: aten.clamp_min_, aten.clamp_max.default: aten.clamp_max_}[func]
    return _clamp_(in_place.default, _clone(func, grad), *bounds)


@RowGrad.handles(aten.allclose.default)
def _allclose(func: Any, grad: Any, other: Any, *args: Any, **kwargs: Any) -> bool:
    """Of the dense gradients."""
    _, rows, other_rows = _summed(func, grad, other)
    return func(rows, other_rows, *args, **kwargs)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.rows if isinstance(tensor, RowGrad) else tensor


def _summed(func: Any, grad: Any, other: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The ids of both gradients, and the rows that each has there."""
    _check_same_table(func, grad, other)
    sums = [grad.coalesce(), other.coalesce()]
    ids = torch.cat([total.ids for total in sums]).unique()
    empty = sums[0].rows.new_zeros(len(ids), grad.shape[1])
    rows = [empty.index_put((torch.searchsorted(ids, total.ids),), total.rows) for total in sums]
    return ids, rows[0], rows[1]


def _check_same_table(func: Any, grad: Any, other: Any) -> None:
    if not (isinstance(grad, RowGrad) and isinstance(other, RowGrad)):
        raise RowGrad._dense(func, "with a dense tensor")
    if grad.shape != other.shape:
        msg = f"{func}: both RowGrads must belong to one table, got shapes {tuple(grad.shape)} and {tuple(other.shape)}"
        raise ValueError(msg)


def _check_scalar(func: Any, factor: Any) -> None:
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise RowGrad._dense(func, "with a factor for each element")
