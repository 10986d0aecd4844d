"""Every function of dualbin._native with every operand wrong in every way: refused by name, before anything changes.

`make sanitize` runs this file and the ones for the operators of torch under AddressSanitizer, which sees what a check forgot.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dualbin import _native, rules
from dualbin._schema import STATE_ARRAYS

V, D, B, N, G, C = 4, 11, 2, 5, 3, 6
DTYPES = [np.dtype(x) for x in (bool, "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16)]
FLOATS, IDS = ("float32", "float16", "bfloat16"), ("int32", "int64")
COLUMNS = ("scale", "scale_a", "scale_b", "new_scale", "out_scale")  #: [V, 1] may be [V]

#: other dtypes that an operand may have, and axes that no other operand fixes
DTYPES_TOO = {"w": FLOATS, "ids": IDS, "slots": IDS, "local": IDS, "offsets": IDS, "out_ids": IDS, "out_count": IDS}
FREE = {
    "xor_rows": {("bits", 0)},
    "segment_sum": {("out", 0), ("workspace", 0)},
    "slot_means": {("out", 0), ("workspace", 0)},
    "bag_counts": {("scale", 0), ("ids", 0)},
    "reduce_rows": {("workspace", 0)},
    "route": {("workspace", 0)},
    "update": {("workspace", 0)},
    "lookup_bag": {("ids", 0)},
    "pack": {("w", 1)},  # within the last byte
    "bag_weight_gradient": {("dy", 1)},
}
FLOAT_OUT = {
    ("lookup", "out"),
    ("lookup_bag", "out"),
    ("segment_sum", "dy"),
    ("slot_means", "dy"),
    ("slot_means", "out"),
    ("reduce_rows", "dy"),
    ("update", "dy"),
    ("bag_weight_gradient", "dy"),
}


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def table(suffix: str = "") -> dict[str, Any]:
    return {f"bits{suffix}": zeros(V, B, dtype=np.uint8), f"scale{suffix}": np.ones((V, 1), np.float32)}


def bags() -> dict[str, Any]:
    return {"ids": zeros(N, dtype=np.int64), "offsets": np.array([0, 2, 2, N])}


def workspace(op: str) -> Any:
    return zeros(_native.workspace_bytes(op, -1, 1, N, V, D), dtype=np.uint8)


def update_of(rule: rules.Rule) -> dict[str, Any]:
    arrays = {name: np.zeros(*spec) for name, spec in rules.state_layout(rule, V, D, train_scale=True).items()}
    gradient = {"context": zeros(8, dtype=np.uint32), "ids": zeros(N, dtype=np.int64), "dy": zeros(N, D), "workspace": workspace("update")}
    outs = {"mask": zeros(N, B, dtype=np.uint8), "new_scale": zeros(N, 1), "stats": zeros(4, dtype=np.uint64)}
    return table() | {"dim": D, "rule": _native.Rule(**rules.resolve(rule, 1, D).native())} | gradient | outs | arrays


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "pack": lambda: {"w": zeros(V, D)} | table(),
    "unpack": lambda: {"bits": table()["bits"], "dim": D, "out": zeros(V, D, dtype=np.int8)},
    "fewer_planes": lambda: (
        {"bits": zeros(V, 2 * B, dtype=np.uint8), "scale": table()["scale"], "dim": D} | {f"out_{k}": x for k, x in table().items()}
    ),
    "lookup": lambda: table() | {"dim": D, "ids": zeros(N, dtype=np.int64), "out": zeros(N, D)},
    "lookup_bag": lambda: table() | bags() | {"dim": D, "weights": zeros(N), "mode": "sum", "out": zeros(G, D)},
    "bag_counts": lambda: {"scale": table()["scale"]} | bags() | {"out": zeros(G, dtype=np.int32)},
    "bag_gradient": lambda: (
        bags() | {"dy": zeros(G, D), "mode": "mean", "counts": np.ones(G, np.int32), "weights": None, "out": zeros(N, D)}
    ),
    "bag_weight_gradient": lambda: table() | bags() | {"dy": zeros(G, D), "out": zeros(N)},
    "average": lambda: table("_a") | table("_b") | {"dim": D, "context": zeros(8, dtype=np.uint32)} | table(),
    "reduce_rows": lambda: {
        **{"ids": zeros(N, dtype=np.int64), "dy": zeros(N, D), "rows": V, "out_ids": zeros(C, dtype=np.int64), "out_rows": zeros(C, D)},
        **{"out_count": zeros(1, dtype=np.int64), "workspace": workspace("reduce_rows")},
    },
    "segment_sum": lambda: {
        "slots": zeros(N, dtype=np.int64),
        "dy": zeros(N, D),
        "out": zeros(V, D),
        "workspace": workspace("segment_sum"),
    },
    "xor_rows": lambda: {"bits": table()["bits"], "ids": np.arange(3), "mask": zeros(3, B, dtype=np.uint8)},
    "route": lambda: {
        **{"ids": zeros(N, dtype=np.int64), "rows": V, "share": V, "capacity": 0, "spare": 0, "local": zeros(min(N, V), dtype=np.int64)},
        **{"slots": zeros(N, dtype=np.int64), "numbers": zeros(2, dtype=np.int64), "missed": zeros(4, dtype=np.int64)},
        "workspace": workspace("reduce_rows"),
    },
    "slot_means": lambda: {
        **{"slots": zeros(N, dtype=np.int64), "dy": zeros(N, D), "divisor": 3, "out": zeros(V, D)},
        "workspace": workspace("segment_sum"),
    },
    "take_rows": lambda: table() | {"ids": zeros(N, dtype=np.int64), "out": zeros(N, B + 4, dtype=np.uint8)},
    "put_rows": lambda: {"packed": zeros(3, B + 4, dtype=np.uint8)} | table() | {"ids": np.arange(3)},
    "update": lambda: update_of(rules.Counter(4)),
    "update bop": lambda: update_of(rules.Bop()),
}
OPTIONAL = {
    "scale": {"pack"},
    "out_scale": {"fewer_planes"},
    "weights": {"lookup_bag", "bag_gradient"},
    "counts": {"bag_gradient"},
    "stats": {"update", "update bop"},
    "missed": {"route"},
    "ids": {"put_rows"},
}
STATE = tuple(STATE_ARRAYS)
SCALARS = {
    "dim": (0, -1, D + 8, 1 << 28, (1 << 28) + 1, 1 << 40),
    "rows": (0, -5),
    "mode": ("median", ""),
    "divisor": (0, -1, (1 << 24) + 1),
}


def call(name: str, arguments: dict[str, Any]) -> None:
    name = name.split(maxsplit=1)[0]
    if name == "update":
        arguments = dict(arguments)
        state = {key: arguments.pop(key) for key in STATE if key in arguments}
        arguments["state"] = {key: value for key, value in state.items() if value is not None}
    getattr(_native, name)(**arguments)


def wrong(name: str, key: str, good: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, the operand) for one operand."""
    name = name.split(maxsplit=1)[0]
    yield "a list", good.tolist()
    yield "a scalar", 3
    allowed = {good.dtype.name, *DTYPES_TOO.get(key, ()), *(FLOATS if (name, key) in FLOAT_OUT else ())}
    for dtype in DTYPES:
        words = key in {"context", "stats"} and dtype.kind in "iu" and dtype.itemsize * good.size == good.nbytes
        if dtype.name not in allowed and not words:
            yield dtype.name, good.astype(dtype)
    if good.dtype.itemsize > 1:
        yield "another byte order", good.astype(good.dtype.newbyteorder())
        raw = np.zeros(good.nbytes + 1, np.uint8)
        yield "not aligned", raw[1:].view(good.dtype).reshape(good.shape)
    if not (name == "lookup" and key == "ids") and key != "workspace":
        yield "one dimension more", good[None]
        yield "a scalar array", good.reshape(-1)[0:1].reshape(())
    if good.ndim == 2 and key not in COLUMNS:
        yield "one dimension", good.reshape(-1)
    for axis in range(good.ndim):
        if (key, axis) in FREE.get(name, set()):
            continue
        yield f"axis {axis} longer", np.concatenate([good, good.take([0], axis)], axis)
        yield f"axis {axis} shorter", good.take(range(good.shape[axis] - 1), axis)
        yield f"axis {axis} empty", good.take([], axis)
    if good.size > 1:
        yield "strided", np.repeat(good, 2, -1)[..., ::2] if good.shape[-1] > 1 else np.repeat(good, 2, 0)[::2]
    if good.ndim == 2 and min(good.shape) > 1:
        yield "transposed", np.asfortranarray(good)


