"""What the scripts for several processes share: joining the ranks that torchrun has started."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, torch.device]]:
    """This process's rank, and its device: a GPU of its own where there are any, else the CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    yield dist.get_rank(), device
    dist.barrier()
    dist.destroy_process_group()
