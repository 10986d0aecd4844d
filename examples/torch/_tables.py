"""What a table takes, and what becomes of one of floats when it is rounded after training."""

from typing import Any

import torch
from torch import Tensor


def state_bytes(optimizer: torch.optim.Optimizer, parameter: Any) -> int:
    """Of everything that an optimizer keeps for a table but its number of steps."""
    return sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim() > 0)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Rows as integers of so many bits, times a step, plus an offset; both are float16, one of each for a row, that spans its values."""
    levels = 2**bits - 1
    low, high = weight.aminmax(dim=1, keepdim=True)
    low = low.half().float()
    step = ((high - low) / levels).half().float().clamp_min(1e-8)
    return low + step * ((weight - low) / step).round().clamp(0, levels)


def rounded_bytes(weight: Tensor, bits: int) -> int:
    """What those integers, steps and offsets take."""
    rows, width = weight.shape
    return rows * (-(-width * bits // 8) + 4)


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad with one sum a row, of the mean squares of its gradients, as recommenders take it. For sparse gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for table in group["params"]:
                gradient = table.grad.coalesce()
                ids, rows = gradient.indices()[0], gradient.values()
                state = self.state[table]
                if not state:
                    state["sum"] = torch.zeros(len(table), device=table.device)
                state["sum"].index_add_(0, ids, rows.square().mean(1))
                table.index_add_(0, ids, rows / (state["sum"][ids].sqrt().unsqueeze(1) + 1e-10), alpha=-group["lr"])
