"""Calls of few ids: what they cost the host, what they launch, and a step as a CUDA graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import dualbin.torch as dbt
from _speed.cases import GRAPH, HOST_BOTH, HOST_FORWARD, HOST_UPDATE, Case, Group, on_host
from _speed.timing import Call, Skip, device_events
from _speed.torch_inputs import Inputs, without_gradients
from _speed.torch_peers import Peers
from _speed.workloads import GRADIENTS, ID_SETS, Workload, data_of, small_calls
from dualbin.rules import Counter

_COUNTED = 4  # steps whose launches are counted
_WARM_UP = 3


def groups(device: str, small: bool) -> Iterator[Group]:
    for workload in small_calls(small):
        yield Group(str(workload), "fp32", _cases(_inputs(workload, device)))


def _inputs(workload: Workload, device: str) -> Inputs:
    return Inputs(data_of(workload), torch.float32, device)


def _cases(inputs: Inputs) -> list[Case]:
    peers, (rows, dim), device = Peers(inputs), inputs.shape, inputs.device

    def host(direction: str, name: str, prepare: Any, peer: bool = False) -> Case:
        return Case(direction, name, 0, prepare, peer=peer, time=on_host)

    def sparse() -> Call:
        return _both(inputs, nn.Embedding(rows, dim, sparse=True))

    return [
        host(HOST_UPDATE, "dualbin.torch.XOR.step, Counter(8)", lambda: inputs.step(Counter(8))),
        host(HOST_UPDATE, "sparse gradient, coalesce, SGD step", peers.sparse_sgd, peer=True),
        host(HOST_FORWARD, "dualbin.torch.lookup, no_grad", inputs.lookup),
        host(
            HOST_FORWARD, "dualbin.torch.BinaryEmbedding, no_grad", lambda: _forward(inputs, dbt.BinaryEmbedding(rows, dim, device=device))
        ),
        host(HOST_FORWARD, "F.embedding, no_grad", peers.embedding, peer=True),
        host(HOST_BOTH, "dualbin.torch.BinaryEmbedding", lambda: _both(inputs, dbt.BinaryEmbedding(rows, dim, device=device))),
        host(HOST_BOTH, "nn.Embedding", lambda: _both(inputs, nn.Embedding(rows, dim, device=device)), peer=True),
        *([host(HOST_BOTH, "nn.Embedding(sparse=True)", sparse, peer=True)] if device == "cpu" else []),  # dense zeros take longest there
        Case(GRAPH, "dualbin.torch, Counter(8)", 0, lambda: _graph(inputs)),
    ]


def _forward(inputs: Inputs, module: nn.Module) -> Call:
    ids = inputs.ids
    return without_gradients(lambda index: module(ids[index % ID_SETS]))


def _both(inputs: Inputs, module: Any) -> Call:
    ids, gradients = inputs.ids, inputs.gradients

    def call(index: int) -> None:
        module.weight.grad = None
        module(ids[index % ID_SETS]).backward(gradients[index % GRADIENTS])

    return call


def _graph(inputs: Inputs) -> Call:
    """Replays of a captured training step."""
    if inputs.device != "cuda":
        msg = "only a GPU has graphs"
        raise Skip(msg)
    table, ids, dy = inputs.table(), inputs.ids[0], inputs.gradients[0]
    xor = dbt.XOR([table], rule=Counter(8), capturable=True)

    def step() -> None:
        dbt.lookup(table, ids).backward(dy)
        xor.step()
        xor.zero_grad()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, step)


def _replay(graph: Any, _holds_its_memory: Any, _index: int) -> None:
    graph.replay()


def launches(device: str, small: bool) -> list[dict[str, Any]]:
    """What `XOR.step` launches, for every number of ids: how many kernels, how many copies and fills, and their names in order.

    Raises:
        Skip: the device is not a GPU.
    """
    if device != "cuda":
        msg = "launches are those on a GPU"
        raise Skip(msg)
    found = []
    for workload in small_calls(small):
        call = _inputs(workload, device).step(Counter(8))
        for index in range(_WARM_UP):
            call(index)
        found.append({"workload": str(workload), **summarise([name for name, _ in device_events(call, _COUNTED)], _COUNTED)})
    return found


def summarise(names: list[str], calls: int) -> dict[str, Any]:
    """Kernels and copies a call, and the names of the first call's, from those of all."""
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {
        "kernels": (len(names) - copies) / calls,
        "copies": copies / calls,
        "names": [_short(name) for name in names[: -(-len(names) // calls)]],
    }


def _short(name: str) -> str:
    """Without namespaces, template arguments and operands."""
    if name.startswith(("Memcpy", "Memset")):
        return name
    return re.sub(r"[<(].*", "", name.replace("(anonymous namespace)::", "")).split()[-1].split("::")[-1]
