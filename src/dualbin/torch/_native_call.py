"""Calls into `dualbin._native` with the addresses of tensors.

This is the only module of the frontend that knows the native functions. It looks after devices, streams and workspaces; shapes, dtypes and
contiguity are the callers' business. Tensors that a function takes must stay alive until it returns: on a GPU the caching allocator
keeps their memory for the stream of the call.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualbin._backends import load_native
from dualbin._checks import BAG_MODES
from dualbin.rules import Rule

_native: Any
_native, _reason = load_native()
if _native is None:
    _message = f"dualbin.torch needs dualbin._native, which cannot be loaded ({_reason}); build it with 'pip install .'"
    raise ImportError(_message)

FLOAT_TYPES = {torch.float32: _native.F32, torch.float16: _native.F16, torch.bfloat16: _native.BF16}
ID_TYPES = {torch.int32: _native.I32, torch.int64: _native.I64}
HAS_CUDA = bool(_native.build_info()["cuda"])

_ALIGNMENT = 256
_STATE_ARRAYS = ("counter", "ema", "count", "scale_m", "scale_v")
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_error_block = functools.cache(_native.error_block)
_threads: Callable[[], int] = torch.get_num_threads


def _after_fork() -> None:
    """A forked process (a DataLoader worker) has none of its parent's OpenMP threads and would wait for them for ever: use one."""
    global _threads  # noqa: PLW0603
    _threads = _one_thread


def _one_thread() -> int:
    return 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def place(device: torch.device) -> tuple[int, int]:
    """The native library's name of a device, and the lane: threads of the CPU, or the current stream of a GPU."""
    if device.type == "cpu":
        return -1, _threads()
    if device.type != "cuda":
        msg = f"device must be a CPU or a CUDA device, got {device}"
        raise ValueError(msg)
    if not HAS_CUDA:
        msg = f"device must be a CPU: this dualbin was built without CUDA code, got {device}"
        raise ValueError(msg)
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)
    return index, stream


def pack(w: Tensor, bits: Tensor, scale: Tensor | None) -> None:
    """Packed signs, and where `scale` is given the mean magnitudes, of the contiguous rows of w [V, D]."""
    device, lane = place(w.device)
    scale_address = 0 if scale is None else scale.data_ptr()
    _native.pack(device, lane, w.data_ptr(), FLOAT_TYPES[w.dtype], w.shape[0], w.shape[1], bits.data_ptr(), scale_address)


def lookup(bits: Tensor, scale: Tensor, dim: int, ids: Tensor, out: Tensor) -> None:
    """Rows `ids` (contiguous, any shape) of a table into the contiguous `out` [..., dim]."""
    if bits.is_cpu:  # the usual case without `place`, for small lookups
        device, lane, errors = -1, _threads(), 0
    else:
        device, lane = place(bits.device)
        errors = _error_block(device)
    _native.lookup(
        device,
        lane,
        bits.data_ptr(),
        scale.data_ptr(),
        bits.shape[0],
        dim,
        ids.data_ptr(),
        ID_TYPES[ids.dtype],
        ids.numel(),
        out.data_ptr(),
        FLOAT_TYPES[out.dtype],
        errors,
    )


def lookup_bag(bits: Tensor, scale: Tensor, dim: int, ids: Tensor, offsets: Tensor, mode: str, weights: Tensor | None, out: Tensor) -> None:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of a table, combined, into the contiguous `out` [G, dim].

    Args:
        ids: contiguous int32 or int64 [N].
        offsets: contiguous int32 or int64 [G + 1] on the device of `ids`. Only on the CPU bad ids and bad offsets raise.
        mode: "sum", "mean" or "majority".
        weights: None, or with mode "sum" contiguous float32 [N].
    """
    device, lane = place(bits.device)
    errors = 0 if device < 0 else _error_block(device)
    _native.lookup_bag(
        device,
        lane,
        bits.data_ptr(),
        scale.data_ptr(),
        bits.shape[0],
        dim,
        ids.data_ptr(),
        ID_TYPES[ids.dtype],
        ids.numel(),
        offsets.data_ptr(),
        ID_TYPES[offsets.dtype],
        offsets.numel() - 1,
        0 if weights is None else weights.data_ptr(),
        BAG_MODES.index(mode),
        out.data_ptr(),
        FLOAT_TYPES[out.dtype],
        errors,
    )


def reduce_rows(ids: Tensor, rows: Tensor, table_rows: int) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] int64 and the sums [U, D] float32 of their rows; ids outside [0, table_rows) are dropped.

    On a GPU this waits for the number of distinct rows.
    """
    capacity = min(rows.shape[0], table_rows)
    out_ids = torch.empty(capacity, dtype=torch.int64, device=rows.device)
    out_rows = torch.empty(capacity, rows.shape[1], dtype=torch.float32, device=rows.device)
    if capacity == 0:
        return out_ids, out_rows
    distinct = torch.empty(1, dtype=torch.int64, device=rows.device)
    call = _row_call("reduce_rows", ids, rows, table_rows)
    outputs = (array.data_ptr() for array in (out_ids, out_rows, distinct))
    _native.reduce_rows(*call.where, *call.gradient, table_rows, rows.shape[1], capacity, *outputs)
    del call
    used = int(distinct)
    if 2 * used < capacity:  # a view would keep the unused half alive
        return out_ids[:used].clone(), out_rows[:used].clone()
    return out_ids[:used], out_rows[:used]


