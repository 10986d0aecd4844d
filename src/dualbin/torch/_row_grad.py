"""The gradient of a table: the rows that were looked up, never V x D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from dualbin._checks import check_int
from dualbin.torch import _native_call
from dualbin.torch._dispatch import PackedTensor, hide_from_dynamo
from dualbin.torch._ids import check_ids
from dualbin.torch._refusals import gradient_refusal
from dualbin.torch._row_sum import RowSum, reduce_rows

_TENSOR_DATA: Any = torch.Tensor.data  # the descriptor
_DETACH = torch.ops.aten.detach.default


class RowGrad(PackedTensor):
    """The gradient of a :class:`BinaryTable`: `sum over n with ids[n] == r of rows[n]` for every row r, zero elsewhere.

    It has the table's shape (V, D) and stands in `table.grad`, but holds only what was looked up. Norms, clipping, `GradScaler` and
    arithmetic that keeps zeros zero work on it; with `create_graph=True` they and `rows` are part of the graph. What would need the dense
    `[V, D]` gradient raises NotImplementedError.

    The sum of two, which is what a second backward pass makes, has float32 rows with distinct ids: each is summed by rows, then these sums
    are added (`docs/design.md`). On a GPU, which would have to be waited for, it may have unused slots with the id V and zeros.

    Args:
        ids: int32 or int64 `[N]`, rows of the table; they may repeat.
        rows: float32, float16 or bfloat16 `[N, D]`, on the same device. Kept, not copied.
        shape: (V, D), the shape of the table.

    Attributes:
        ids, rows: as above; other tensors of the same shapes and dtypes can be put there.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """

    _handlers: ClassVar[dict[Any, Any]] = {}
    _functions: ClassVar[dict[Any, Any]] = {}
    #: [ids, rows], or [RowSum] from which they are made when somebody asks; one list for a gradient and its `detach()` and `.data`, so that
    #: in-place operations on either are seen by both
    _held: list[Any]
    #: False in an alias without its place in the graph
    _in_graph = True

    @staticmethod
    def __new__(cls, ids: Tensor, rows: Tensor, shape: Sequence[int]) -> RowGrad:
        _check(ids, rows, shape)
        return cls._wrap(ids, rows, shape)

    @classmethod
    def _wrap(cls, ids: Tensor, rows: Tensor, shape: Sequence[int]) -> RowGrad:
        return cls._holding([ids, rows], shape)

    @classmethod
    def _holding(cls, held: list[Any], shape: Sequence[int]) -> RowGrad:
        rows = held[1]
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device)
        self._held = held
        return self

    @property
    def ids(self) -> Tensor:
        if len(self._held) == 1:
            self._held[:] = self._held[0].result()
        return self._held[0]

    @ids.setter
    def ids(self, new: Tensor) -> None:
        self._replace(new, self.rows)

    @property
    def rows(self) -> Tensor:
        if len(self._held) == 1:
            self._held[:] = self._held[0].result()
        rows = self._held[1]
        return rows.detach() if rows.requires_grad and not self._in_graph else rows

    @rows.setter
    def rows(self, new: Tensor) -> None:
        self._replace(self.ids, new)

    @property
    def data(self) -> RowGrad:
        """The gradient without its place in the graph, in the same memory; another RowGrad can be put there, of any shape and dtype."""
        return _TENSOR_DATA.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, RowGrad):
            msg = f"data must be a RowGrad, got a {type(new).__name__}: RowGrad(ids, rows, shape) holds the rows that are not zero"
            raise TypeError(msg)
        _TENSOR_DATA.__set__(self, new)
        self._held, self._in_graph = new._held, False

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the rows are part of a graph, after `create_graph=True`."""
        return len(self._held) == 2 and self.rows.requires_grad  # a sum that nobody has asked for yet is in none

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """That of the rows."""
        return self.rows.grad_fn if len(self._held) == 2 else None

    def _hold(self, ids: Tensor, rows: Tensor) -> RowGrad:
        """Become another sum of rows."""
        if rows.dtype != self.dtype:
            _TENSOR_DATA.__set__(self, RowGrad._wrap(ids, rows, self.shape))
        self._held[:] = ids, rows
        return self

    def _replace(self, ids: Tensor, rows: Tensor) -> None:
        _check(ids, rows, self.shape)
        if rows.dtype != self.dtype or rows.device != self.device:
            msg = f"rows must be {self.dtype} on {self.device}, got {rows.dtype} on {rows.device}: give the table another gradient with "
            msg += "table.grad = RowGrad(ids, rows, shape)"
            raise TypeError(msg)
        self._hold(ids, rows)

    def _accumulate(self, ids: Tensor, rows: Tensor) -> RowGrad:
        """Become the sum of this gradient and that of (ids, rows), neither of which is kept or changed."""
        if rows.shape[0] == 0:
            return self
        if len(self._held) == 2:
            if self.rows.shape[0] == 0:  # as zero_grad(set_to_none=False) leaves it
                return self._hold(ids.clone(), rows.clone(memory_format=torch.contiguous_format))
            total = RowSum(*self.shape)
            total.add(*self._held)
            if self.dtype != torch.float32:
                _TENSOR_DATA.__set__(self, RowGrad._wrap(ids, rows.new_empty(0, dtype=torch.float32), self.shape))
            self._held[:] = [total]
        self._held[0].add(ids, rows)
        return self

    def _sums(self) -> tuple[Tensor, Tensor]:
        """As :meth:`coalesce`, but nothing waits: on a GPU there may be unused slots, with the id V and zeros."""
        return reduce_rows(self.ids, self.rows, self.shape[0], wait=self.rows.is_cpu)

    def coalesce(self) -> RowGrad:
        """The same gradient with ascending distinct int64 ids and float32 rows, summed in the order that `docs/design.md` fixes.

        Occurrences of a row are summed in blocks of 64, then the blocks. On a GPU this waits for the device.
        """
        return RowGrad._wrap(*reduce_rows(self.ids, self.rows, self.shape[0]), self.shape)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _ = self.ids  # a sum is saved as what it is
        return super().__reduce_ex__(protocol)

    def share_memory_(self) -> RowGrad:
        """Move ids and rows to shared memory, as a module's `share_memory()` does with all gradients."""
        self.ids.share_memory_()
        self.rows.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether ids and rows are in shared memory."""
        return self.ids.is_shared() and self.rows.is_shared()

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
            return args[0]._alias(in_graph=False)
        if torch.is_grad_enabled() and any(map(_is_in_graph, args)):
            with enable_reentrant_dispatch():  # what the handlers do with the rows is recorded
                return super().__torch_dispatch__(func, _types, args, kwargs)
        return super().__torch_dispatch__(func, _types, args, kwargs)

    def _alias(self, *, in_graph: bool) -> RowGrad:
        rows = self.rows
        alias = RowGrad._holding(self._held, self.shape)
        if rows.requires_grad and not in_graph:
            alias._in_graph = False
        return alias

    @staticmethod
    def _dense(func: object, case: str = "") -> NotImplementedError:
        return gradient_refusal(func, case)


def _is_in_graph(value: Any) -> bool:
    if isinstance(value, RowGrad):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(map(_is_in_graph, value))


def row_gradient(ids: Tensor, dy: Tensor, shape: Sequence[int], padding_idx: int, *, own: bool = False) -> RowGrad:
    """The gradient that a lookup of `ids` gives a table, from the gradient `dy` of its output.

    Occurrences of `padding_idx` (none if it is -1) get zero rows, so that norms do not see them.
    The ids are copied: a buffer of ids that is filled again before the step must not change the gradient. So is `dy` unless it is the
    caller's `own`: the engine may make the same memory the gradient of another parameter, which clipping or the next backward pass changes
    (see `_ownership`).
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


