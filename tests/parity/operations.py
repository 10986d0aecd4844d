"""Lookups, bags, their gradients and the average of tables: cases, and one adapter for each back end."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from dualbin import reference
from dualbin._schema import packed_width
from parity.cases import DIMS, GRAD_DTYPES, IDS_DTYPES, SEED, covering_tuples, hash_text
from parity.levels import at_levels

OPERATIONS = (
    "lookup",
    "bag-sum",
    "bag-mean",
    "bag-majority",
    "bag-weighted",
    "counts",
    "rows-sum",
    "rows-mean",
    "rows-majority",
    "rows-weighted",
    "weights",
    "average",
    "pack",
    "unpack",
    "fewer",
    "fewer-rescaled",
)
PLANES = ("1", "2", "3", "4", "5", "6", "7", "8")
PATTERNS = ("none", "one", "repeated", "padding", "hot")
AXES: tuple[tuple[str, ...], ...] = (OPERATIONS, IDS_DTYPES, GRAD_DTYPES, tuple(map(str, DIMS)), PATTERNS, PLANES)
ROWS, PADDING_ROW, PADDING_IDX = 11, 1, 3
STEP, FIRST_ROW, WEIGHT = (5 << 32) + 7, (1 << 32) - 4, 0.3


@dataclass(frozen=True)
class Case:
    operation: str
    ids_dtype: str
    dtype: str
    dim: int
    pattern: str
    planes: int = 1

    def __str__(self) -> str:
        return f"{self.operation}-{self.ids_dtype}-{self.dtype}-D{self.dim}-{self.pattern}-planes{self.planes}"

    @property
    def fewer(self) -> int:
        """Planes that are kept of them."""
        return 1 + self.planes // 2


#: the axes of what any number of planes has, and of majority, which is defined for one
_OF_ONE = tuple(name for name in OPERATIONS if name.endswith("majority"))
_PRODUCTS = ((tuple(name for name in OPERATIONS if name not in _OF_ONE), *AXES[1:]), (_OF_ONE, *AXES[1:-1], PLANES[:1]))


def full() -> list[Case]:
    return [_case(values) for axes in _PRODUCTS for values in itertools.product(*axes)]


@functools.cache
def covering() -> tuple[Case, ...]:
    chosen: list[tuple[str, ...]] = []
    for axes in _PRODUCTS:
        chosen += covering_tuples(axes, chosen)
    return tuple(_case(values) for values in chosen)


def _case(values: tuple[str, ...]) -> Case:
    operation, ids_dtype, dtype, dim, pattern, planes = values
    return Case(operation, ids_dtype, dtype, int(dim), pattern, int(planes))


@dataclass(frozen=True)
class Problem:
    """What an operation is called with. Bags cover all ids, as both frontends have it."""

    case: Case
    mode: str
    bits: Any
    scale: Any
    bits_b: Any
    scale_b: Any
    ids: Any
    offsets: Any
    weights: Any  #: None unless the bags are weighted
    dy: Any
    counts: Any  #: None unless the mode is "mean"
    padding_idx: int

    @property
    def dtype(self) -> Any:
        return self.dy.dtype


def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng(abs(hash_text(str(case))))
    tables = [rng.normal(size=(ROWS, case.dim)).astype(np.float32) for _ in range(2)]
    scale, scale_b = (reference.row_scale(w, case.planes) for w in tables)
    scale[PADDING_ROW] = 0.0
    scale[2] *= -1.0  # allowed in files made elsewhere
    scale_b[4] = 0.0
    ids, sizes = {
        "none": lambda: (np.zeros(0), [0, 0]),
        "one": lambda: (rng.integers(0, ROWS, 1), [1]),
        "repeated": lambda: (rng.integers(0, 5, 23), [0, 9, 3, 11, 0]),
        "padding": lambda: (rng.choice([PADDING_ROW, PADDING_IDX, 5], 17, p=[0.5, 0.3, 0.2]), [4, 1, 1, 11]),
        "hot": lambda: (np.where(rng.random(300) < 0.9, 4, rng.integers(0, ROWS, 300)), [2, 65, 64, 0, 168, 1]),
    }[case.pattern]()
    ids, offsets = (x.astype(case.ids_dtype) for x in (ids, np.concatenate([[0], np.cumsum(sizes)])))
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.dtype(case.dtype)
    dy = rng.standard_normal((len(sizes), case.dim), np.float32).astype(dtype)
    if case.pattern == "repeated" and case.operation != "pack":
        dy[1, 0] = -np.array(np.nan, dtype)  # a NaN with a sign
    if case.operation == "pack":
        dy[0, 0] = -0.0  # packs to 1
    padding_idx = PADDING_IDX if case.pattern in {"padding", "repeated"} else -1
    kind = case.operation.partition("-")[2]
    mode = kind if kind in {"mean", "majority"} else "sum"
    weights = rng.normal(size=len(ids)).astype(np.float32) if kind == "weighted" or case.operation == "weights" else None
    counts = reference.bag_counts(scale, ids, offsets, padding_idx) if mode == "mean" else None
    bits, bits_b = (reference.pack(w, case.planes) for w in tables)
    return Problem(case, mode, bits, scale, bits_b, scale_b, ids, offsets, weights, dy, counts, padding_idx)


Results = list[Any]  # arrays


def run_reference(p: Problem) -> Results:  # noqa: PLR0911  (a line for each operation)
    dim, planes, kind = p.case.dim, p.case.planes, p.case.operation.partition("-")[0]
    if kind == "lookup":
        return [reference.lookup(p.bits, p.scale, p.ids, dim, p.dtype, planes)]
    if kind == "bag":
        return [reference.lookup_bag(p.bits, p.scale, p.ids, p.offsets, dim, p.mode, p.weights, p.dtype, p.padding_idx, planes)]
    if kind == "counts":
        return [reference.bag_counts(p.scale, p.ids, p.offsets, p.padding_idx)]
    if kind == "rows":
        return [reference.bag_gradient(p.ids, p.offsets, p.dy, p.mode, p.counts, p.weights, p.padding_idx)]
    if kind == "weights":
        return [reference.bag_weight_gradient(p.bits, p.scale, p.ids, p.offsets, p.dy, dim, p.padding_idx, planes)]
    if kind == "pack":  # of the gradient: floats in the type of the case
        return [reference.pack(p.dy, planes), reference.row_scale(p.dy, planes)]
    if kind == "unpack":
        return [reference.unpack(p.bits, dim, planes)]
    if kind == "fewer":
        kept, scale = reference.with_planes(p.bits, p.scale, dim, planes, p.case.fewer, rescale=p.case.operation == "fewer-rescaled")
        return [kept, scale]
    average = reference.average(p.bits, p.scale, p.bits_b, p.scale_b, WEIGHT, dim, planes, seed=SEED, step=STEP, first_row=FIRST_ROW)
    return list(average)


def step_context() -> Any:
    """uint32 [8]: the step context of an average."""
    words = [word >> shift & 0xFFFFFFFF for word in (SEED, STEP, FIRST_ROW) for shift in (0, 32)]
    return np.concatenate([np.array(words, np.uint32), np.array([WEIGHT, 0], np.float32).view(np.uint32)])


class Native:
    """The native functions on NumPy memory."""

    def put(self, array: Any) -> Any:
        return np.array(array)

    def get(self, memory: Any) -> Any:
        return memory

    def run(self, p: Problem) -> Results:
        from dualbin import _native

        dim, kind = p.case.dim, p.case.operation.partition("-")[0]
        bits, scale, ids, offsets, dy = (self.put(x) for x in (p.bits, p.scale, p.ids, p.offsets, p.dy))
        weights, counts = (None if x is None else self.put(x) for x in (p.weights, p.counts))
        n, bags = len(p.ids), len(p.offsets) - 1
        padding = {"padding_idx": p.padding_idx}
        if kind == "lookup":
            out = [self.empty((n, dim), p.dtype)]
            _native.lookup(bits, scale, dim, ids, *out)
        elif kind == "bag":
            out = [self.empty((bags, dim), p.dtype)]
            _native.lookup_bag(bits, scale, dim, ids, offsets, weights, p.mode, *out, **padding)
        elif kind == "counts":
            out = [self.empty((bags,), np.int32)]
            _native.bag_counts(scale, ids, offsets, *out, **padding)
        elif kind == "rows":
            out = [self.empty((n, dim), p.dtype)]
            _native.bag_gradient(ids, offsets, dy, p.mode, *out, counts=counts, weights=weights, **padding)
        elif kind == "weights":
            out = [self.empty((n,), np.float32)]
            _native.bag_weight_gradient(bits, scale, ids, offsets, dy, *out, **padding)
        elif kind == "pack":
            out = [self.empty((len(p.dy), p.case.planes * packed_width(dim)), np.uint8), self.empty((len(p.dy), 1), np.float32)]
            _native.pack(dy, *out)
        elif kind == "unpack":
            out = [self.empty((ROWS, dim), np.int8 if p.case.planes == 1 else np.int16)]
            _native.unpack(bits, dim, *out)
        elif kind == "fewer":
            out = [self.empty((ROWS, p.case.fewer * packed_width(dim)), np.uint8), self.put(p.scale)]
            rescaled = out[1:] if p.case.operation == "fewer-rescaled" else []
            _native.fewer_planes(bits, scale, dim, out[0], *rescaled)
        else:
            out = [self.empty(p.bits.shape, np.uint8), self.empty(p.scale.shape, np.float32)]
            others = (self.put(p.bits_b), self.put(p.scale_b))
            _native.average(bits, scale, *others, dim, self.put(step_context()), *out)
        return [self.get(x) for x in out]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory that holds something else."""
        return self.put(np.full(shape, 7, dtype))


