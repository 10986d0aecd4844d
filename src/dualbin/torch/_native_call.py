"""Calls into `dualbin._native` with tensors, which it reads in place and checks: dtypes, shapes, devices, that they are contiguous.

This is the only module of the frontend that knows the native functions. It makes outputs and workspaces, and says how many threads a call
may use on the CPU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualbin._backends import load_native
from dualbin._float32 import nearest_float32
from dualbin.rules import Rule

_native: Any
_native, _reason = load_native()
if _native is None:
    _message = f"dualbin.torch needs dualbin._native, which cannot be loaded ({_reason}); build it with 'pip install .'"
    raise ImportError(_message)

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    _message = f"dualbin.torch needs a torch whose tensors have __dlpack_c_exchange_api__ (2.11 or newer), got torch {torch.__version__}"
    raise ImportError(_message)

FLOAT_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
ID_TYPES = frozenset({torch.int32, torch.int64})
_INT32_MAX = 2**31 - 1
NO_CUDA = (
    "this dualbin was built without CUDA code. Install a wheel whose version does not end in '+cpu', or build from the sources "
    "where nvcc is (CUDACXX=/path/to/nvcc) with -C cmake.define.DUALBIN_CUDA=ON"
)
HAS_CUDA = bool(_native.build_info()["cuda"])

#: bytes of a fresh result or array on the CPU from which on it comes in huge pages
_LEAST_HUGE = 2**22

_threads = torch.get_num_threads
_lookup = _native.lookup


def ordinal(device: torch.device) -> int:
    """The native library's name of a device: -1 for the CPU, or a CUDA ordinal."""
    if device.type == "cpu":
        return -1
    if device.type != "cuda":
        msg = f"device must be a CPU or a CUDA device, got {device}"
        raise ValueError(msg)
    if not HAS_CUDA:
        msg = f"device must be a CPU, got {device}: {NO_CUDA}"
        raise ValueError(msg)
    return torch.cuda.current_device() if device.index is None else device.index


def run(operation: str, *arguments: object) -> None:
    """An operation on contiguous tensors, those that it writes among them, with the arguments that docs/design.md lists for its name."""
    getattr(_native, operation)(*arguments, threads=_threads())


def fresh(shape: Iterable[int], dtype: torch.dtype, device: torch.device | str | int | None) -> Tensor:
    """torch.empty for the arrays of a table and of a state. Large ones on the CPU come in huge pages.

    Rows are met at random, and with small pages every array that a row is in costs a walk through the tables of pages.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if out.device.type == "cpu" and out.nbytes >= _LEAST_HUGE:
        _native.expect_writes(out)
    return out


def lookup_fresh(bits: Tensor, scale: Tensor, dim: int, ids: Tensor, out: Tensor) -> None:
    """The same as :func:`lookup` into an `out` that was just made: a large one on the CPU comes in huge pages."""
    if out.nbytes >= _LEAST_HUGE:
        _native.expect_writes(out)
    _lookup(bits, scale, dim, ids, out, _threads())


def lookup(bits: Tensor, scale: Tensor, dim: int, ids: Tensor, out: Tensor) -> None:
    """Rows `ids` (contiguous, any shape) of a table into the contiguous `out` [..., dim]."""
    _lookup(bits, scale, dim, ids, out, _threads())


def lookup_bag(
    bits: Tensor,
    scale: Tensor,
    dim: int,
    ids: Tensor,
    offsets: Tensor,
    mode: str,
    weights: Tensor | None,
    out: Tensor,
    padding_idx: int = -1,
) -> None:
    """The bags `ids[offsets[g] : offsets[g + 1]]` of a table, combined, into the contiguous `out` [G, dim].

    Args:
        ids: contiguous int32 or int64 [N].
        offsets: contiguous int32 or int64 [G + 1] on the device of `ids`. Only on the CPU bad ids and bad offsets raise.
        mode: "sum", "mean" or "majority".
        weights: None, or with mode "sum" contiguous float32 [N].
        padding_idx: an id that is left out; -1 for none.
    """
    _native.lookup_bag(bits, scale, dim, ids, offsets, weights, mode, out, padding_idx, _threads())


def bag_counts(scale: Tensor, ids: Tensor, offsets: Tensor, padding_idx: int = -1) -> Tensor:
    """int32 [G]: rows of every bag that are in the table and not padding."""
    out = torch.empty(offsets.shape[0] - 1, dtype=torch.int32, device=ids.device)
    _native.bag_counts(scale, ids, offsets, out, padding_idx, _threads())
    return out


def bag_gradient(
    ids: Tensor, offsets: Tensor, dy: Tensor, mode: str, counts: Tensor | None, weights: Tensor | None, padding_idx: int = -1
) -> Tensor:
    """What every row of every bag gets of dy [G, D], contiguous as all arguments: [N, D] of the dtype of dy."""
    out = torch.empty(ids.shape[0], dy.shape[1], dtype=dy.dtype, device=dy.device)
    _native.bag_gradient(ids, offsets, dy, mode, out, counts, weights, padding_idx, _threads())
    return out


def bag_weight_gradient(bits: Tensor, scale: Tensor, ids: Tensor, offsets: Tensor, dy: Tensor, padding_idx: int = -1) -> Tensor:
    """What every weight of every bag gets of dy [G, D], contiguous as all arguments: float32 [N]."""
    out = torch.empty(ids.shape[0], dtype=torch.float32, device=dy.device)
    _native.bag_weight_gradient(bits, scale, ids, offsets, dy, out, padding_idx, _threads())
    return out


def reduce_rows(ids: Tensor, rows: Tensor, table_rows: int, *, wait: bool = True) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] int64 and the sums [U, D] float32 of their rows; ids outside [0, table_rows) are dropped.

    On a GPU this waits for the number of distinct rows. Without `wait`, there are as many slots as there can be distinct rows; those
    that are not used have the id `table_rows` and zeros.
    """
    capacity = min(rows.shape[0], table_rows)
    out_ids = torch.empty(capacity, dtype=torch.int64, device=rows.device)
    out_rows = torch.empty(capacity, rows.shape[1], dtype=torch.float32, device=rows.device)
    if capacity == 0:
        return out_ids, out_rows
    distinct = torch.empty(1, dtype=torch.int64, device=rows.device)
    ids, rows = ids.contiguous(), rows.contiguous()
    workspace = _workspace("reduce_rows", rows, table_rows)
    _native.reduce_rows(ids, rows, table_rows, out_ids, out_rows, distinct, workspace, _threads())
    del workspace
    if not wait:
        return out_ids, out_rows
    used = int(distinct)
    if 2 * used < capacity:  # a view would keep the unused half alive
        return out_ids[:used].clone(), out_rows[:used].clone()
    return out_ids[:used], out_rows[:used]


