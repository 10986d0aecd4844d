"""The cost of an eager call, measured by benchmarks/overhead.py."""

import importlib.util

import torch


def test_forward_and_backward_take_at_most_twice_as_long_as_nn_embedding(root):
    spec = importlib.util.spec_from_file_location("overhead", root / "benchmarks" / "overhead.py")
    overhead = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(overhead)
    best = float("inf")
    for _ in range(3):  # what the processor does for others in between warms other caches: the best of three medians
        dense, binary = overhead.measure(torch.device("cpu"), rounds=60, calls=20)["forward + backward"]
        best = min(best, binary / dense)
        if best <= 2:
            return
    assert best <= 2