class NativeCuda(Native):
    """The same functions on device memory, which torch provides."""

    def put(self, array: Any) -> Any:
        return to_torch(array, "cuda")

    def get(self, memory: Any) -> Any:
        return to_numpy(memory)


def to_torch(array: Any, device: str) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    if array.dtype == np.uint32:
        array = array.view(np.int32)
    return torch.from_numpy(array.copy()).to(device)


def to_numpy(tensor: Any) -> Any:
    import torch

    tensor = tensor.detach().cpu()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def run_torch(p: Problem, device: str = "cpu") -> Results:  # noqa: PLR0911
    """The operators of dualbin.torch, and what a backward pass leaves in the gradient of a table and of the weights."""
    import torch

    import dualbin.torch as dbt
    from dualbin.torch import _native_call

    kind = p.case.operation.partition("-")[0]
    bits, scale, ids, offsets, dy = (to_torch(x, device) for x in (p.bits, p.scale, p.ids, p.offsets, p.dy))
    if kind == "average":
        out = bits, scale
        other = to_torch(p.bits_b, device), to_torch(p.scale_b, device)
        _native_call.run("average", *out, *other, p.case.dim, to_torch(step_context(), device), *out)
        return [to_numpy(x) for x in out]
    table = torch.nn.Parameter(dbt.BinaryTable(bits, scale, p.case.dim, dtype=dy.dtype, planes=p.case.planes))
    weights = None if p.weights is None else to_torch(p.weights, device).requires_grad_()
    if kind == "lookup":
        return [to_numpy(dbt.lookup(table, ids))]
    if kind == "fewer":
        kept = table.with_planes(p.case.fewer, rescale=p.case.operation == "fewer-rescaled")
        assert kept.planes == p.case.fewer
        return [to_numpy(kept.bits), to_numpy(kept.scale)]
    if kind == "counts":
        return [to_numpy(torch.ops.dualbin.bag_counts(table, ids, offsets, p.padding_idx))]
    bags = torch.ops.dualbin.lookup_bag(table, ids, offsets, weights, p.mode, p.padding_idx)
    if kind == "bag":
        return [to_numpy(bags)]
    bags.backward(dy)
    if kind == "weights":
        return [to_numpy(weights.grad)]
    assert np.array_equal(to_numpy(table.grad.ids), p.ids)
    return [to_numpy(table.grad.rows)]


