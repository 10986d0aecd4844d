"""Fixtures of all suites, and what has to be set before the first framework is imported."""

import os
from pathlib import Path

import pytest

# Four JAX devices on the CPU, if the caller has no other number. XLA reads this when JAX makes its first array, whichever test does that.
DEVICES = "--xla_force_host_platform_device_count="
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}4".strip()

# Processes that share a GPU take turns: with this variable each of pytest-xdist's takes one of so many GPUs for itself.
GPUS, WORKER = os.environ.get("DUALBIN_TEST_GPUS"), os.environ.get("PYTEST_XDIST_WORKER")
if GPUS and WORKER:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(WORKER.removeprefix("gw")) % int(GPUS))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `cuda` where dualbin has no GPU to run on."""
    from dualbin import backends

    cuda = backends()["cuda"]
    if cuda["devices"]:
        return
    reason = "no NVIDIA GPU" if cuda["built"] else "dualbin is built without CUDA"
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))
