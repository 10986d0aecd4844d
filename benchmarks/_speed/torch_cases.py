"""The PyTorch side: dualbin.torch and what else there is in PyTorch, for every topic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import dualbin.torch as dbt
from _speed import cpu_peers, torch_calls, torch_huge, torch_steps
from _speed.cases import BAG, BAGS, CALLS, FORWARD, FORWARD_OUT, GROUP, GROUPING, HUGE, LOOKUPS, STEPS, UPDATE, UPDATES, Case, Group
from _speed.timing import Call, Clock, CpuClock, TorchCudaClock
from _speed.torch_inputs import ID_BYTES, TORCH_DTYPES, Inputs, without_gradients
from _speed.torch_peers import HAS_FBGEMM, Peers
from _speed.workloads import DTYPES, ID_SETS, Bags, Workload, bags, data_of, groupings, workloads
from dualbin.rules import Bop, Counter, Rule

#: what is updated: the rule's name, its planes, the rule, and its bits a weight, those of a float32 moving average among them
RULES: list[tuple[str, int, Rule, int]] = [
    ("Counter(8)", 1, Counter(8), 8),
    ("Counter(1)", 1, Counter(1), 1),
    ("Counter(8)", 4, Counter(8), 8),
    ('Counter(8, norm="rms")', 1, Counter(8, norm="rms"), 8),
    ("Counter(4)", 4, Counter(4), 4),
    ("Bop()", 1, Bop(), 33),
]
#: on a CPU, where each takes seconds: what planes cost, in place of what other rules do
_CPU_RULES: list[tuple[str, int, Rule, int]] = [*RULES[:2], *(("Counter(8)", planes, Counter(8), 8) for planes in (2, 4, 8))]

#: weights of a table from which on SparseAdam, with three tables of float32 more, is left out on a CPU
_MOST_ADAM = 2**27

#: the kernels that group ids
_GROUP_KERNELS = ("group_ids_kernel", "write_keys", "DeviceRadixSort", "DeviceSelect", "finish_groups", "DeviceCompact")


def start(device: str) -> str:
    """Check the device and return its name ("" for a CPU)."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        msg = "PyTorch finds no GPU"
        raise RuntimeError(msg)
    return torch.cuda.get_device_name()


