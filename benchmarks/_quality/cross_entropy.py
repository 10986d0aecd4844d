"""Mean cross entropy in float32 with few passes over the logits: memory traffic is what a step of these small models waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of PyTorch come without it
    triton = None

_BLOCK = 4096  # logits of a row that a program holds at a time

if triton is not None:

    @triton.jit
    def _forward(logits, targets, log_sum, losses, columns: tl.constexpr, block: tl.constexpr):
        """One program a row: the log of the sum of exponentials in one pass, and the loss."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * columns
        top = float("-inf")
        total = 0.0
        for start in range(0, columns, block):
            place = start + tl.arange(0, block)
            x = tl.load(logits + place, mask=place < columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        result = top + tl.log(total)
        tl.store(log_sum + row, result)
        tl.store(losses + row, result - tl.load(logits + tl.load(targets + row)).to(tl.float32))

    @triton.jit
    def _backward(logits, targets, log_sum, upstream, gradient, rows, columns: tl.constexpr, block: tl.constexpr):
        """One program a block of a row: (probability - 1 at the target) * upstream / rows."""
        row = tl.program_id(0).to(tl.int64)
        place = tl.program_id(1) * block + tl.arange(0, block)
        x = tl.load(logits + row * columns + place, mask=place < columns, other=float("-inf")).to(tl.float32)
        probability = tl.exp(x - tl.load(log_sum + row))
        delta = tl.where(place == tl.load(targets + row), probability - 1.0, probability)
        value = delta * (tl.load(upstream) / rows)
        tl.store(gradient + row * columns + place, value.to(gradient.dtype.element_ty), mask=place < columns)


class _Fused(torch.autograd.Function):
    """The gradient is rounded to the dtype of the logits as it is made."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows, columns = logits.shape
        log_sum, losses = torch.empty((2, rows), device=logits.device).unbind()
        _forward[(rows,)](logits, targets, log_sum, losses, columns, block=_BLOCK)
        ctx.save_for_backward(logits, targets, log_sum)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sum = ctx.saved_tensors
        rows, columns = logits.shape
        out = torch.empty_like(logits)
        _backward[(rows, triton.cdiv(columns, _BLOCK))](logits, targets, log_sum, gradient, out, rows, columns, block=_BLOCK)
        return out, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions of logits `[..., V]` and int64 targets `[...]`. On a GPU it can be differentiated once."""
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if triton is not None and logits.is_cuda:
        return _Fused.apply(logits.contiguous(), targets.contiguous())
    return torch.nn.functional.cross_entropy(logits.float(), targets)
