"""Fixtures of all suites, and what has to be set before the first framework is imported."""

import gc
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

# Four JAX devices on the CPU, if the caller has no other number. XLA reads this when JAX makes its first array, whichever test does that.
DEVICES = "--xla_force_host_platform_device_count="
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}4".strip()

# Processes that share a GPU take turns: with this variable each of pytest-xdist's takes one of so many GPUs for itself.
GPUS, WORKER = os.environ.get("DUALBIN_TEST_GPUS"), os.environ.get("PYTEST_XDIST_WORKER")
if GPUS and WORKER:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(WORKER.removeprefix("gw")) % int(GPUS))

# Tracing makes many objects that live long, and a tenth of the time went to looking for garbage among them.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def speed(root: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the speed benchmark."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import speed
    from _speed import cases, report, timing, workloads

    return SimpleNamespace(main=speed, cases=cases, report=report, timing=timing, workloads=workloads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="I/N: run part I of N only (default: %(default)s)")


def in_shard(item: pytest.Item, shard: str) -> bool:
    """Whether part I of N has this test. Tests that share a process, those of an xdist group, stay together."""
    part, parts = (int(number) for number in shard.split("/"))
    if not 1 <= part <= parts:
        msg = f"--shard must be I/N with 1 <= I <= N, got {shard}"
        raise pytest.UsageError(msg)
    group = item.get_closest_marker("xdist_group")
    return zlib.crc32((group.args[0] if group else item.nodeid).encode()) % parts == part - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this shard, the long ones first, and skip those marked `cuda` where dualbin has no GPU to run on."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # a long one at the end would keep one processor busy
    gc.freeze()  # modules and tests stay
    shard = config.getoption("--shard")
    others = [item for item in items if not in_shard(item, shard)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if in_shard(item, shard)]
    from dualbin import backends

    cuda = backends()["cuda"]
    if cuda["devices"]:
        return
    reason = "no NVIDIA GPU" if cuda["built"] else "dualbin is built without CUDA"
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))
