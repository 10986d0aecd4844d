"""The surface of bitorch-engine, which dualbin succeeds: an autograd function over a bare uint8 weight, and its XOR update.

New code should use BinaryEmbedding and XOR: a packed gradient holds signs only and cannot be accumulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_bool, check_dim
from dualbin._schema import packed_width
from dualbin.rules import Sign
from dualbin.torch import _native_call
from dualbin.torch._ids import check_ids, check_range


class BinaryEmbeddingForward(torch.autograd.Function):
    """Looks rows of a packed uint8 weight up; its backward leaves a packed gradient on the weight. Call :meth:`apply`."""

    @classmethod
    def apply(cls, input: Tensor, qweight: Tensor, embed_scale: Tensor, ori_embedding_dim: int, is_train: bool) -> Tensor:
        """Rows `input` of a packed weight: `embed_scale[id]` times +1 or -1.

        The backward sets, on the tensor object `qweight`:

        - `qweight.grad`, uint8 of qweight's shape: 1 where the weight agrees in sign with its gradient (summed over repeats in the
          order of `docs/design.md`), so that XOR with it is a descent step; 0 elsewhere, in padding bits, and in rows that did not occur,
          that have scale 0, or whose gradient is not finite.
        - `qweight.active_indices`, the tensor `input` itself.

        A packed gradient cannot be added to: every backward call replaces the last one's, and a second lookup of the same weight within
        one backward call raises RuntimeError.

        Args:
            input: int32 or int64 of any shape, usually `(batch, seq)`, in [0, V).
            qweight: uint8 `[V, ceil(ori_embedding_dim/8)]`, contiguous; a Parameter with requires_grad=False will do.
            embed_scale: float32, float16 or bfloat16 `[V, 1]`; gives the output its dtype. Gets a gradient if it requires one; the
                backward runs in any case.
            ori_embedding_dim: D.
            is_train: save what the backward needs. If False the output is not differentiable.

        Returns:
            `input.shape + (D,)`.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
            IndexError: an id is out of range (CPU).
        """
        check_bool("is_train", is_train)
        dim = _check_weight(input, qweight, embed_scale, ori_embedding_dim)
        # torch runs no backward for a function none of whose inputs requires grad, and a uint8 tensor cannot: this one does
        anchor = torch.zeros((), requires_grad=True) if is_train and torch.is_grad_enabled() else None
        return super().apply(anchor, input, qweight, embed_scale, dim, bool(is_train))

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: Tensor | None,
        input: Tensor,
        qweight: Tensor,
        embed_scale: Tensor,
        dim: int,
        is_train: bool,
    ) -> Tensor:
        out = torch.empty((*input.shape, dim), dtype=embed_scale.dtype, device=input.device)
        _native_call.lookup(qweight, _float_scale(embed_scale), dim, input.contiguous(), out)
        if is_train:
            ctx.save_for_backward(input, qweight, embed_scale)
            ctx.qweight, ctx.input, ctx.dim = qweight, input, dim
        else:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, qweight, embed_scale = ctx.saved_tensors
        _refuse_second_lookup(ctx.qweight)
        rows = output_gradient.reshape(-1, ctx.dim)
        ids, sums = _native_call.reduce_rows(input.reshape(-1), rows, qweight.shape[0])
        mask = _agreement(qweight, _float_scale(embed_scale), ctx.dim, ids, sums)
        grad = torch.zeros_like(qweight, requires_grad=False)
        grad[ids] = mask
        ctx.qweight.grad = grad
        ctx.qweight.active_indices = ctx.input
        scale_grad = _scale_gradient(qweight, embed_scale, ctx.dim, ids, sums) if ctx.needs_input_grad[3] else None
        return None, None, None, scale_grad, None, None


@torch.no_grad()
def sparse_update_embedding_qweight(qweight: Tensor, grad_weight: Tensor, active_indices: Tensor | None = None) -> Tensor:
    """`qweight ^= grad_weight`, in place: flips the bits that are set in grad_weight.

    Args:
        qweight: uint8 `[V, B]`, contiguous.
        grad_weight: uint8 of the same shape and device.
        active_indices: int32 or int64 of any shape, the rows to change; repeats change a row once. None: all rows.

    Returns:
        qweight.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.
        IndexError: an index is outside [0, V). Nothing has changed then.
    """
    _check_packed("qweight", qweight)
    _check_packed("grad_weight", grad_weight)
    if grad_weight.shape != qweight.shape or grad_weight.device != qweight.device:
        msg = f"grad_weight must have the shape and device of qweight, {list(qweight.shape)} on {qweight.device}, "
        msg += f"got {list(grad_weight.shape)} on {grad_weight.device}"
        raise ValueError(msg)
    if active_indices is None:
        return qweight.bitwise_xor_(grad_weight)
    check_ids(active_indices, qweight.device, name="active_indices", owner="qweight")
    ids = torch.unique(active_indices)  # sorted; how many there are is read back, so that the first and the last may be, too
    if ids.numel():
        check_range(ids[[0, -1]].cpu(), qweight.shape[0], name="active_indices")
        _native_call.run("xor_rows", qweight, ids, grad_weight[ids].contiguous())
        torch.autograd.graph.increment_version(qweight)
    return qweight


def _agreement(qweight: Tensor, scale: Tensor, dim: int, ids: Tensor, sums: Tensor) -> Tensor:
    """uint8 [U, B]: where the weights of rows `ids` agree in sign with their gradients; this is what the rule Sign flips."""
    mask = torch.empty(ids.shape[0], qweight.shape[1], dtype=torch.uint8, device=qweight.device)
    new_scale = torch.empty(ids.shape[0], dtype=torch.float32, device=qweight.device)
    rule, context = _native_call.native_rule(Sign()), (0, 0, 0, 1.0, 0.0)  # an lr of 1, all else 0
    update = _native_call.prepare_update(qweight, scale, dim, {}, rule, context, ids, sums, (mask, new_scale))
    update.run()
    return mask


def _scale_gradient(qweight: Tensor, embed_scale: Tensor, dim: int, ids: Tensor, sums: Tensor) -> Tensor:
    """[V, 1]: sum over d of w[r, d] * g[r, d], added in float64."""
    signs, ones = torch.empty_like(sums), torch.ones(ids.shape[0], 1, device=ids.device)
    if ids.numel():
        _native_call.lookup(qweight[ids], ones, dim, torch.arange(ids.shape[0], device=ids.device), signs)
    grad = torch.zeros_like(embed_scale, requires_grad=False)
    grad[ids] = (signs * sums).sum(1, keepdim=True, dtype=torch.float64).to(grad.dtype)
    return grad


def _float_scale(embed_scale: Tensor) -> Tensor:
    return embed_scale.detach().float().contiguous()


def _refuse_second_lookup(qweight: Any) -> None:
    task = torch._C._current_graph_task_id()
    if getattr(qweight, "_dualbin_backward", None) == task:
        msg = "qweight was looked up twice in what one backward call differentiates, and packed gradients cannot be added: look all ids up "
        msg += "in one call, or use dualbin.torch.BinaryEmbedding"
        raise RuntimeError(msg)
    qweight._dualbin_backward = task


def _check_weight(ids: Any, qweight: Any, embed_scale: Any, dim: Any) -> int:
    dim = check_dim("ori_embedding_dim", dim)
    _check_packed("qweight", qweight)
    if qweight.shape[1] != packed_width(dim):
        msg = (
            f"qweight must have shape [V, {packed_width(dim)}], one bit a weight, for ori_embedding_dim {dim}, got {list(qweight.shape)}; "
        )
        msg += "tables of several planes are for BinaryEmbedding"
        raise ValueError(msg)
    if not isinstance(embed_scale, Tensor) or embed_scale.dtype not in _native_call.FLOAT_TYPES or embed_scale.layout != torch.strided:
        got = embed_scale.dtype if isinstance(embed_scale, Tensor) else type(embed_scale).__name__
        msg = f"embed_scale must be a tensor of float32, float16 or bfloat16, got {got}"
        raise TypeError(msg)
    if tuple(embed_scale.shape) != (qweight.shape[0], 1) or embed_scale.device != qweight.device:
        msg = f"embed_scale must have shape [{qweight.shape[0]}, 1] on {qweight.device}, "
        msg += f"got {list(embed_scale.shape)} on {embed_scale.device}"
        raise ValueError(msg)
    check_ids(ids, qweight.device, name="input", owner="qweight")
    return dim


def _check_packed(name: str, array: Any) -> None:
    if not isinstance(array, Tensor) or array.dtype != torch.uint8:
        msg = f"{name} must be a tensor of uint8, got {array.dtype if isinstance(array, Tensor) else type(array).__name__}"
        raise TypeError(msg)
    if array.ndim != 2 or array.numel() == 0 or not array.is_contiguous():
        msg = f"{name} must be contiguous with shape [V, B], V and B at least 1, got shape {list(array.shape)}, strides {array.stride()}"
        raise ValueError(msg)