def clock(device: str, copy_bytes: int) -> Clock:
    if device == "cuda":
        return TorchCudaClock(copy_bytes)
    source = torch.zeros(copy_bytes // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return CpuClock(lambda _: target.copy_(source), copy_bytes, lambda _: None)


def release() -> None:
    """Give memory that nothing uses back to the device, for the next group or the other framework."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Bytes that were allocated at most since `release()`, if the device is a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


launches = torch_calls.launches


def groups(topic: str, device: str, small: bool) -> Iterator[Group]:
    """The cases of a topic, workload by workload."""
    if topic in (LOOKUPS, UPDATES):
        cases = _lookups if topic == LOOKUPS else _updates
        for workload in workloads(device, small):
            for dtype in DTYPES:
                yield Group(str(workload), dtype, cases(_inputs(workload, dtype, device), dtype, device == "cuda" or small))
    elif topic == BAGS:
        for size in bags(device, small):
            for dtype in DTYPES:
                yield Group(str(size), dtype, _bags(size, dtype, device))
    elif topic == GROUPING:
        for workload in groupings(small):
            yield Group(str(workload), "fp32", _grouping(_inputs(workload, "fp32", device)))
    elif topic == STEPS:
        yield from torch_steps.groups(device, small)
    elif topic == CALLS:
        yield from torch_calls.groups(device, small)
    elif topic == HUGE:
        yield from torch_huge.groups(device, small)


def _inputs(workload: Workload, dtype: str, device: str) -> Inputs:
    return Inputs(data_of(workload), TORCH_DTYPES[dtype], device)


def _grouping(inputs: Inputs) -> list[Case]:
    def kernels(clock: Clock, call: Call) -> list[float]:
        return clock.kernel_times(call, _GROUP_KERNELS)

    return [Case(GROUP, "grouping of XOR.step, its kernels alone", 0, lambda: inputs.step(Counter(8)), time=kernels)]


def _lookups(inputs: Inputs, dtype: str, full: bool) -> list[Case]:
    peers, size = Peers(inputs), inputs.workload

    def case(planes: int) -> Case:
        name = "dualbin.torch.lookup" + (f", {planes} planes" if planes > 1 else "")
        return Case(FORWARD, name, size.forward_bytes(DTYPES[dtype], ID_BYTES, planes), lambda: inputs.lookup(planes))

    one = size.forward_bytes(DTYPES[dtype], ID_BYTES)
    return [
        *(case(planes) for planes in (1, 2, 4, 8)),
        Case(FORWARD, "F.embedding", one, peers.embedding, peer=True),
        Case(FORWARD, "packed gather + unpack, torch.compile", one, peers.compiled, peer=True),
        *([Case(FORWARD, "FBGEMM's TBE", one, peers.fbgemm_lookup, peer=True)] if HAS_FBGEMM and full else []),
        Case(FORWARD_OUT, "dualbin.torch.lookup(out=)", one, inputs.lookup_into),
        Case(FORWARD_OUT, "torch.index_select(out=)", one, peers.index_select, peer=True),
    ]


def _updates(inputs: Inputs, dtype: str, full: bool) -> list[Case]:
    peers, size, unique = Peers(inputs), inputs.workload, inputs.unique

    def case(name: str, planes: int, rule: Rule, bits: int) -> Case:
        full_name = f"dualbin.torch.XOR.step, {name}" + (f", {planes} planes" if planes > 1 else "")
        return Case(UPDATE, full_name, size.update_bytes(DTYPES[dtype], ID_BYTES, bits, unique), lambda: inputs.step(rule, planes))

    one = size.update_bytes(DTYPES[dtype], ID_BYTES, 1, unique)
    adam = ("sparse gradient, SparseAdam", peers.sparse_adam)
    others = [
        adam,
        ("sparse gradient, coalesce, row-wise Adagrad", peers.row_wise_adagrad),
        *([("FBGEMM's TBE, row-wise Adagrad", peers.fbgemm_backward)] if HAS_FBGEMM else []),
    ]
    few = [adam] if size.rows * size.dim <= _MOST_ADAM else []
    return [
        *(case(*row) for row in (RULES if full else _CPU_RULES)),
        Case(UPDATE, "embedding_dense_backward (no update)", one, peers.dense_backward, peer=True),
        Case(UPDATE, "sparse gradient, coalesce, SGD step", one, peers.sparse_sgd, peer=True),
        *(Case(UPDATE, name, one, prepare, peer=True) for name, prepare in (others if full else few)),
    ]


def _bags(size: Bags, dtype: str, device: str) -> list[Case]:
    all_ids = [torch.from_numpy(ids).to(device) for ids in size.draw()]
    bounds = torch.arange(0, size.count * size.size + 1, size.size, device=device)
    kind = TORCH_DTYPES[dtype]

    def ours(planes: int) -> Call:
        bag = dbt.BinaryEmbeddingBag(size.rows, size.dim, "sum", include_last_offset=True, device=device, dtype=kind, planes=planes)
        return without_gradients(lambda index: bag(all_ids[index % ID_SETS], bounds))

    def peer() -> Call:
        dense = torch.randn(size.rows, size.dim, device=device, dtype=kind)
        return without_gradients(
            lambda index: F.embedding_bag(all_ids[index % ID_SETS], dense, bounds, mode="sum", include_last_offset=True)
        )

    def low_bits(bits: int) -> Call:
        return cpu_peers.quantized_bag(bits, (size.rows, size.dim), all_ids, bounds)

    def fbgemm(bits: int) -> Call:
        return cpu_peers.fbgemm_bag(bits, (size.rows, size.dim), all_ids, bounds)

    low = cpu_peers.LOW_BITS if device == "cpu" and dtype == "fp32" else ()  # these have float32 results alone
    return [
        Case(BAG, "dualbin.torch.BinaryEmbeddingBag", size.bytes(DTYPES[dtype]), lambda: ours(1)),
        Case(BAG, "dualbin.torch.BinaryEmbeddingBag, 2 planes", size.bytes(DTYPES[dtype], 2), lambda: ours(2)),
        Case(BAG, "F.embedding_bag", size.bytes(DTYPES[dtype]), peer, peer=True),
        *(Case(BAG, f"quantized embedding_bag, {bits} bits", size.bytes(4), partial(low_bits, bits), peer=True) for bits in low),
        *(Case(BAG, f"FBGEMM's TBE, int{bits}", size.bytes(4), partial(fbgemm, bits), peer=True) for bits in low if HAS_FBGEMM),
    ]
