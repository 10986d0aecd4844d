"""Looking rows up: the operators that the compiler sees, and a shorter way in eager mode.

`dualbin::lookup` takes the table and carries the gradient formula; underneath it becomes `dualbin::lookup_packed`, which takes plain
tensors only. Compiled artefacts are cached by operator name: when a formula changes, the operator must change its name.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualbin._checks import check_padding_idx
from dualbin.torch import _native_call
from dualbin.torch._dispatch import describes, hide_from_dynamo
from dualbin.torch._ids import check_ids
from dualbin.torch._ownership import ownership
from dualbin.torch._refusals import check_not_transformed
from dualbin.torch._row_grad import RowGrad, row_gradient
from dualbin.torch._table import BinaryTable, accept_any_grad_dtype
from dualbin.torch._table_checks import check_dtype, check_operator_arrays

_library = torch.library.Library("dualbin", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("lookup(Tensor table, Tensor ids, ScalarType? dtype=None, int padding_idx=-1) -> Tensor", tags=_TAGS)
_library.define("lookup_packed(Tensor bits, Tensor scale, Tensor ids, SymInt dim, ScalarType dtype) -> Tensor", tags=_TAGS)


def lookup(table: BinaryTable, ids: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Rows of a table.

    Args:
        table: the table, V rows of D weights.
        ids: int32 or int64 of any shape, in [0, V), on the table's device; may be empty. Nested ids (jagged) give nested rows.
        dtype: float32, float16 or bfloat16; None takes the table's dtype, under autocast too (as nn.Embedding does).
        out: a contiguous tensor of shape `ids.shape + (D,)` that receives the result, of dtype `dtype` if that is given;
            not differentiable, so the table must not require a gradient there (or use torch.no_grad()).

    Returns:
        `ids.shape + (D,)`, `scale[id]` times +1 or -1; `out` if it is given. Its backward leaves a :class:`RowGrad` in `table.grad`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        IndexError: an id is out of range (CPU). On a GPU such rows are NaN, and :func:`check_errors` raises later.
    """
    if out is not None:
        return _lookup_into(table, ids, dtype, out)
    return lookup_rows(table, ids, dtype, -1)


def lookup_rows(table: BinaryTable, ids: Tensor, dtype: torch.dtype | None, padding_idx: int) -> Tensor:
    """As :func:`lookup`; occurrences of `padding_idx` (-1: none) give the table no gradient."""
    if torch.compiler.is_compiling():
        _check_operands(table, ids, dtype)
        if ids.is_nested:
            return _lookup_nested(table, ids, dtype, padding_idx)
        return torch.ops.dualbin.lookup(table, ids, dtype, padding_idx)
    with _plain_attributes():
        if not (_is_plain(table, ids) and ids.dtype in _native_call.ID_TYPES):  # bool ids are a mask, and rows for all memory to take
            _check_operands(table, ids, dtype)
            if ids.is_nested:
                return _lookup_nested(table, ids, dtype, padding_idx)
            return torch.ops.dualbin.lookup(table, ids, dtype, padding_idx)
        try:
            if not (_is_grad_enabled() and table.requires_grad):
                return _lookup_plain(table, ids, dtype)
            if table.is_leaf and table.grad_dtype is not None:  # asked here, too: the call takes as long as a part of a small lookup
                accept_any_grad_dtype(table)
            if ownership.due:
                ownership.learn(_example)
            return _apply(table, ids, dtype, padding_idx)
        except (TypeError, ValueError, RuntimeError):
            _check_operands(table, ids, dtype)  # the native call has seen it; this says it in the words of this frontend
            raise


