"""The gradient of a table: the rows that were looked up, never V x D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualbin.torch import _native_call

aten = torch.ops.aten
_DETACH = aten.detach.default


class RowGrad(torch.Tensor):
    """The gradient of a :class:`BinaryTable`: `sum over n with ids[n] == r of rows[n]` for every row r, zero elsewhere.

    It has the table's shape (V, D) and stands in `table.grad`, but holds only what was looked up. Adding two concatenates them;
    norms, clipping and `GradScaler` work on it. What would need the dense `[V, D]` gradient raises NotImplementedError.

    Args:
        ids: int32 or int64 `[N]`, rows of the table; they may repeat.
        rows: float32, float16 or bfloat16 `[N, D]`, on the same device. Kept, not copied.
        shape: (V, D), the shape of the table.

    Attributes:
        ids, rows: as above.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """

    #: [ids, rows], one list for a gradient and its `detach()` and `.data`, so that in-place operations on either are seen by both
    _held: list[Tensor]

    @staticmethod
    def __new__(cls, ids: Tensor, rows: Tensor, shape: Sequence[int]) -> RowGrad:
        _check(ids, rows, shape)
        return cls._wrap(ids.detach(), rows.detach(), shape)

    @classmethod
    def _wrap(cls, ids: Tensor, rows: Tensor, shape: Sequence[int]) -> RowGrad:
        return cls._holding([ids, rows], shape)

    @classmethod
    def _holding(cls, held: list[Tensor], shape: Sequence[int]) -> RowGrad:
        rows = held[1]
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device)
        self._held = held
        return self

    @property
    def ids(self) -> Tensor:
        return self._held[0]

    @property
    def rows(self) -> Tensor:
        return self._held[1]

    def _hold(self, ids: Tensor, rows: Tensor) -> RowGrad:
        """Become another sum of rows, of the same dtype."""
        self._held[:] = ids, rows
        return self

    def coalesce(self) -> RowGrad:
        """The same gradient with ascending distinct int64 ids and float32 rows, summed in the order that `docs/design.md` fixes.

        Occurrences of a row are summed in blocks of 64, then the blocks. On a GPU this waits for the device.
        """
        check_ids("ids", self.ids, self.shape[0])
        ids, rows = _native_call.reduce_rows(self.ids, self.rows, self.shape[0])
        return RowGrad._wrap(ids, rows, self.shape)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RowGrad(shape={tuple(self.shape)}, occurrences={self.ids.shape[0]}, dtype={self.dtype}, device={self.device})"

    __str__ = __repr__

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["ids", "rows"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], _context: None, size: Sequence[int], _stride: Sequence[int]) -> RowGrad:
        return cls._wrap(inner["ids"], inner["rows"], size)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DETACH:  # the engine does it with every gradient, and hashing the op takes longer than the rest
            return cls._holding(args[0]._held, args[0].shape)
        handler = _HANDLERS.get(func)
        if handler is None:
            raise _dense(func)
        return handler(func, *args, **kwargs) if kwargs else handler(func, *args)


def row_gradient(ids: Tensor, dy: Tensor, shape: Sequence[int], padding_idx: int, *, own: bool = False) -> RowGrad:
    """The gradient that a lookup of `ids` gives a table, from the gradient `dy` of its output.

    Occurrences of `padding_idx` (none if it is -1) get zero rows, so that norms do not see them.
    The ids are copied: a buffer of ids that is filled again before the step must not change the gradient. So is `dy` unless it is the
    caller's `own`: the engine may make the same memory the gradient of another parameter, which clipping or the next backward pass changes.
    """
    ids = ids.clone() if ids.ndim == 1 else ids.flatten().clone()
    rows = dy if dy.ndim == 2 else dy.reshape(-1, shape[1])
    if not rows.is_contiguous():
        rows, own = rows.contiguous(), True
    if padding_idx >= 0:
        rows = rows.masked_fill((ids == padding_idx).unsqueeze(1), 0)
    elif not own:
        rows = rows.clone()
    return RowGrad._holding([ids, rows], shape)


def hide_from_dynamo(function: Any) -> None:
    """Let the compiler run the function and what it calls as it is where a compiled function calls backward() or a tensor's method.

    As torch._disable_dynamo, without its cost in every call.
    """
    frames: Any = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):  # private, so it may go; then only such compiled functions fail
        return
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(getattr(function, "__func__", function).__code__, frames._FrameExecStrategy(skip, skip))


for _function in (RowGrad._holding, RowGrad._wrap, RowGrad.__tensor_unflatten__, RowGrad.__torch_dispatch__, RowGrad.coalesce):
    hide_from_dynamo(_function)


def _check(ids: Any, rows: Any, shape: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in _native_call.ID_TYPES:
        msg = f"ids must be a tensor of int32 or int64, got {_describe(ids)}"
        raise TypeError(msg)
    if not isinstance(rows, Tensor) or rows.dtype not in _native_call.FLOAT_TYPES:
        msg = f"rows must be a tensor of float32, float16 or bfloat16, got {_describe(rows)}"
        raise TypeError(msg)
    if len(shape) != 2:
        msg = f"shape must be (V, D), got {tuple(shape)}"
        raise ValueError(msg)
    if ids.ndim != 1:
        msg = f"ids must have shape [N], got {list(ids.shape)}"
        raise ValueError(msg)
    if tuple(rows.shape) != (ids.shape[0], shape[1]):
        msg = f"rows must have shape [{ids.shape[0]}, {shape[1]}] for these ids and shape {tuple(shape)}, got {list(rows.shape)}"
        raise ValueError(msg)
    if ids.device != rows.device:
        msg = f"ids must be on the device of rows, {rows.device}, got {ids.device}"
        raise ValueError(msg)


def _describe(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_ids(name: str, ids: Tensor, table_rows: int) -> None:
    """Raise IndexError for ids outside [0, table_rows); on a GPU nothing is read back and such ids are dropped later."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= table_rows:
        msg = f"{name} must be in [0, {table_rows}), the rows of the table, got {low if low < 0 else high}"
        raise IndexError(msg)


