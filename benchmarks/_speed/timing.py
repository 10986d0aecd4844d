"""Clocks: how long a call takes on a device and on the host, and how fast the device copies.

On a GPU the time of the kernels is wanted, whatever the host needs to launch them: a training step has other work in the queue. So every
sample first fills the queue with copies ("the plug") and launches its calls while these run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

Call = Callable[[int], Any]

#: calls before anything is timed: they compile and fill the allocators
_WARM_UP = 3

#: samples on a GPU, and most calls in each. JAX lets the host run 32 calls ahead of the device: calls and plug have to fit.
_SAMPLES, _CALLS, _MAX_PLUG = 5, 16, 12

#: seconds without work after which a GPU is made to copy for a while before it is measured: its clocks fall while the host prepares
#: a workload, and what came first then had three samples of five that were 15 % longer than the others
_IDLE_SECONDS, _WAKE_SECONDS = 0.3, 0.2

#: seconds that the calls of a sample may take together, if they are slow ones
_SAMPLE_SECONDS = 0.05

#: samples on a CPU, of one call each: all, or as many as begin in so many seconds
_CPU_SAMPLES, _CPU_LEAST, _CPU_SECONDS = 30, 7, 3.0

#: samples of the host's time, and launches in each
_HOST_SAMPLES, _HOST_CALLS = 25, 20


class Skip(Exception):
    """A measurement that cannot be made here, and why."""


class Clock:
    """Measures on one device in one framework.

    Attributes:
        bandwidth: bytes a second of a large copy, read and written bytes both counted.
    """

    bandwidth: float

    def times(self, call: Call) -> list[float]:
        """Samples of the seconds that a call takes on the device."""
        raise NotImplementedError

    def host_times(self, call: Call) -> list[float]:
        """Samples of the seconds after which a call returns, with nothing else in the device's queue at first."""
        raise NotImplementedError

    def kernel_times(self, call: Call, names: Iterable[str]) -> list[float]:  # noqa: ARG002
        """Samples of the seconds that the kernels of a call take whose names contain one of `names`."""
        msg = "only PyTorch's profiler on a GPU tells kernels apart"
        raise Skip(msg)


class CpuClock(Clock):
    """Wall time of single calls.

    Args:
        copy: a large copy.
        copy_bytes: what it reads and writes.
        wait: waits for the result of a call.
    """

    def __init__(self, copy: Call, copy_bytes: int, wait: Callable[[Any], Any]) -> None:
        self._wait = wait
        self.bandwidth = copy_bytes / statistics.median(self.times(copy))

    def times(self, call: Call) -> list[float]:
        for index in range(_WARM_UP):
            self._wait(call(index))
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < _CPU_SAMPLES and (len(samples) < _CPU_LEAST or time.perf_counter() - begin < _CPU_SECONDS):
            start = time.perf_counter()
            self._wait(call(len(samples)))
            samples.append(time.perf_counter() - start)
        return samples

    def host_times(self, call: Call) -> list[float]:
        return _host_times(call, self._wait)


class TorchCudaClock(Clock):
    """CUDA events around the calls, on the current stream."""

    def __init__(self, copy_bytes: int) -> None:
        import torch

        self._torch = torch
        self._source = torch.zeros(copy_bytes // 2, dtype=torch.uint8, device="cuda")
        self._target = torch.empty_like(self._source)
        self._copy_seconds = 0.0
        self._last = -math.inf
        self._copy_seconds = statistics.median(self.times(lambda _: self._copy()))
        self.bandwidth = copy_bytes / self._copy_seconds

    def times(self, call: Call) -> list[float]:
        cuda = self._torch.cuda
        calls, host = _trial(call, lambda _: cuda.synchronize())
        self._wake()
        plug = _plug_length(host, self._copy_seconds)
        events = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(_SAMPLES)]
        for sample, (start, end) in enumerate(events):
            cuda.synchronize()  # else the launches of all samples fill the queue, and the host falls behind
            for _ in range(plug):
                self._copy()
            start.record()
            for index in range(calls):
                call(sample * calls + index)
            end.record()
        cuda.synchronize()
        self._last = time.perf_counter()
        return [start.elapsed_time(end) / 1e3 / calls for start, end in events]

    def host_times(self, call: Call) -> list[float]:
        return _host_times(call, lambda _: self._torch.cuda.synchronize())

    def kernel_times(self, call: Call, names: Iterable[str]) -> list[float]:
        for index in range(_WARM_UP):
            call(index)
        return sums_by_call(device_events(call, _CALLS), tuple(names), _CALLS)

    def _wake(self) -> None:
        begin = time.perf_counter()
        while begin - self._last > _IDLE_SECONDS and time.perf_counter() - begin < _WAKE_SECONDS:
            self._copy()
            self._torch.cuda.synchronize()

    def _copy(self) -> None:
        self._target.copy_(self._source)