@BinaryTable.handles(F.embedding)
def _functional_embedding(
    _func: Any,
    input: Tensor,
    weight: BinaryTable,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` with a BinaryTable as weight. Gradients are rows, `sparse` or not."""
    del norm_type, sparse
    if max_norm is not None or scale_grad_by_freq:
        name = "max_norm" if max_norm is not None else "scale_grad_by_freq"
        msg = f"{name} cannot be used with a BinaryTable, leave it out: rows of a packed table have no norm to change or count to divide by"
        raise ValueError(msg)
    padding_idx = check_padding_idx(padding_idx, weight.shape[0])
    return lookup_rows(weight, input, None, -1 if padding_idx is None else padding_idx)


def _lookup_nested(table: BinaryTable, ids: Any, dtype: torch.dtype | None, padding_idx: int) -> Tensor:
    if ids.layout != torch.jagged:
        msg = (
            f"nested ids must have layout torch.jagged, got {ids.layout}: torch.nested.as_nested_tensor(ids.unbind(), layout=torch.jagged)"
        )
        raise ValueError(msg)
    if ids.size(0) + 1 != ids.offsets().shape[0] or ids.lengths() is not None:
        msg = "nested ids must be ragged in dimension 1 and without holes, got a transposed or narrowed tensor: look ids.values() up"
        raise ValueError(msg)
    return torch.nested.nested_tensor_from_jagged(lookup_rows(table, ids.values(), dtype, padding_idx), ids.offsets())


# ---- eager mode --------------------------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, table: BinaryTable, ids: Tensor, padding_idx: int) -> None:
    """What the backward pass needs of a lookup."""
    ctx.save_for_backward(ids)
    ctx.shape, ctx.padding_idx = table.shape, padding_idx


def _backward(ctx: Any, dy: Tensor) -> tuple[RowGrad, None, None, None]:
    (ids,) = ctx.saved_tensors
    return row_gradient(ids, dy, ctx.shape, ctx.padding_idx), None, None, None


class _Lookup(torch.autograd.Function):
    """The operator `dualbin::lookup` without the way through the dispatcher."""

    @staticmethod
    def forward(ctx: Any, table: BinaryTable, ids: Tensor, dtype: torch.dtype | None, padding_idx: int) -> Tensor:
        _keep(ctx, table, ids, padding_idx)
        return _lookup_plain(table, ids, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[RowGrad, None, None, None]:
        own = ownership.has(dy, sys.getrefcount(dy))  # counted here: another call would be another reference
        (ids,) = ctx.saved_tensors
        return row_gradient(ids, dy, ctx.shape, ctx.padding_idx, own=own), None, None, None


#: Function.apply without its part for function transforms, which are not active where `_is_plain` holds: it costs as much as a small lookup
_apply = super(torch.autograd.Function, _Lookup).apply


def _example() -> Tensor:
    """A lookup whose gradient tells how many references one has that nobody else holds."""
    bits, scale = torch.zeros(1, 1, dtype=torch.uint8, device="cpu"), torch.ones(1, 1, device="cpu")
    table = BinaryTable(bits, scale, 8).requires_grad_()
    return _apply(table, torch.zeros(1, dtype=torch.int64, device="cpu"), None, -1)


def _lookup_plain(table: BinaryTable, ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    dim, scale = table.shape[1], table.scale
    shape, dtype = (*ids.shape, dim), dtype or table.dtype
    out = scale.new_empty(shape) if dtype is torch.float32 else scale.new_empty(shape, dtype=dtype)  # a small lookup notices the argument
    _native_call.lookup_fresh(table.bits, scale, dim, ids.contiguous(), out)
    return out


def _lookup_into(table: BinaryTable, ids: Tensor, dtype: torch.dtype | None, out: Tensor) -> Tensor:
    _check_operands(table, ids, dtype)
    if not isinstance(out, Tensor) or out.dtype not in _native_call.FLOAT_TYPES:
        msg = f"out must be a tensor of float32, float16 or bfloat16, got {out.dtype if isinstance(out, Tensor) else type(out).__name__}"
        raise TypeError(msg)
    if dtype is not None and out.dtype != dtype:
        msg = f"out must have dtype {dtype}, as asked for, got {out.dtype}"
        raise TypeError(msg)
    shape = (*ids.shape, table.shape[1])
    if tuple(out.shape) != shape or not out.is_contiguous() or out.device != ids.device:
        msg = f"out must be a contiguous tensor of shape {list(shape)} on {ids.device}, got shape {list(out.shape)}, "
        msg += f"strides {out.stride()}, on {out.device}"
        raise ValueError(msg)
    if torch.is_grad_enabled() and (table.requires_grad or out.requires_grad):
        msg = "out cannot be used where a gradient is required: call lookup without out, or under torch.no_grad()"
        raise ValueError(msg)
    if torch.compiler.is_compiling() or not _is_plain(table, ids):
        return out.copy_(torch.ops.dualbin.lookup(table, ids, out.dtype))
    _native_call.lookup(table.bits, table.scale, shape[-1], ids.contiguous(), out)
    torch.autograd.graph.increment_version(out)
    return out


# bound once: a small lookup notices every attribute that it has to find
_plain_attributes = torch._C.DisableTorchFunctionSubclass  # reading those of a subclass is slow otherwise
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_transform = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing


def _is_plain(table: BinaryTable, ids: Tensor) -> bool:
    """Whether the operands are what they look like and nothing but autograd watches: no tracing, no fake or meta tensors, no transform."""
    return (
        type(table) is BinaryTable
        and type(table.bits) is Tensor
        and type(ids) is Tensor
        and not ids.is_meta
        and not ids.is_nested
        and _dispatch_modes() == 0
        and not _is_tracing()
        and _function_transform() is None
    )


def _check_operands(table: Any, ids: Any, dtype: torch.dtype | None) -> None:
    if not isinstance(table, BinaryTable):
        check_not_transformed(table)
        kind = type(table)
        name, hint = kind.__name__, ""
        if name == BinaryTable.__name__:
            name, hint = f"{kind.__module__}.{name}", ": dualbin.torch.from_jax makes one of it"
        elif isinstance(getattr(table, "weight", None), BinaryTable):
            hint = ": give its weight, or call it"
        elif isinstance(table, Tensor):
            hint = ": BinaryTable.from_float packs floats"
        msg = f"table must be a dualbin.torch.BinaryTable, got a {name}{hint}"
        raise TypeError(msg)
    check_ids(ids, table.device)
    if dtype is not None:
        check_dtype("dtype", dtype)


# ---- operators ---------------------------------------------------------------------------------------------------------------------------


@BinaryTable.handles(torch.ops.dualbin.lookup.default)
def _lookup_of_table(_func: Any, table: BinaryTable, ids: Tensor, dtype: torch.dtype | None = None, _padding_idx: int = -1) -> Tensor:
    return torch.ops.dualbin.lookup_packed(table.bits, table.scale, ids, table.shape[1], dtype or table.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  (the signature that torch calls)
    table, ids, _, padding_idx = inputs
    _keep(ctx, table, ids, padding_idx)


hide_from_dynamo(_backward)
torch.library.register_autograd("dualbin::lookup", _backward, setup_context=_setup_context, lib=_library)


@torch.library.register_vmap("dualbin::lookup", lib=_library)
def _vmap(
    _info: Any, in_dims: tuple[Any, ...], table: BinaryTable, ids: Tensor, dtype: torch.dtype | None = None, padding_idx: int = -1
) -> tuple[Tensor, int]:
    if in_dims[0] is not None:
        msg = "vmap over tables is not supported: pass the table with in_dims None and map over ids"
        raise NotImplementedError(msg)
    return torch.ops.dualbin.lookup(table, ids.movedim(in_dims[1], 0), dtype, padding_idx), 0


def _lookup_packed(bits: Tensor, scale: Tensor, ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    check_operator_arrays(bits, scale, dim)
    out = torch.empty((*ids.shape, dim), dtype=dtype, device=ids.device)
    _native_call.lookup_fresh(bits, scale, dim, ids.contiguous(), out)
    return out


for _device in ("CPU", "CUDA"):
    _library.impl("lookup_packed", _lookup_packed, _device)


@describes("dualbin::lookup_packed", _library)
def _lookup_packed_fake(bits: Tensor, _scale: Tensor, ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return bits.new_empty((*ids.shape, dim), dtype=dtype)