def _dense(func: object, case: str = "") -> NotImplementedError:
    return NotImplementedError(
        f"{func} on a RowGrad {case + ' ' if case else ''}would need the dense [V, D] gradient of a BinaryTable. "
        "Train the table with dualbin.torch.XOR; to look at the gradient use .ids and .rows, or .coalesce() for one summed row per id"
    )


# ---- what torch's own code does with gradients -------------------------------------------------------------------------------------------

_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(funcs, handler))
        return handler

    return register


@_handles(aten.alias.default)
def _alias(_func: Any, grad: RowGrad) -> RowGrad:
    return RowGrad._holding(grad._held, grad.shape)


@_handles(aten.view.default)
def _view(func: Any, grad: RowGrad, size: Sequence[int]) -> RowGrad:
    if tuple(size) != tuple(grad.shape):
        raise _dense(func, "with another shape")
    return _alias(func, grad)


@_handles(aten.detach_.default)
def _detach_(_func: Any, grad: RowGrad) -> RowGrad:
    return grad


@_handles(aten.clone.default)
def _clone(_func: Any, grad: RowGrad, **_: Any) -> RowGrad:
    return RowGrad._wrap(grad.ids.clone(), grad.rows.clone(), grad.shape)


@_handles(aten._to_copy.default)
def _to_copy(_func: Any, grad: RowGrad, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> RowGrad:
    if dtype is not None and dtype not in _native_call.FLOAT_TYPES:
        msg = f"dtype of a RowGrad must be float32, float16 or bfloat16, got {dtype}"
        raise TypeError(msg)
    ids = grad.ids.to(device=device, non_blocking=non_blocking, copy=True)
    rows = grad.rows.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=True)
    return RowGrad._wrap(ids, rows, grad.shape)


@_handles(aten.copy_.default)
def _copy_(func: Any, grad: RowGrad, source: Any, _non_blocking: bool = False) -> RowGrad:
    _check_same_table(func, grad, source)
    return grad._hold(source.ids.to(device=grad.device, copy=True), source.rows.to(device=grad.device, dtype=grad.dtype, copy=True))


# new_empty_strided and copy_ are what the engine does with a gradient that somebody else holds too
@_handles(aten.zeros_like.default, aten.empty_like.default, aten.new_zeros.default, aten.new_empty_strided.default)
def _empty(_func: Any, grad: RowGrad, *_args: Any, **_: Any) -> RowGrad:
    return RowGrad._wrap(grad.ids.new_empty(0), grad.rows.new_empty(0, grad.shape[1]), grad.shape)


@_handles(aten.zero_.default)
def _zero_(_func: Any, grad: RowGrad) -> RowGrad:
    return grad._hold(grad.ids.new_empty(0), grad.rows.new_empty(0, grad.shape[1]))


