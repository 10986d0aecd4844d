"""A window of `every=K` that a run goes on with at another K: both frontends close it in the same step, with the bits of the reference."""

import numpy as np
import pytest
from test_io import make_table

from dualbin import reference
from dualbin.rules import Bop, Counter

V, D, STEPS = 20, 13, 7
IDS = np.array([3, 1, 3, 7, 19])


def batches():
    rng = np.random.default_rng(0)
    return [(IDS[rng.permutation(5)], rng.normal(size=(5, D)).astype(np.float32)) for _ in range(STEPS)]


def in_reference(first, then, open_steps):
    table = make_table(V, D)
    state = reference.init_state(first, V, D)
    for number, (ids, dy) in enumerate(batches()):
        rule = first if number < open_steps else then
        reference.update(table.bits, table.scale, state, ids, dy, rule=rule, dim=D)
    return table.bits, table.scale, state


def in_torch(first, then, open_steps):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    table = make_table(V, D)
    parameter = torch.nn.Parameter(dbt.BinaryTable(torch.from_numpy(table.bits), torch.from_numpy(table.scale), D))
    optimizer = dbt.XOR([parameter], rule=first)
    for number, (ids, dy) in enumerate(batches()):
        if number == open_steps:
            states = optimizer.export_state({"": parameter})
            optimizer = dbt.XOR([parameter], rule=then)
            optimizer.import_state(states, {"": parameter})
        parameter.grad = dbt.RowGrad(torch.from_numpy(ids), torch.from_numpy(dy), (V, D))
        optimizer.step()
    return parameter.bits.numpy(), parameter.scale.numpy(), optimizer.export_state({"": parameter})[""]


def in_jax(first, then, open_steps):
    jax, dbj = pytest.importorskip("jax"), pytest.importorskip("dualbin.jax")
    table = dbj.BinaryTable(**make_table(V, D)._asdict())
    state = dbj.init_state(table, first)
    for number, (ids, dy) in enumerate(batches()):
        if number == open_steps:
            state = dbj.import_state({"": dbj.init_state(table, then)}, dbj.export_state({"": state}))[""]
        rule = first if number < open_steps else then
        step = jax.jit(dbj.xor_update, static_argnames="rule")  # ids that nothing has are an error outside jit
        table, state = step(table, np.full(5, V), np.zeros((5, D), np.float32), state, rule=rule)  # a step without a row closes nothing
        table, state = dbj.xor_update(table, jax.numpy.asarray(ids), dy, state, rule=rule)
    return np.asarray(table.bits), np.asarray(table.scale), dbj.export_state({"": state})[""]


@pytest.mark.parametrize("run", [in_torch, in_jax])
@pytest.mark.parametrize("rules", [(Counter(8, every=5), Counter(8, every=2)), (Bop(every=5), Bop(every=2))], ids=["counter", "bop"])
@pytest.mark.parametrize("open_steps", [1, 2, 3, 4])
def test_a_window_that_is_already_full_closes_with_the_next_step(run, rules, open_steps):
    bits, scale, want = in_reference(*rules, open_steps)
    assert want["step"] == (1 + (STEPS - max(2, open_steps + 1)) // 2)
    got_bits, got_scale, got = run(*rules, open_steps)
    np.testing.assert_array_equal(got_bits, bits)
    np.testing.assert_array_equal(got_scale, scale)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


BAD_WINDOWS = pytest.mark.parametrize("ids", [[2, 1], [2, 2], [-1, 2], [1, 99]], ids=str)


def window(ids):
    return {"pending_ids": np.array(ids), "pending_rows": np.ones((2, D), np.float32), "pending_steps": 1}


@BAD_WINDOWS
def test_torch_imports_no_window_whose_rows_do_not_ascend_in_the_table(ids):
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    table = make_table(V, D)
    parameter = torch.nn.Parameter(dbt.BinaryTable(torch.from_numpy(table.bits), torch.from_numpy(table.scale), D))
    optimizer = dbt.XOR([parameter], rule=Counter(8, every=3))
    exported = {**reference.init_state(Counter(8, every=3), V, D), **window(ids)}
    with pytest.raises(ValueError, match=r"'pending_ids' must ascend and lie in \[0, 20\)"):
        optimizer.import_state({"": exported}, {"": parameter})


@BAD_WINDOWS
def test_jax_imports_no_window_whose_rows_do_not_ascend_in_the_table(ids):
    dbj = pytest.importorskip("dualbin.jax")
    state = {"": dbj.init_state(dbj.BinaryTable(**make_table(V, D)._asdict()), Counter(8, every=3))}
    exported = dbj.export_state(state)
    exported[""] |= window(ids)
    with pytest.raises(ValueError, match=r"'pending_ids'\] must ascend and lie in \[0, 20\)"):
        dbj.import_state(state, exported)
