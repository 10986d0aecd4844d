"""Twenty steps in PyTorch, twenty in JAX, and back: the bits of forty in either."""

import jax
import numpy as np
import optax
import pytest

import dualbin
import dualbin.jax as dbj
from dualbin.rules import Bop, Counter

torch = pytest.importorskip("torch", minversion="2.11")  # a version: without torch the folder tests/torch would do
dbt = pytest.importorskip("dualbin.torch")

V, D, N = 40, 19, 30
DEVICES = {"cpu": "cpu", "gpu": "cuda"}  # of PyTorch, by the platform that JAX runs on


def batches(first, last):
    for number in range(first, last):
        rng = np.random.default_rng(number)
        yield rng.integers(0, V, N), rng.normal(size=(N, D)).astype(np.float32)


def torch_steps(table, optimizer, first, last):
    for batch in batches(first, last):
        ids, dy = (torch.from_numpy(x).to(table.device) for x in batch)
        (dbt.lookup(table, ids) * dy).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def jax_steps(table, tx, state, first, last):
    @jax.jit
    def step(table, state, ids, dy):
        grads = dbj.grad(lambda table: (table[ids] * dy).sum(), ids=lambda _: ids)(table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    for ids, dy in batches(first, last):
        table, state = step(table, state, ids.astype(np.int32), dy)
    return table, state


def make_torch(bits, scale, rule):
    bits, scale = (torch.tensor(x, device=DEVICES[jax.default_backend()]) for x in (bits, scale))
    table = torch.nn.Parameter(dbt.BinaryTable(bits, scale, D))
    return table, dbt.XOR([table], lr=0.7, rule=rule, scale_lr=3e-3, seed=11)


def everything(bits, scale, state):
    table = [np.asarray(x.cpu() if hasattr(x, "cpu") else x) for x in (bits, scale)]
    return [x.tobytes() for x in (*table, *(np.asarray(state[name]) for name in sorted(state)))]


@pytest.mark.parametrize(("rule", "by_file"), [(Counter(2, every=3), False), (Counter(4), True), (Bop(every=3), True)], ids=str)
def test_there_and_back(tmp_path, rule, by_file):
    rng = np.random.default_rng(0)
    bits = np.packbits(rng.integers(0, 2, (V, D), np.uint8), axis=1, bitorder="little")
    scale = rng.uniform(0.5, 2, (V, 1)).astype(np.float32)
    tx = dbj.xor(0.7, rule, 3e-3, seed=11)

    only_torch, optimizer = make_torch(bits, scale, rule)
    torch_steps(only_torch, optimizer, 0, 60)
    want = everything(only_torch.bits, only_torch.scale, optimizer.export_state({"": only_torch})[""])
    only_jax = dbj.BinaryTable(bits, scale, D)
    only_jax, state = jax_steps(only_jax, tx, tx.init(only_jax), 0, 60)
    assert everything(only_jax.bits, only_jax.scale, dbj.export_state(state)[""]) == want
    assert optimizer.stats() == dbj.read_stats(state)[""]  # by the same names

    first, optimizer = make_torch(bits, scale, rule)
    torch_steps(first, optimizer, 0, 20)  # 20 steps leave a window of every=3 open
    exported = optimizer.export_state({"emb": first})
    if by_file:
        dualbin.io.save(tmp_path / "a.safetensors", {"emb": first}, exported)
        tables, exported = dualbin.io.load(tmp_path / "a.safetensors")
        second = dbj.BinaryTable(tables["emb"].bits, tables["emb"].scale, tables["emb"].dim)
    else:
        second = dbj.from_torch(first)
    params = {"emb": second}
    params, state = jax_steps_of(params, tx, dbj.import_state(tx.init(params), exported), 20, 40)
    exported = dbj.export_state(state)
    if by_file:
        dualbin.io.save(tmp_path / "b.safetensors", params, exported)
        tables, exported = dualbin.io.load(tmp_path / "b.safetensors")
        third, optimizer = make_torch(tables["emb"].bits, tables["emb"].scale, rule)
    else:
        third = torch.nn.Parameter(dbt.from_jax(params["emb"]))
        optimizer = dbt.XOR([third], lr=0.7, rule=rule, scale_lr=3e-3, seed=11)
    optimizer.import_state(exported, {"emb": third})
    torch_steps(third, optimizer, 40, 60)
    assert everything(third.bits, third.scale, optimizer.export_state({"": third})[""]) == want


def jax_steps_of(params, tx, state, first, last):
    table, inner = jax_steps(params["emb"], tx, state._replace(tables=state.tables["emb"]), first, last)
    return {"emb": table}, inner._replace(tables={"emb": inner.tables})