def local_dtype(share: int) -> torch.dtype:
    """What holds the rows of a rank, of which it has `share` at most, in few bytes."""
    return torch.int32 if share < _INT32_MAX else torch.int64


def route(
    ids: Tensor, table_rows: int, share: int, world: int, capacity: int = 0, spare: int = 0, missed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rank holds which rows of a batch, as :func:`dualbin.reference.route` says; without waiting for a GPU.

    Args:
        ids: contiguous int32 or int64 [N].
        missed: int64 [3 + world], which the call counts in.

    Returns:
        local, int32 where a share's rows fit into it; slots, int32 where the places do; numbers int64 [world + 1].
    """
    count, device = ids.shape[0], ids.device
    places = world * capacity if capacity else min(count, table_rows)
    local = torch.empty(places, dtype=local_dtype(share), device=device)
    slots = torch.empty(count, dtype=torch.int32 if places + spare < _INT32_MAX else torch.int64, device=device)
    numbers = torch.empty(world + 1, dtype=torch.int64, device=device)
    place = -1 if ids.is_cpu else ordinal(device)
    size = _native.workspace_bytes("reduce_rows", place, _threads(), count, table_rows, 1)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    _native.route(ids, table_rows, share, capacity, spare, local, slots, numbers, missed, workspace, _threads())
    return local, slots, numbers


def take_rows(bits: Tensor, scale: Tensor, ids: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows `ids` [N] of a table with the bytes of their scales behind them, uint8 [N, W + 4]; ids outside it get a scale of NaN."""
    if out is None:
        out = torch.empty(ids.shape[0], bits.shape[1] + 4, dtype=torch.uint8, device=bits.device)
    _native.take_rows(bits, scale, ids, out, _threads())
    return out


def put_rows(packed: Tensor, bits: Tensor, scale: Tensor, ids: Tensor | None = None) -> None:
    """The inverse: rows to the places `ids` [N] (default 0, 1, ...) of bits [V, W] and scale float32 [V, 1]; other ids are padding."""
    _native.put_rows(packed, bits, scale, ids, _threads())


def segment_sum(slots: Tensor, rows: Tensor, segments: int) -> Tensor:
    """The sums [segments, D] float32 of the rows [N, D] of each slot, at its own place; slots outside [0, segments) are dropped."""
    slots, rows = slots.contiguous(), rows.contiguous()
    if rows.shape[0] == 0 or segments == 0:
        return torch.zeros(segments, rows.shape[1], dtype=torch.float32, device=rows.device)
    out = torch.empty(segments, rows.shape[1], dtype=torch.float32, device=rows.device)
    _native.segment_sum(slots, rows, out, _workspace("segment_sum", rows, segments), _threads())
    return out


def slot_means(slots: Tensor, rows: Tensor, segments: int, divisor: int, dtype: torch.dtype) -> Tensor:
    """:func:`segment_sum` over a divisor, rounded to `dtype`."""
    out = torch.empty(segments, rows.shape[1], dtype=dtype, device=rows.device)
    if segments:
        slots, rows = slots.contiguous(), rows.contiguous()
        _native.slot_means(slots, rows, divisor, out, _workspace("segment_sum", rows, segments), _threads())
    return out


def host_context(device: torch.device, seed: int, step: int, first_row: int, lr: float, scale_lr: float) -> Tensor:
    """The step context of an update, int64 [4] on `device`, from numbers that the host knows."""
    words = torch.frombuffer(
        bytearray(struct.pack("<QQQff", seed, step, first_row, nearest_float32(lr), nearest_float32(scale_lr))), dtype=torch.int64
    )
    return words.to(device, non_blocking=True)  # 32 bytes are staged at once: neither side waits


def context_template(device: torch.device, seed: int, first_row: int, lr: float, scale_lr: float) -> tuple[Tensor, Tensor]:
    """The context of step 0, int64 [4], and which of its words is the step, bool [4]; kernels write both, so a graph may be captured."""
    words, is_step = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    words[0].fill_(seed if seed < 2**63 else seed - 2**64)
    is_step[1].fill_(True)
    words[2].fill_(first_row)
    rates = words.view(torch.float32)[6:]
    rates[0].fill_(lr if isinstance(lr, Tensor) else nearest_float32(lr))
    rates[1].fill_(nearest_float32(scale_lr))
    return words, is_step


def device_context(template: tuple[Tensor, Tensor], step: Tensor, lr: Tensor | float) -> Tensor:
    """A context from a template and a step, and perhaps an lr, that only the device knows: a captured graph reads new values of these."""
    words, is_step = template
    context = torch.where(is_step, step, words)
    if isinstance(lr, Tensor):
        context.view(torch.float32)[6].copy_(lr)
    return context


class Update(NamedTuple):
    """One native update with everything it needs checked and allocated, so that running it fails only if the device does."""

    native: Any
    stats: Tensor

    def run(self) -> None:
        self.native.run()


def apply_steps(steps: Iterable[tuple[Update | None, list[tuple[dict[str, Any], dict[str, Any]]]]]) -> None:
    """Run updates, each with its commits: dicts that take the contents of others.

    It is one native call, in which no Python code runs, and so no handler of a signal: Ctrl-C finds all of it done, or nothing. If an
    update fails, those before it are whole, and it and those after it have not happened.
    """
    _native.apply_steps([(None if update is None else update.native, commits) for update, commits in steps])


@lru_cache(maxsize=64)  # the same few rules step after step
def native_rule(rule: Rule) -> Any:
    """A rule, with every value resolved for the planes of its table, as the native library has it."""
    return _native.Rule(**rule.native())


def prepare_update(
    bits: Tensor,
    scale: Tensor,
    dim: int,
    state: dict[str, Tensor],
    rule: Any,
    context: Tensor | tuple[int, int, int, float, float],
    ids: Tensor,
    rows: Tensor,
    flips: tuple[Tensor, Tensor] = (None, None),  # type: ignore[assignment]
    step: Tensor | None = None,
    stats: Tensor | None = None,
) -> Update:
    """An update of a table by the row gradient (ids [N], rows [N, dim]).

    Args:
        state: the arrays of `rules.state_layout` that the rule has.
        rule: of :func:`native_rule`.
        context: (seed, step, first row, lr, scale_lr), or on the device as :func:`host_context` or :func:`device_context` makes it.
        flips: none to change bits and scale in place; else (mask uint8 [N, planes * B], new scale float32 [N]) that receive the change.
        step: an int64 tensor without dimensions on the device, which the update advances by 1.
        stats: of an earlier update of the same table, to be written again; None makes one.
    """
    ids, rows = ids.contiguous(), rows.contiguous()
    strict = rows.is_cpu  # a GPU cannot raise, so there bad ids are padding
    workspace = _workspace("update", rows, bits.shape[0])
    if stats is None:
        stats = torch.empty(4, dtype=torch.int64, device=rows.device)
    native = _native.Update(bits, scale, dim, state, rule, context, ids, rows, workspace, strict, *flips, stats, _threads())
    if step is not None:
        native.count_in(step)
    return Update(native, stats)


def _workspace(op: str, rows: Tensor, table_rows: int) -> Tensor:
    """Memory for `op` on the row gradient `rows` [N, D] of a table of `table_rows` rows."""
    place = -1 if rows.is_cpu else ordinal(rows.device)
    size = _native.workspace_bytes(op, place, _threads(), rows.shape[0], table_rows, rows.shape[1])
    return torch.empty(size, dtype=torch.uint8, device=rows.device)