@_handles(aten._foreach_zero_.default)
def _foreach_zero_(_func: Any, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


@_handles(aten.add.Tensor)
def _add(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    return RowGrad._wrap(*_concatenate(func, grad, other, alpha), grad.shape)


@_handles(aten.add_.Tensor)
def _add_(func: Any, grad: Any, other: Any, *, alpha: float = 1) -> RowGrad:
    ids, rows = _concatenate(func, grad, other, alpha)
    return grad._hold(ids, rows.to(grad.dtype))


@_handles(aten.neg.default)
def _neg(_func: Any, grad: RowGrad) -> RowGrad:
    return RowGrad._wrap(grad.ids, -grad.rows, grad.shape)


@_handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _scaled(func: Any, grad: Any, factor: Any) -> RowGrad:
    if not isinstance(grad, RowGrad) and func is aten.mul.Tensor:
        grad, factor = factor, grad
    _check_scalar(func, factor)
    return RowGrad._wrap(grad.ids, func(grad.rows, factor).to(grad.dtype), grad.shape)


@_handles(aten.mul_.Tensor, aten.mul_.Scalar)
def _mul_(func: Any, grad: Any, factor: Any) -> RowGrad:
    _check_scalar(func, factor)
    return grad._hold(grad.ids, (grad.rows * factor).to(grad.dtype))  # a new tensor: the rows may be those that RowGrad was made of


@_handles(aten.div_.Tensor, aten.div_.Scalar)
def _div_(func: Any, grad: Any, divisor: Any) -> RowGrad:
    _check_scalar(func, divisor)
    return grad._hold(grad.ids, (grad.rows / divisor).to(grad.dtype))


@_handles(
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


@_handles(aten.linalg_vector_norm.default)
def _vector_norm(func: Any, grad: RowGrad, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    if dim is not None or keepdim or order <= 0:
        raise _dense(func, "with dim, keepdim or an order of 0 or below")
    rows = grad.coalesce().rows
    return rows.new_zeros((), dtype=dtype) if rows.numel() == 0 else func(rows, order, dtype=dtype)


@_handles(aten.isnan.default, aten.isinf.default)
def _which(func: Any, grad: RowGrad) -> Tensor:
    """[N, D]: of the rows that are there, all others being zero. What autograd's anomaly mode asks before it reduces the answer."""
    return func(grad.rows)


@_handles(aten._foreach_norm.Scalar)
def _foreach_norm(_func: Any, tensors: list[Tensor], order: float = 2, dtype: Any = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors]


@_handles(aten.clamp_.default, aten.clamp_min_.default, aten.clamp_max_.default)
def _clamp_(func: Any, grad: RowGrad, *bounds: float | None) -> RowGrad:
    limits = torch.zeros(()).clamp_(*bounds) if func is aten.clamp_.default else func(torch.zeros(()), *bounds)
    if limits != 0:
        raise _dense(func, "to a range without 0")
    total = grad.coalesce()  # the bound is on the gradient of a weight, not on one term of it
    func(total.rows, *bounds)
    return grad._hold(total.ids, total.rows.to(grad.dtype))


@_handles(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(func: Any, grad: RowGrad, *bounds: float | None) -> RowGrad:
    in_place = {aten.clamp.default: aten.clamp_, aten.clamp_min.default: aten.clamp_min_, aten.clamp_max.default: aten.clamp_max_}[func]
    return _clamp_(in_place.default, _clone(func, grad), *bounds)


@_handles(aten.allclose.default)
def _allclose(func: Any, grad: Any, other: Any, *args: Any, **kwargs: Any) -> bool:
    """Of the dense gradients."""
    _check_same_table(func, grad, other)
    sums = [grad.coalesce(), other.coalesce()]
    ids = torch.cat([total.ids for total in sums]).unique()
    rows = [total.rows.new_zeros(len(ids), grad.shape[1]) for total in sums]
    for all_rows, total in zip(rows, sums, strict=True):
        all_rows[torch.searchsorted(ids, total.ids)] = total.rows
    return func(*rows, *args, **kwargs)


@_handles(aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar)
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
        raise _dense(func, "with a dense tensor")
    if grad.shape != other.shape:
        msg = f"{func}: both RowGrads must belong to one table, got shapes {tuple(grad.shape)} and {tuple(other.shape)}"
        raise ValueError(msg)


def _check_scalar(func: Any, factor: Any) -> None:
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise _dense(func, "with a factor for each element")