for _function in (RowGrad._holding, RowGrad._wrap, RowGrad.__tensor_unflatten__, RowGrad.__torch_dispatch__, RowGrad.coalesce):
    hide_from_dynamo(_function)


def _check(ids: Any, rows: Any, shape: Any) -> None:
    if not isinstance(rows, Tensor) or rows.dtype not in _native_call.FLOAT_TYPES:
        got = f"a tensor of {rows.dtype}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        msg = f"rows must be a tensor of float32, float16 or bfloat16, got {got}"
        raise TypeError(msg)
    if rows.layout != torch.strided:
        msg = f"rows must be a dense tensor, got one of layout {rows.layout}; call .to_dense()"
        raise ValueError(msg)
    check_ids(ids, rows.device, owner="rows")
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        msg = f"shape must be (V, D), got {shape!r}"
        raise TypeError(msg)
    if len(shape) != 2:
        msg = f"shape must be (V, D), got {tuple(shape)}"
        raise ValueError(msg)
    for name, size in zip("VD", shape, strict=True):
        if not isinstance(size, torch.SymInt):
            check_int(f"{name} of shape", size, low=1)
    if ids.ndim != 1:
        msg = f"ids must have shape [N], got {list(ids.shape)}"
        raise ValueError(msg)
    if tuple(rows.shape) != (ids.shape[0], shape[1]):
        msg = f"rows must have shape [{ids.shape[0]}, {shape[1]}] for these ids and shape {tuple(shape)}, got {list(rows.shape)}"
        raise ValueError(msg)
