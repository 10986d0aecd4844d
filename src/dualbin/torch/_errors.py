"""Bad ids found on a GPU, where a kernel cannot raise: an error block per device, read on request."""

from __future__ import annotations

import torch

#: device ordinal -> int64 [2]: number of bad ids since the last check, and the first of them
_blocks: dict[int, torch.Tensor] = {}


def error_block(index: int) -> torch.Tensor:
    """The error block of CUDA device `index`, made at its first use."""
    block = _blocks.get(index)
    if block is None:
        block = _blocks[index] = torch.zeros(2, dtype=torch.int64, device=torch.device("cuda", index))
    return block


def check_errors() -> None:
    """Raise if a lookup on a GPU met an id outside `[0, V)` since the last check; the check resets the record.

    Such a lookup returns rows of NaN and changes nothing else. This call waits for the devices that were used. On the CPU there is
    nothing to report: lookups raise at once.

    Raises:
        IndexError: with the device, the number of bad ids and the first of them.
    """
    found = []
    for index, block in _blocks.items():
        count, first = block.tolist()
        if count:
            block.zero_()
            found.append(f"{count} on cuda:{index}, the first is {first}")
    if found:
        msg = "ids outside [0, V) in lookups since the last check: " + "; ".join(found)
        raise IndexError(msg)