def xor_rows(bits: Tensor, ids: Tensor, mask: Tensor) -> None:
    """`bits[ids[n]] ^= mask[n]` for distinct contiguous ids."""
    device, lane = place(bits.device)
    _native.xor_rows(
        device, lane, bits.data_ptr(), bits.shape[0], bits.shape[1], ids.data_ptr(), ID_TYPES[ids.dtype], ids.numel(), mask.data_ptr()
    )


def host_clock(device: torch.device, seed: int, step: int, lr: float, scale_lr: float) -> Tensor:
    """The clock of an update, int64 [3] on `device`, from numbers that the host knows."""
    words = torch.frombuffer(bytearray(struct.pack("<QQff", seed, step, lr, scale_lr)), dtype=torch.int64)
    return words.to(device, non_blocking=True)  # 24 bytes are staged at once: neither side waits


def device_clock(seed: int, step: Tensor, lr: Tensor | float, scale_lr: float) -> Tensor:
    """The same from a step, and perhaps an lr, that only the device knows: kernels write it, so a captured graph reads new values."""
    clock = torch.empty(3, dtype=torch.int64, device=step.device)
    clock[0].fill_(seed if seed < 2**63 else seed - 2**64)
    clock[1].copy_(step)
    rates = clock.view(torch.float32)[4:]
    if isinstance(lr, Tensor):
        rates[0].copy_(lr)
    else:
        rates[0].fill_(lr)
    rates[1].fill_(scale_lr)
    return clock


@dataclass(frozen=True)
class Update:
    """One native update with everything it needs allocated, so that running it fails only if the device does."""

    arguments: tuple[object, ...]
    tensors: tuple[Tensor, ...]
    stats: Tensor

    def run(self) -> None:
        _native.update(*self.arguments)


def prepare_update(
    bits: Tensor,
    scale: Tensor,
    dim: int,
    state: Mapping[str, Tensor],
    rule: Rule,
    clock: Tensor,
    ids: Tensor,
    rows: Tensor,
    flips: tuple[Tensor, Tensor] | None = None,
    first_row: int = 0,
) -> Update:
    """An update of a table by the row gradient (ids [N], rows [N, dim]).

    Args:
        state: the arrays of `rules.state_spec` that the rule has.
        clock: as :func:`host_clock` or :func:`device_clock` makes it.
        flips: None to change bits and scale in place; else (mask uint8 [N, B], new scale float32 [N]) that receive the change.
        first_row: of a shard, the row of the whole table where it starts.
    """
    call = _row_call("update", ids, rows, bits.shape[0])
    stats = torch.zeros(4, dtype=torch.int64, device=bits.device)
    arguments = (
        *call.where,
        _native.Table(bits.data_ptr(), scale.data_ptr(), bits.shape[0], dim, first_row),
        _native.State(*(state[name].data_ptr() if name in state else 0 for name in _STATE_ARRAYS)),
        _native.Rule(**rule.native()),
        clock.data_ptr(),
        *call.gradient,
        bits.is_cpu,  # strict: a GPU cannot raise, so there bad ids are padding
        *((0, 0) if flips is None else (flips[0].data_ptr(), flips[1].data_ptr())),
        stats.data_ptr(),
    )
    return Update(arguments, (*call.tensors, clock, bits, scale, *state.values(), *(flips or ())), stats)


class _RowCall(NamedTuple):
    """What the functions that take a row gradient are given first."""

    where: tuple[int, int, int, int]  #: device, lane, workspace and its bytes
    gradient: tuple[int, int, int, int, int]  #: ids and their type, the number of rows, rows and their type
    tensors: tuple[Tensor, ...]  #: what has to stay alive until the function returns


def _row_call(op: str, ids: Tensor, rows: Tensor, table_rows: int) -> _RowCall:
    """Where `op` runs on a row gradient (ids [N], rows [N, D]) of a table of `table_rows` rows, with its workspace allocated."""
    ids, rows = ids.contiguous(), rows.contiguous()
    count, dim = rows.shape
    device, lane = place(rows.device)
    memory, workspace, size = _workspace(op, device, lane, rows.device, count, table_rows, dim)
    gradient = (ids.data_ptr(), ID_TYPES[ids.dtype], count, rows.data_ptr(), FLOAT_TYPES[rows.dtype])
    return _RowCall((device, lane, workspace, size), gradient, (memory, ids, rows))


def _workspace(op: str, device: int, lane: int, where: torch.device, count: int, rows: int, dim: int) -> tuple[Tensor, int, int]:
    """A tensor to keep alive, an aligned address in it, and the bytes from there."""
    size = _native.workspace_bytes(op, device, lane, count, rows, dim)
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=where)
    return memory, -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT, size