def _jax_operation(p: Problem) -> tuple[Any, list[Any]]:
    """The operation of dualbin.jax and its operands."""
    from dualbin.jax._ops.average import Average
    from dualbin.jax._ops.bag import LookupBag
    from dualbin.jax._ops.bag_gradient import BagCounts, BagGradient, BagWeightGradient
    from dualbin.jax._ops.lookup import Lookup

    dim, kind, weights = p.case.dim, p.case.operation.partition("-")[0], [x for x in (p.weights,) if x is not None]
    if kind == "lookup":
        return Lookup(dim, p.dtype), [p.bits, p.scale, p.ids]
    if kind == "bag":
        return LookupBag(dim, p.mode, p.dtype, padding_idx=p.padding_idx), [p.bits, p.scale, p.ids, p.offsets, *weights]
    if kind == "counts":
        return BagCounts(p.padding_idx), [p.scale, p.ids, p.offsets]
    if kind == "rows":
        more = [p.counts] if p.mode == "mean" else weights
        return BagGradient(p.mode, p.padding_idx), [p.ids, p.offsets, p.dy, *more]
    if kind == "weights":
        return BagWeightGradient(p.padding_idx), [p.bits, p.scale, p.ids, p.offsets, p.dy]
    return Average(dim), [p.bits, p.scale, p.bits_b, p.scale_b, step_context()]


