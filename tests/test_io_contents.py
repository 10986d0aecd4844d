"""Files hold what a table and a state may be, and nothing else: neither written nor read."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dualbin import io

V, D, B = 3, 13, 2
ROWS = np.ones((2, D), np.float32)


def table(scale=None):
    return io.Table(np.zeros((V, B), np.uint8), np.full((V, 1), 0.3, np.float32) if scale is None else scale, D)


def window(ids, rows=ROWS, steps=1):
    return {"pending_ids": np.array(ids, np.int64), "pending_rows": rows, "pending_steps": steps}


CASES = [
    ({"step": -1}, "'step' must be 0 or more, got -1"),
    (window([0, 1], steps=-5), "'pending_steps' must be 0 or more, got -5"),
    (window([-1, 2]), r"'pending_ids' must ascend and lie in \[0, 3\), got \[-1, 2\]"),
    (window([1, 3]), r"'pending_ids' must ascend and lie in \[0, 3\), got \[1, 3\]"),
    (window([2, 1]), r"'pending_ids' must ascend"),
    (window([2, 2]), r"'pending_ids' must ascend"),
    (window([0, 1], rows=ROWS[:, :5].copy()), r"'pending_rows' must be \[2, 13\], .*, got \[2, 5\]"),
    (window([0, 1], rows=np.ones((7, D), np.float32)), r"'pending_rows' must be \[2, 13\], .*, got \[7, 13\]"),
    ({"count": np.full(V, -1, np.int32)}, "'count' must be 0 or more in every row"),
    ({"scale_v": np.full(V, np.nan, np.float32)}, "'scale_v' must be 0 or more in every row"),
    ({"scale_m": np.full(V, np.nan, np.float32)}, "'scale_m' must be finite"),
    ({"squares": np.full(V, np.inf, np.float32)}, "'squares' must be finite"),
    ({"counter": np.full((V, 7 * B), 255, np.uint8)}, "'counter' has bits set beyond column 12"),
    ({"nonsense": np.zeros(3)}, "is no array of a state, these are counter, ema"),
]


@pytest.mark.parametrize(("state", "message"), CASES, ids=[message for _, message in CASES])
def test_states_that_no_update_leaves_are_neither_written_nor_read(tmp_path, state, message):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match=message):
        io.save(path, {"a": table()}, {"a": state})
    assert not path.exists()
    io.save(path, {"a": table()})
    with safe_open(path, "numpy") as file:
        facts = file.metadata()
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    arrays |= {f"a.{key}": np.asarray(value) for key, value in state.items()}
    save_file(arrays, path, facts)
    with pytest.raises(ValueError, match=message) as raised:
        io.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("step", [2**63, 2**64 - 1])
def test_a_step_that_no_int64_holds_is_not_wrapped(tmp_path, step):
    with pytest.raises(ValueError, match=rf"state\['a'\]\['step'\] must be at most {2**63 - 1}, got {step}"):
        io.save(tmp_path / "t", {"a": table()}, {"a": {"step": step}})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(tmp_path, value):
    scale = np.full((V, 1), 0.3, np.float32)
    scale[1] = value
    with pytest.raises(ValueError, match="scale must be finite, got 1 rows that are not, the first of them 1"):
        io.save(tmp_path / "t", {"a": table(scale)})


def test_what_may_be_comes_back(tmp_path):
    state = {"step": 2**63 - 1, "count": np.zeros(V, np.int32), **window([0, 2])}
    io.save(tmp_path / "t", {"a": table()}, {"a": state})
    loaded = io.load(tmp_path / "t")[1]["a"]
    assert loaded["step"] == 2**63 - 1
    np.testing.assert_array_equal(loaded["pending_ids"], [0, 2])