class JaxCudaClock(Clock):
    """JAX has no events: a sample is the wall time of plug and calls less that of a plug alone."""

    def __init__(self, copy_bytes: int) -> None:
        import jax
        import jax.numpy as jnp

        self._jax = jax
        self._buffer = jnp.zeros(copy_bytes // 8, jnp.uint32)
        self._invert = jax.jit(jnp.invert, donate_argnums=0)  # XLA would drop a copy; this reads and writes as many bytes
        self._copy(0)
        self._copy_seconds = 0.0
        few, many = (statistics.median(self._wall(self._copy, count) for _ in range(_SAMPLES)) for count in (1, 9))
        self._copy_seconds = (many - few) / 8
        self.bandwidth = copy_bytes / self._copy_seconds

    def times(self, call: Call) -> list[float]:
        calls, host = _trial(call, self._jax.block_until_ready)
        plug = _plug_length(host, self._copy_seconds)
        alone, samples = [], []
        for _ in range(_SAMPLES):
            alone.append(self._wall(call, 0, plug))
            samples.append(self._wall(call, calls, plug))
        times = [(sample - statistics.median(alone)) / calls for sample in samples]
        if statistics.median(times) > 0:
            return times
        # Too fast to be told from the plug: the time with the launches, which is more, and what a user waits for.
        return [self._wall(call, calls) / calls for _ in range(_SAMPLES)]

    def host_times(self, call: Call) -> list[float]:
        return _host_times(call, self._jax.block_until_ready)

    def _wall(self, call: Call, calls: int, plug: int = 0) -> float:
        self._jax.block_until_ready(self._buffer)
        start = time.perf_counter()
        result = self._buffer
        for _ in range(plug):
            result = self._copy(0)
        for index in range(calls):
            result = call(index)
        self._jax.block_until_ready(result)
        return time.perf_counter() - start

    def _copy(self, _index: int) -> Any:
        self._buffer = self._invert(self._buffer)
        return self._buffer


def device_events(call: Call, calls: int) -> list[tuple[str, float]]:
    """Names and seconds of what the calls launch on the GPU with PyTorch, in its order: kernels, copies and fills."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for index in range(calls):
            call(index)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA and not is_annotation(event)]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def is_annotation(event: Any) -> bool:
    """Whether it is a range that code has named, as optimizers do with their steps, and no work of the device."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer.")


def sums_by_call(events: list[tuple[str, float]], names: tuple[str, ...], calls: int) -> list[float]:
    """The seconds of the kernels with such names, added up for each of the calls, which all launched the same."""
    taken = [seconds for name, seconds in events if any(part in name for part in names)]
    each, rest = divmod(len(taken), calls)
    if not each or rest:
        others = ", ".join(sorted({name for name, _ in events}))
        msg = f"{len(taken)} kernels named {', '.join(names)} in {calls} calls, which launched: {others}"
        raise RuntimeError(msg)
    return [sum(taken[index * each : (index + 1) * each]) for index in range(calls)]


def _trial(call: Call, wait: Callable[[Any], Any]) -> tuple[int, float]:
    """How many calls a sample has, and the seconds that the host needs to launch them, after a warm-up."""
    result = None
    for index in range(_WARM_UP):
        start = time.perf_counter()
        result = call(index)
        wait(result)
    calls = min(max(int(_SAMPLE_SECONDS / (time.perf_counter() - start)), 1), _CALLS)
    start = time.perf_counter()
    for index in range(calls):
        result = call(index)
    taken = time.perf_counter() - start
    wait(result)
    return calls, taken


def _host_times(call: Call, wait: Callable[[Any], Any]) -> list[float]:
    for index in range(_WARM_UP):
        wait(call(index))
    samples = []
    for sample in range(_HOST_SAMPLES):
        start = time.perf_counter()
        for index in range(_HOST_CALLS):
            result = call(sample * _HOST_CALLS + index)
        samples.append((time.perf_counter() - start) / _HOST_CALLS)
        wait(result)
    return samples


def _plug_length(host: float, copy: float) -> int:
    """Copies that keep the device busy while the host launches, with a margin; none to measure the copies themselves."""
    return min(math.ceil(1.5 * host / copy) + 1, _MAX_PLUG) if copy else 0
