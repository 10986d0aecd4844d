"""Training of tables that fit on one GPU at a few bits a weight only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

import torch

import dualbin.torch as dbt
from _speed.cases import FORWARD, STEP, UPDATE, Case, Group
from _speed.timing import Call, Skip
from _speed.torch_inputs import ID_BYTES, TORCH_DTYPES, Inputs, without_gradients
from _speed.workloads import DTYPES, GRADIENTS, ID_SETS, Data, Workload, data_of, huge
from dualbin.rules import Counter

_ROW_BYTES = 4 + 16  # scale and record
_ROW_COPIES = 6  # of the looked-up rows, in float32: the result, gradients, and what the update works with


def groups(device: str, small: bool) -> Iterator[Group]:
    for workload, bits in huge(small):
        for dtype in DTYPES:
            yield Group(str(workload), dtype, _cases(workload, bits, dtype, device), memory=True)


def _cases(workload: Workload, bits: int, dtype: str, device: str) -> list[Case]:
    inputs = _Huge(data_of(workload), TORCH_DTYPES[dtype], device, bits)
    forward = workload.forward_bytes(DTYPES[dtype], ID_BYTES)
    update = workload.update_bytes(DTYPES[dtype], ID_BYTES, bits, inputs.unique)
    return [
        Case(STEP, f"dualbin.torch, Counter({bits})", forward + update, inputs.whole_step),
        Case(STEP, f"dualbin.torch, Counter({bits}), a gradient that the caller holds", forward + update, inputs.whole_step_with_copy),
        Case(UPDATE, f"dualbin.torch.XOR.step, Counter({bits})", update, inputs.update),
        Case(FORWARD, "dualbin.torch.lookup", forward, inputs.lookup_shared),
    ]


class _Huge(Inputs):
    """One table for all cases."""

    def __init__(self, data: Data, dtype: torch.dtype, device: str, bits: int) -> None:
        super().__init__(data, dtype, device)
        self._bits = bits

    @cached_property
    def _trained(self) -> tuple[torch.nn.Parameter, dbt.XOR]:
        size = self.workload
        needed = size.rows * (self._bits * size.width + _ROW_BYTES) + _ROW_COPIES * size.count * size.dim * 4
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > free:
            msg = f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise Skip(msg)
        table = self.table()
        return table, dbt.XOR([table], rule=Counter(self._bits))

    def whole_step(self) -> Call:
        """Forward, backward and update as in a model, whose backward pass gives a gradient that nobody else holds."""
        table, xor = self._trained
        return self.whole_step_of(table, xor)

    def whole_step_with_copy(self) -> Call:
        """The same with a gradient that the caller of `backward` holds, which is copied."""
        (table, xor), ids, gradients = self._trained, self.ids, self.gradients

        def call(index: int) -> None:
            dbt.lookup(table, ids[index % ID_SETS]).backward(gradients[index % GRADIENTS])
            xor.step()
            xor.zero_grad()

        return call

    def update(self) -> Call:
        table, xor = self._trained
        return self.step_of(table, xor)

    def lookup_shared(self) -> Call:
        (table, _), ids = self._trained, self.ids
        return without_gradients(lambda index: dbt.lookup(table, ids[index % ID_SETS]))
