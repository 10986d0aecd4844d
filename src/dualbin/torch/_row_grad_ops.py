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
    return RowGrad._holding(grad._held, grad.shape)


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
    return grad


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
    return RowGrad._wrap(grad.ids.new_empty(0), grad.rows.new_empty(0, grad.shape[1]), grad.shape)


@RowGrad.handles(aten.zero_.default)
def _zero_(_func: Any, grad: RowGrad) -> RowGrad:
    return grad._hold(grad.ids.new_empty(0), grad.rows.new_empty(0, grad.shape[1]))


@RowGrad.handles(aten._foreach_zero_.default)
def _foreach_zero_(_func: Any, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


@RowGrad.handles(aten.add.Tensor)
def _add(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    return RowGrad._wrap(*_concatenate(func, grad, other, alpha), grad.shape)


@RowGrad.handles(aten.add_.Tensor)
def _add_(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    ids, rows = _concatenate(func, grad, other, alpha)
    return grad._hold(ids, rows.to(grad.dtype))


@RowGrad.handles(aten.neg.default)
def _neg(_func: Any, grad: RowGrad) -> RowGrad:
    return RowGrad._wrap(grad.ids, -grad.rows, grad.shape)


@RowGrad.handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _scaled(func: Any, grad: Any, factor: Any) -> RowGrad:
    if not isinstance(grad, RowGrad) and func is aten.mul.Tensor:
        grad, factor = factor, grad
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
    rows = grad.coalesce().rows
    return rows.new_zeros((), dtype=dtype) if rows.numel() == 0 else func(rows, order, dtype=dtype)


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
    total = grad.coalesce()  # the bound is on the gradient of a weight, not on one term of it
    func(total.rows, *bounds)
    return grad._hold(total.ids, total.rows.to(grad.dtype))


@RowGrad.handles(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(func: Any, grad: RowGrad, *bounds: float | None) -> RowGrad:
    in_place = {aten.clamp.default: aten.clamp_, aten.clamp_min.default: aten.clamp_min_, aten.clamp_max.default: aten.clamp_max_}[func]
    return _clamp_(in_place.default, _clone(func, grad), *bounds)


@RowGrad.handles(aten.allclose.default)
def _allclose(func: Any, grad: Any, other: Any, *args: Any, **kwargs: Any) -> bool:
    """Of the dense gradients."""
    _check_same_table(func, grad, other)
    sums = [grad.coalesce(), other.coalesce()]
    ids = torch.cat([total.ids for total in sums]).unique()
    rows = [total.rows.new_zeros(len(ids), grad.shape[1]) for total in sums]
    for all_rows, total in zip(rows, sums, strict=True):
        all_rows[torch.searchsorted(ids, total.ids)] = total.rows
    return func(*rows, *args, **kwargs)


@RowGrad.handles(aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar)
def _foreach_clamp_(func: Any, tensors: list[Tensor], bound: float) -> None:
    single = torch.clamp_min_ if func is aten._foreach_clamp_min_.Scalar else torch.clamp_max_
    for tensor in tensors:
        single(tensor, bound)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.rows if isinstance(tensor, RowGrad) else tensor


def _concatenate(func: Any, grad: Any, other: Any, alpha: float) -> tuple[Tensor, Tensor]:
    _check_same_table(func, grad, other)
    ids_type = torch.promote_types(grad.ids.dtype, other.ids.dtype)
    rows_type = torch.promote_types(grad.dtype, other.dtype)
    more = other.rows if alpha == 1 else other.rows * alpha
    return torch.cat([grad.ids.to(ids_type), other.ids.to(ids_type)]), torch.cat([grad.rows.to(rows_type), more.to(rows_type)])


def _check_same_table(func: Any, grad: Any, other: Any) -> None:
    if not (isinstance(grad, RowGrad) and isinstance(other, RowGrad)):
        raise RowGrad._dense(func, "with a dense tensor")
    if grad.shape != other.shape:
        msg = f"{func}: both RowGrads must belong to one table, got shapes {tuple(grad.shape)} and {tuple(other.shape)}"
        raise ValueError(msg)


def _check_scalar(func: Any, factor: Any) -> None:
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise RowGrad._dense(func, "with a factor for each element")
