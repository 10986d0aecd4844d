"""One adapter for each way to run an update. Each trains a problem and returns bits, scale and the neutral optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dualbin import reference, rules
from dualbin._record import join_record, read_numpy_as, split_record, stack_numpy
from parity.cases import SEED, STEPS, Problem
from parity.levels import at_levels

Result = dict[str, Any]  # "bits", "scale", then the state by name
STATE_INTS = ("step", "pending_steps")


def run_reference(problem: Problem) -> Result:
    case = problem.case
    bits, scale = problem.bits.copy(), problem.scale.copy()
    state = reference.init_state(problem.rule, len(bits), case.dim, planes=case.planes, scale_lr=case.scale_lr)
    options = {"rule": problem.rule, "dim": case.dim, "planes": case.planes, "scale_lr": case.scale_lr, "seed": SEED}
    for step in range(STEPS):
        ids, dy = problem.batches[step % len(problem.batches)]
        reference.update(bits, scale, state, ids, dy, lr=case.lr(step), **options)
    return {"bits": bits, "scale": scale, **state}


class Native:
    """The native functions on NumPy arrays; with `every` it keeps the window itself, as a frontend does."""

    device = -1

    def __init__(self, problem: Problem, threads: int = 2, first_row: int = 0) -> None:
        self.problem, self.case, self.threads = problem, problem.case, threads
        self.rows, self.dim, self.first_row = len(problem.bits), problem.case.dim, first_row
        self.batches: dict[int, tuple[Any, Any]] = {}
        self.contexts: Any = None

    def memory(self, array: Any) -> Any:
        """A copy of `array` where the back end can reach it."""
        return np.array(array, order="C", copy=True)

    def to_host(self, memory: Any) -> Any:
        return memory

    def zeros(self, count: int, dtype: Any) -> Any:
        return np.zeros(count, dtype)

    def run(self) -> Result:
        state = reference.init_state(self.problem.rule, self.rows, self.dim, planes=self.case.planes, scale_lr=self.case.scale_lr)
        outside = {name: array for name, array in state.items() if isinstance(array, np.ndarray) and not name.startswith("pending")}
        inside = join_record(outside, read_numpy_as, stack_numpy) if "scale_m" in outside else outside
        self.arrays = {name: self.memory(array) for name, array in inside.items()}
        self.bits, self.scale = self.memory(self.problem.bits), self.memory(self.problem.scale)
        self.state = state
        for step in range(STEPS):
            self.step(*self.problem.batches[step % len(self.problem.batches)], self.case.lr(step))
        arrays = {name: self.to_host(memory) for name, memory in self.arrays.items()}
        held = {"bits": self.to_host(self.bits), "scale": self.to_host(self.scale)}
        return {**state, **held, **split_record(arrays, read_numpy_as)}

    def step(self, ids: Any, dy: Any, lr: float) -> None:
        if len(ids) == 0:
            return
        if self.problem.rule.every > 1:
            window = self.window(*self.reduce(ids, dy))
            if window is None:
                return
            ids, dy = window
        self.update(ids, dy, lr, self.state["step"])
        self.state["step"] += 1

    def window(self, ids: Any, rows: Any) -> tuple[Any, Any] | None:
        state = self.state
        merged = self.reduce(np.concatenate([state["pending_ids"], ids]), np.concatenate([state["pending_rows"], rows]))
        full = state["pending_steps"] + 1 == self.problem.rule.every
        state["pending_steps"] = 0 if full else state["pending_steps"] + 1
        state["pending_ids"], state["pending_rows"] = (merged[0][:0], merged[1][:0]) if full else merged
        return merged if full else None

    def workspace(self, op: str, count: int) -> Any:
        from dualbin import _native

        return self.zeros(_native.workspace_bytes(op, self.device, self.threads, count, self.rows, self.dim), np.uint8)

    def reduce(self, ids: Any, dy: Any) -> tuple[Any, Any]:
        from dualbin import _native

        n = len(ids)
        out = [self.memory(a) for a in (np.full(n, -7), np.full((n, self.dim), np.nan, np.float32), np.zeros(1, np.int64))]
        gradient = self.memory(ids), self.memory(dy)
        _native.reduce_rows(*gradient, self.rows, *out, self.workspace("reduce_rows", n), self.threads)
        out_ids, out_rows, count = map(self.to_host, out)
        return out_ids[: count[0]], out_rows[: count[0]]

    def context(self, lr: float, step: int) -> Any:
        words = np.array([SEED, step, self.first_row], np.int64).view(np.int32)
        return np.concatenate([words, np.array([lr, self.case.scale_lr], np.float32).view(np.int32)])

    def update(self, ids: Any, dy: Any, lr: float, step: int) -> None:
        from dualbin import _native

        resolved = rules.resolve(self.problem.rule, self.case.planes, self.dim)
        rule, stats = _native.Rule(**resolved.native()), self.zeros(4, np.int64)
        table = self.bits, self.scale, self.dim, self.arrays
        workspace = self.workspace("update", len(ids))
        gradient = self.device_context(lr, step), *self.gradient(ids, dy)
        _native.update(*table, rule, *gradient, workspace, strict=True, stats=stats, threads=self.threads)

    def device_context(self, lr: float, step: int) -> Any:
        """Those of all steps go to the memory of the back end at once, where a batch is a step: every way there waits for a GPU."""
        if self.problem.rule.every > 1 or step >= STEPS or lr != self.case.lr(step):
            return self.memory(self.context(lr, step))
        if self.contexts is None:
            self.contexts = self.memory(np.stack([self.context(self.case.lr(k), k) for k in range(STEPS)]))
        return self.contexts[step]

    def gradient(self, ids: Any, dy: Any) -> tuple[Any, Any]:
        """In the memory of the back end; a batch of the problem, which comes every few steps, is put there once."""
        if not any(dy is batch for _, batch in self.problem.batches):
            return self.memory(ids), self.memory(dy)
        if id(dy) not in self.batches:
            self.batches[id(dy)] = self.memory(ids), self.memory(dy)
        return self.batches[id(dy)]


class NativeCuda(Native):
    """The same functions on device memory, which torch provides."""

    device = 0

    def memory(self, array: Any) -> Any:
        import torch

        array = np.array(array, order="C", copy=True)
        if str(array.dtype) == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(array).cuda()

    def to_host(self, memory: Any) -> Any:
        return memory.cpu().numpy()

    def zeros(self, count: int, dtype: Any) -> Any:
        import torch

        return torch.zeros(count, dtype=getattr(torch, np.dtype(dtype).name), device="cuda")


def run_torch(problem: Problem, device: str = "cpu") -> Result:
    """The whole PyTorch path: lookup, backward of the given output gradient, optimizer step."""
    import torch

    import dualbin.torch as dbt

    case = problem.case
    dtype = getattr(torch, case.grad_dtype)
    bits, scale = (torch.from_numpy(a.copy()).to(device) for a in (problem.bits, problem.scale))
    table = torch.nn.Parameter(dbt.BinaryTable(bits, scale, case.dim, planes=case.planes))
    opt = dbt.XOR([table], lr=1.0, rule=problem.rule, scale_lr=case.scale_lr, seed=SEED)
    batches = [
        (torch.from_numpy(ids.copy()).to(device), torch.from_numpy(dy.view(_storage(dy)).copy()).view(dtype).reshape(dy.shape).to(device))
        for ids, dy in problem.batches
    ]
    for step in range(STEPS):
        ids, grad = batches[step % len(batches)]
        opt.param_groups[0]["lr"] = case.lr(step)
        dbt.lookup(table, ids, dtype=dtype).backward(grad)
        opt.step()
        opt.zero_grad()
    state = opt.export_state({"t": table})["t"]
    return {"bits": table.bits.cpu().numpy(), "scale": table.scale.cpu().numpy(), **state}


def run_jax(problem: Problem, platform: str = "cpu") -> Result:
    """The whole JAX path under jit with donation: declared rows, lookup, its vjp, the optax transform, optax.apply_updates."""
    import jax
    import jax.numpy as jnp
    import optax

    import dualbin.jax as dbj

    case = problem.case
    device = jax.devices(platform)[0]
    rates = jnp.array([case.lr(step) for step in range(STEPS)], jnp.float32)
    tx = dbj.xor(lambda step: rates[step], rule=problem.rule, scale_lr=case.scale_lr, seed=SEED)

    def step(params: Any, state: Any, ids: Any, dy: Any) -> Any:
        active = dbj.activate(params["t"], ids)
        _, pull = jax.vjp(lambda tap: dbj.lookup(_with_tap(active, tap), ids, dtype=dy.dtype), active.tap)
        grads = {"t": dbj.RowGrad(active.row_ids, pull(dy)[0])}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(case.ids_dtype == "int64"), jax.default_device(device):
        step = jax.jit(step, donate_argnums=(0, 1))
        params = {"t": dbj.BinaryTable(bits=jnp.array(problem.bits), scale=jnp.array(problem.scale), dim=case.dim, planes=case.planes)}
        state = tx.init(params)
        batches = [(jnp.asarray(ids), jnp.asarray(dy)) for ids, dy in problem.batches]
        for i in range(STEPS):
            params, state = step(params, state, *batches[i % len(batches)])
        neutral = dbj.export_state(state)
        return {"bits": np.asarray(params["t"].bits), "scale": np.asarray(params["t"].scale), **next(iter(neutral.values()))}


def _with_tap(table: Any, tap: Any) -> Any:
    import dataclasses

    return dataclasses.replace(table, tap=tap)


BACKENDS: dict[str, Callable[[Problem], Result]] = {
    "native": lambda problem: Native(problem).run(),
    **at_levels(lambda problem: Native(problem).run()),
    "torch": run_torch,
    "jax": run_jax,
    "native-cuda": lambda problem: NativeCuda(problem).run(),
    "torch-cuda": lambda problem: run_torch(problem, "cuda"),
    "jax-cuda": lambda problem: run_jax(problem, "cuda"),
}


def assert_same(got: Result, want: Result) -> None:
    """Equality of bits, of dtype and of shape, name by name."""
    assert set(got) == set(want)
    for name in want:
        if name in STATE_INTS:
            assert int(got[name]) == want[name], name
            continue
        a, b = np.asarray(got[name]), np.asarray(want[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        different = int((a.view(np.uint8) != b.view(np.uint8)).sum()) if a.size else 0
        assert different == 0, f"{name}: {different} of {a.nbytes} bytes differ"


def _storage(array: Any) -> Any:
    return np.float32 if array.dtype == np.float32 else np.int16
