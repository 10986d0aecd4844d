"""Every operator that the library registers with torch, with every operand wrong in every way: refused, or a result that is right.

`make sanitize` runs it under AddressSanitizer, which sees reads and writes beyond the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import dualbin.torch as dbt

V, D, N, G = 4, 11, 5, 3
B = (D + 7) // 8
FLOATS, IDS = {torch.float32, torch.float16, torch.bfloat16}, {torch.int32, torch.int64}
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, *IDS, *FLOATS, torch.float64, torch.complex64]

#: a good value for every operand by name
GOOD: dict[str, Callable[[], Any]] = {
    "table": lambda: dbt.BinaryTable.from_float(torch.ones(V, D)),
    "bits": lambda: torch.full((V, B), 7, dtype=torch.uint8),
    "scale": lambda: torch.ones(V, 1),
    "ids": lambda: torch.tensor([0, 3, 3, 1, 2]),
    "offsets": lambda: torch.tensor([0, 2, 2, N]),
    "weights": lambda: torch.ones(N),
    "dy": lambda: torch.ones(G, D),
    "counts": lambda: torch.ones(G, dtype=torch.int32),
    "dim": lambda: D,
    "mode": lambda: "sum",
    "dtype": lambda: torch.float32,
    "padding_idx": lambda: -1,
}
ALLOWED = {"ids": IDS, "offsets": IDS, "dy": FLOATS}
SCALARS = {"dim": (0, -1, D + 8, 1 << 28, (1 << 28) + 1, 1 << 40), "mode": ("median", ""), "dtype": (torch.int32, torch.float64)}
#: of another size these mean another call, not a wrong one
FREE = {
    "lookup": {"ids"},
    "lookup_packed": {"ids"},
    "bag_counts": {"ids", "offsets"},
    "bag_counts_packed": {"scale", "ids", "offsets"},
    "bag_gradient": {"ids"},
    "bag_weight_gradient": {"ids"},
    "bag_weight_gradient_packed": {"ids"},
}


def operators() -> dict[str, list[str]]:
    """Names of the operands by name of the operator."""
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("dualbin::")]
    return {schema.name.split("::")[1]: [argument.name for argument in schema.arguments] for schema in schemas}


OPERATORS = operators()


def call(name: str, operands: dict[str, Any]) -> Any:
    return getattr(torch.ops.dualbin, name)(*operands.values())


def good(name: str) -> dict[str, Any]:
    operands = {operand: GOOD[operand]() for operand in OPERATORS[name]}
    return operands | {"mode": "mean", "weights": None} if "counts" in operands else operands


def wrong(name: str, operand: str) -> Iterator[tuple[str, Any]]:
    """(what is wrong, the operand), all of which have to be refused."""
    value = good(name)[operand]
    if operand == "table":  # a tensor that is none
        yield "a dense tensor", torch.ones(V, D)
        return
    if not isinstance(value, torch.Tensor):
        yield from ((repr(scalar), scalar) for scalar in SCALARS.get(operand, ()))
        return
    yield "a list", value.tolist() if value.ndim == 2 else [value.tolist()]
    for dtype in DTYPES:
        if dtype not in ALLOWED.get(operand, {value.dtype}):
            yield str(dtype), value.to(dtype)
    yield "sparse", value.to_sparse()
    yield "a table", dbt.BinaryTable.from_float(torch.ones(V, D))
    if operand in FREE.get(name, ()):
        return
    for axis in range(value.ndim):
        if operand == "dy" and axis == 1 and "gradient" in name:  # nothing else fixes the columns (beyond bytes)
            continue
        yield f"axis {axis} longer", torch.cat([value, value.narrow(axis, 0, 1)], axis)
        yield f"axis {axis} shorter", value.narrow(axis, 0, value.shape[axis] - 1).contiguous()
        yield f"axis {axis} empty", value.narrow(axis, 0, 0).contiguous()
    yield "one dimension more", value.unsqueeze(0).expand(2, *value.shape).contiguous()


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_operands_are_refused(name: str) -> None:
    call(name, good(name))
    for operand in OPERATORS[name]:
        for what, value in wrong(name, operand):
            try:
                result = call(name, good(name) | {operand: value})
            except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError):
                continue
            pytest.fail(f"{name}: {operand} accepted as {what}: {result.shape}")


@pytest.mark.parametrize("name", [name for name in OPERATORS if "dim" in OPERATORS[name]])
@pytest.mark.parametrize("dim", [D + 8, 1 << 40, 1 << 62])
def test_a_wrong_dim_is_told_before_memory_is_taken(name: str, dim: int) -> None:
    shape = rf"bits must have shape \[V, {(dim + 7) // 8}\] with V >= 1 for dim {dim}, got \[{V}, {B}\]"
    with pytest.raises(ValueError, match=shape if dim <= 2**28 else f"dim must be at most {2**28}, got {dim}"):
        call(name, good(name) | {"dim": dim})


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_operands_give_the_same_or_are_refused(name: str) -> None:
    want = call(name, good(name))
    for operand, value in good(name).items():
        if not isinstance(value, torch.Tensor) or operand == "table":
            continue
        strided = torch.stack([value, torch.zeros_like(value)], -1)[..., 0]
        assert not strided.is_contiguous()
        try:
            got = call(name, good(name) | {operand: strided})
        except ValueError as error:
            assert str(error).startswith(f"{operand} must be contiguous")  # noqa: PT017
            continue
        assert torch.equal(got, want), operand


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_operands_read_nothing(name: str) -> None:
    for operand, value in good(name).items():
        if not isinstance(value, torch.Tensor):
            continue
        try:
            result = call(name, good(name) | {operand: value.to("meta")})
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            continue
        assert result.is_meta, operand