def snapshot(arguments: dict[str, Any]) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in arguments.items() if isinstance(value, np.ndarray)}


def refused(name: str, key: str, what: str, value: Any, arguments: dict[str, Any]) -> None:
    before = snapshot(arguments)
    with pytest.raises((TypeError, ValueError)) as caught:
        call(name, arguments | {key: value})
    assert snapshot(arguments) == before, (name, key, what)
    named = any(word in str(caught.value) for word in arguments)
    assert named, (name, key, what, str(caught.value))


@pytest.mark.parametrize("name", CALLS)
def test_wrong_operands_are_refused_by_name(name: str) -> None:
    call(name, CALLS[name]())
    for key, good in CALLS[name]().items():
        if isinstance(good, np.ndarray):
            for what, value in wrong(name, key, good):
                refused(name, key, what, value, CALLS[name]())
            if name not in OPTIONAL.get(key, set()) and key not in STATE:
                refused(name, key, "None", None, CALLS[name]())
        for value in SCALARS.get(key, ()):
            refused(name, key, "value", value, CALLS[name]())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("pack", key) for key in ("bits", "scale")),
        *(("update", key) for key in ("bits", "scale", "counter", "record", "mask", "new_scale", "stats", "workspace")),
        *((name, "out") for name in ("unpack", "lookup", "lookup_bag", "segment_sum", "bag_counts", "bag_gradient", "bag_weight_gradient")),
        *(("reduce_rows", key) for key in ("out_ids", "out_rows", "out_count")),
        ("xor_rows", "bits"),
        *(("route", key) for key in ("local", "slots", "numbers", "missed")),
        *((name, "out") for name in ("slot_means", "take_rows")),
        *(("put_rows", key) for key in ("bits", "scale")),
    ],
)
def test_what_is_written_has_to_be_writable(name: str, key: str) -> None:
    arguments = CALLS[name]()
    arguments[key].flags.writeable = False
    with pytest.raises(ValueError, match=f"^{key} must be writable"):
        call(name, arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lookup", {"dim": D + 8}, r"bits must have shape \[V, planes \* 3\] with V >= 1 and 1 to 8 planes for dim 19, got \[4, 2\]"),
        ("lookup", {"scale": zeros(1, 1)}, r"scale must have shape \[4, 1\], got \[1, 1\]"),
        ("lookup", {"ids": zeros(N)}, "ids must be int32 or int64, got float32"),
        ("lookup", {"out": zeros(N, D + 1)}, r"out must have the shape of ids, \[5\], and then dim, 11, got \[5, 12\]"),
        ("segment_sum", {"out": zeros(V, 0), "dy": zeros(N, 0)}, "dy must have between 1 and 2.28 columns, got 0"),
        ("xor_rows", {"bits": zeros(V, 0, dtype=np.uint8), "mask": zeros(3, 0, dtype=np.uint8)}, "width must be between 1 and"),
        ("reduce_rows", {"out_count": zeros(0, dtype=np.int64)}, r"out_count must have shape \[1\], got \[0\]"),
        ("reduce_rows", {"rows": 1 << 40, "out_ids": zeros(C, dtype=np.int32)}, "out_ids must be int64 for a table of"),
        ("route", {"share": 3}, "share must be at least rows / ranks: 1 ranks of 3 rows have not all of 4"),
        ("route", {"share": 0}, "share must be at least 1, got 0"),
        ("route", {"capacity": -1}, "capacity must not be negative, got -1"),
        ("route", {"capacity": 4}, "spare must be at least 1 with a capacity and 0 without, got 0"),
        ("route", {"capacity": 5, "spare": 1}, r"local must have min\(ids, rows\) places, or capacity \* ranks with a capacity, got 4"),
        ("route", {"numbers": zeros(0, dtype=np.int64), "missed": None}, "share must be at least rows / ranks: -1 ranks"),
        ("put_rows", {"ids": None}, "packed must have the 4 rows of bits, got 3"),
        ("put_rows", {"ids": np.arange(2)}, "ids must have the 3 rows of packed, got 2"),
        ("update", {"workspace": zeros(100, dtype=np.uint8)}, "the workspace has .* bytes, .* are needed"),
        ("update", {"mask": None}, "mask and new_scale are given together"),
        ("update", {"counter": None}, "a counter rule of more bits than the table has planes needs counter"),
        ("update bop", {"ema": None}, "the rule Bop needs ema"),
    ],
)
def test_messages(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(name, CALLS[name]() | change)


def test_a_context_from_the_host_is_that_of_the_words() -> None:
    numbers = (2**64 - 3, 2**40 + 5, 7, 0.7, 3e-3)
    words = np.frombuffer(struct.pack("<QQQff", *numbers), np.uint32)
    results = []
    for context in (words, words.view(np.uint64), numbers, (*numbers[:3], 0.7, float(np.float32(3e-3)))):
        arguments = CALLS["update"]() | {"context": context, "dy": np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)}
        call("update", arguments | {"mask": None, "new_scale": None})
        results.append(snapshot({key: value for key, value in arguments.items() if key not in ("context", "workspace")}))
    assert all(result == results[0] for result in results)
    assert np.frombuffer(results[0]["stats"], np.uint64)[1] == 1  # a row, and with other numbers others
    arguments = CALLS["update"]() | {"context": (1, *numbers[1:]), "dy": np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)}
    call("update", arguments | {"mask": None, "new_scale": None})
    assert snapshot({key: value for key, value in arguments.items() if key not in ("context", "workspace")}) != results[0]


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ((), r"context must be \(seed, step, first_row, lr, scale_lr\), got \(\)"),
        ((0, 0, 0, 1.0), "context must be"),
        ((0, 0, 0, 1.0, 0.0, 0), "context must be"),
        ((-1, 0, 0, 1.0, 0.0), "context must have a seed, a step and a first_row of 0 to 2.64 - 1, got -1"),
        ((0, 2**64, 0, 1.0, 0.0), "context must have .*, got 18446744073709551616"),
        ((0, 0, 1.5, 1.0, 0.0), "context must have .*, got 1.5"),
        ((0, 0, 0, 1e39, 0.0), "lr must fit a float32, got 1e.39"),
        ((0, 0, 0, 1.0, float("nan")), "scale_lr must fit a float32, got nan"),
        ((0, 0, 0, "1", 0.0), "lr must be a number, got 1"),
    ],
)
def test_a_context_from_the_host_that_is_none_is_refused(context: Any, message: str) -> None:
    arguments = CALLS["update"]()
    before = snapshot(arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        call("update", arguments | {"context": context})
    assert snapshot(arguments) == before


def test_names_that_nothing_has() -> None:
    arguments = CALLS["update"]()
    rule, state = arguments.pop("rule"), {key: arguments.pop(key) for key in STATE if key in arguments}
    with pytest.raises(ValueError, match=r"state must hold arrays of an optimizer state only, got .*momentum"):
        _native.update(**arguments, rule=rule, state=state | {"momentum": zeros(V)})
    with pytest.raises(TypeError, match=r"Rule got a number that no rule has: .*momentum"):
        _native.Rule(0, bits=4, momentum=0.9)
    with pytest.raises(ValueError, match="op must be one of 'reduce_rows', 'segment_sum', 'update', got 'lookup'"):
        _native.workspace_bytes("lookup", -1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="op must be one of 'reduce_rows', 'segment_sum', 'update', got 'lookup'"):
        _native.workspace_bound("lookup", 1)
    with pytest.raises(ValueError, match=r"dim must be between 1 and 2\^28, got 0"):
        _native.workspace_bound("update", 0)


def test_other_objects_that_hold_memory() -> None:
    """Whatever exports a buffer is an array, as long as it lives."""
    bits, scale = bytes([0b101] * V), memoryview(np.ones(V, np.float32))
    out, ids = bytearray(4 * V * 3), memoryview(np.arange(V))
    _native.lookup(memoryview(bits).cast("B", (V, 1)), scale, 3, ids, memoryview(out).cast("f", (V, 3)))
    np.testing.assert_array_equal(np.frombuffer(out, np.float32).reshape(V, 3), [[1, -1, 1]] * V)
    with pytest.raises(TypeError, match="out must be a writable array, got a memoryview"):
        _native.lookup(memoryview(bits).cast("B", (V, 1)), scale, 3, ids, memoryview(bytes(out)).cast("f", (V, 3)))


def test_steps_are_checked_before_the_first_one_runs() -> None:
    arguments = CALLS["update"]()
    state = {key: arguments.pop(key) for key in STATE if key in arguments}
    update, before = _native.Update(**arguments, state=state), snapshot(state)
    twice = [(None, [(state, {"count": 0})]), (None, [(state, {})])]
    for bad in ([(update,)], [(update, [({}, {}, {})])], [(update, [({}, {1: 2})])], [(update, [({}, [])])], [(3, [])], twice):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            _native.apply_steps([(update, []), *bad])
    assert snapshot(state) == before
    kept = {"a": 1, "gone": 2}
    _native.apply_steps([(update, [(kept, {"a": 3, "new": 4})]), (None, [])])
    assert kept == {"a": 3, "new": 4}
    assert int(state["record"][0, 0]) == 1