def run_jax(p: Problem, platform: str = "cpu", *, pure: bool = False) -> Results:
    """The operations of dualbin.jax under jit, native or in jax.numpy."""
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(p.case.ids_dtype == "int64"), jax.default_device(jax.devices(platform)[0]):
        if p.case.operation.startswith("fewer"):
            return _jax_fewer(p)
        operation, operands = _jax_operation(p)
        results = jax.jit(operation.fallback if pure else operation)(*map(jnp.asarray, operands))
        return [np.asarray(x) for x in results]


def _jax_fewer(p: Problem) -> Results:
    import jax
    import jax.numpy as jnp

    import dualbin.jax as dbj

    table = dbj.BinaryTable(bits=jnp.asarray(p.bits), scale=jnp.asarray(p.scale), dim=p.case.dim, planes=p.case.planes)
    kept = jax.jit(lambda table: table.with_planes(p.case.fewer, rescale=p.case.operation == "fewer-rescaled"))(table)
    assert kept.planes == p.case.fewer
    return [np.asarray(kept.bits), np.asarray(kept.scale)]


#: operations whose jax.numpy form adds no floats in an order of XLA's choice, and is not their only form in JAX
PURE = frozenset(OPERATIONS) - {"bag-sum", "bag-mean", "bag-weighted", "fewer", "fewer-rescaled"}

BACKENDS: dict[str, Callable[[Problem], Results]] = {
    "native": lambda problem: Native().run(problem),
    **at_levels(lambda problem: Native().run(problem)),
    "torch": run_torch,
    "jax": run_jax,
    "pure": lambda problem: run_jax(problem, pure=True),
    "native-cuda": lambda problem: NativeCuda().run(problem),
    "torch-cuda": lambda problem: run_torch(problem, "cuda"),
    "jax-cuda": lambda problem: run_jax(problem, "cuda"),
}


def without_subnormals(results: Results) -> Results:
    """The results with zeros for subnormal float16."""
    least = np.finfo(np.float16).tiny
    return [np.where(abs(x) < least, np.copysign(np.float16(0), x), x) if x.dtype == np.float16 else x for x in results]


def assert_same(got: Results, want: Results) -> None:
    """Equality of bits, of dtype and of shape."""
    assert [(x.dtype, x.shape) for x in got] == [(x.dtype, x.shape) for x in want]
    for a, b in zip(got, want, strict=True):
        different = int((a.reshape(-1).view(np.uint8) != b.reshape(-1).view(np.uint8)).sum()) if b.size else 0
        assert different == 0, f"{different} of {b.nbytes} bytes differ"
