"""What the checks share: this rank's device, comparisons over the ranks, and what memory a rank has used."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def device() -> torch.device:
    """This rank's device: RANKS_DEVICE names the kind, and every rank has a GPU of its own."""
    kind = os.environ["RANKS_DEVICE"]
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)


def assert_replicated(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        everyone = [torch.empty_like(tensor, device=device()) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, tensor.detach().to(device()).contiguous())
        assert all(torch.equal(everyone[0], other) for other in everyone)


def assert_close_rows(got: Any, want: Any, relative: float = 1e-6) -> None:
    """Two row gradients have the same rows, each to within `relative` of its own size."""
    got, want = got.coalesce(), want.coalesce()
    assert torch.equal(got.ids, want.ids)
    error, size = (got.rows - want.rows).norm(dim=1), want.rows.norm(dim=1)
    assert (error <= relative * size).all(), (error / size).max()


def gathered(array: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The shards of the ranks of a group as one array, on this rank's device."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, array.detach().cpu(), group=group)
    return torch.cat(parts).to(device())


def used_memory() -> int:
    """Bytes that this rank uses now."""
    return torch.cuda.memory_allocated() if device().type == "cuda" else _of_this_process("VmRSS")


def peak_memory() -> int:
    """Bytes that this rank has used at most."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else _of_this_process("VmHWM")


def _of_this_process(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
