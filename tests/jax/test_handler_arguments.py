"""Every XLA target with every operand and result wrong in type or shape: the handler refuses, it trusts nothing that XLA passes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualbin import rules
from dualbin._schema import BAG_MODES, STATE_ARRAYS
from dualbin.jax import _ffi

V, D, B, N, G, C = 4, 11, 2, 5, 3, 6


@dataclass
class Call:
    """One good call: operands and results by name; `aliases` are names that are both."""

    operands: dict[str, Any]
    results: dict[str, Any]
    attrs: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    #: (name, axis) that nothing else fixes
    free: tuple[tuple[str, int], ...] = ()

    def run(self, target: str) -> None:
        operands, results = list(self.operands), list(self.results)
        aliases = {operands.index(name): results.index(name) for name in self.aliases}
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.results.values()]
        jax.block_until_ready(jax.ffi.ffi_call(target, shapes, input_output_aliases=aliases)(*self.operands.values(), **self.attrs))


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return jnp.zeros(shape, dtype)


def table(planes: int = 1) -> dict[str, Any]:
    return {"bits": array(V, planes * B, dtype=np.uint8), "scale": array(V, 1)}


def bags() -> dict[str, Any]:
    return {"ids": array(N, dtype=np.int32), "offsets": jnp.array([0, 2, 2, N], np.int32)}


def work() -> dict[str, Any]:
    return {"workspace": array(1 << 16, dtype=np.uint8)}  # more than any of the calls needs on a GPU; the CPU needs none


def rule_attrs(rule: rules.Rule) -> dict[str, Any]:
    numbers = rule.native()
    return {"dim": np.int64(D)} | {name: np.float32(x) if isinstance(x, float) else np.int32(x) for name, x in numbers.items()}


def announce(*names: str) -> np.int32:
    return np.int32(sum(1 << list(STATE_ARRAYS).index(name) for name in names))


def update(*, masks: bool, rule: rules.Rule | None = None, planes: int = 1) -> Call:
    rule = rules.resolve(rule or rules.Counter(4), planes, D)
    spec = rules.state_layout(rule, V, D, train_scale=True, planes=planes)
    state = {name: array(*spec[name][0], dtype=spec[name][1]) for name in STATE_ARRAYS if name in spec}
    step = {"context": array(8, dtype=np.uint32), "ids": array(N, dtype=np.int32), "dy": array(N, D)}
    first = {"mask": array(N, planes * B, dtype=np.uint8), "new_scale": array(N, 1)} if masks else table(planes)
    results = first | {"stats": array(8, dtype=np.uint32)} | work() | state
    aliases = (*state, *(() if masks else ("bits", "scale")))
    return Call(table(planes) | step | state, results, rule_attrs(rule) | {"state": announce(*state)}, aliases)


def calls() -> dict[str, Call]:
    bad = {"bad_ids": np.int32(0)}
    bag = {"mode": np.int32(0), "padding_idx": np.int64(-1)}
    ids, dy = {"ids": array(N, dtype=np.int32)}, {"dy": array(N, D)}
    found = {"out_ids": array(C, dtype=np.int32), "out_rows": array(C, D), "out_count": array(1, dtype=np.int32)}
    mask = {"ids": jnp.arange(3, dtype=np.int32), "mask": array(3, B, dtype=np.uint8)}
    slots = {"slots": array(N, dtype=np.int32)}
    return {
        "dualbin_lookup": Call(table() | ids, {"out": array(N, D)}, {"dim": np.int64(D), **bad}),
        "dualbin_segment_sum": Call(slots | dy, {"out": array(V, D)} | work(), free=(("out", 0),)),
        "dualbin_reduce_rows": Call(ids | dy, found | work(), {"rows": np.int64(V)}),
        "dualbin_update": update(masks=False),
        "dualbin_masks": update(masks=True),
        "dualbin_xor_rows": Call({"bits": table()["bits"]} | mask, {"bits": table()["bits"]}, {}, ("bits",), (("bits", 0),)),
        "dualbin_lookup_bag": Call(
            table() | bags() | {"weights": array(N)},
            {"out": array(G, D)},
            bag | bad | {"dim": np.int64(D), "given": np.int32(1)},
            free=(("ids", 0),),
        ),
        "dualbin_bag_counts": Call(
            {"scale": table()["scale"]} | bags(),
            {"out": array(G, dtype=np.int32)},
            {"padding_idx": np.int64(-1)},
            free=(("scale", 0), ("ids", 0)),
        ),
        "dualbin_bag_gradient": Call(bags() | {"dy": array(G, D), "weights": array(N)}, {"out": array(N, D)}, bag | {"given": np.int32(2)}),
        "dualbin_bag_weight_gradient": Call(
            table() | bags() | {"dy": array(G, D)}, {"out": array(N)}, {"padding_idx": np.int64(-1)}, free=(("dy", 1),)
        ),
        "dualbin_average": Call(
            {f"{name}_{which}": x for which in "ab" for name, x in table().items()} | {"context": array(8, dtype=np.uint32)},
            table(),
            {"dim": np.int64(D)},
        ),
    }


def wrong(call: Call, name: str, good: Any) -> Iterator[Any]:
    yield good.astype(np.float16 if good.dtype == np.int32 else np.int8)
    for axis in range(good.ndim):
        if name == "workspace" or (name, axis) in call.free or not good.size:
            continue
        yield jnp.concatenate([good, good.take(jnp.array([0]), axis)], axis)
        yield good.take(jnp.arange(good.shape[axis] - 1), axis)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    _ffi.register()


def test_every_target_is_here() -> None:
    from dualbin import _native

    assert set(calls()) == set(_native.registrations()["cpu"])


@pytest.mark.parametrize("target", calls())
def test_what_xla_passes_on_is_checked(target: str) -> None:
    calls()[target].run(target)
    for side in ("operands", "results"):
        for name in getattr(calls()[target], side):
            call = calls()[target]
            for value in wrong(call, name, getattr(call, side)[name]):
                call = calls()[target]
                getattr(call, side)[name] = value
                if name in call.aliases:
                    call.operands[name] = call.results[name] = value
                with pytest.raises(Exception, match="dualbin: ") as caught:
                    call.run(target)
                assert "INTERNAL" not in str(caught.value), (name, str(caught.value))


def refused(call: Call, target: str, match: str) -> None:
    with pytest.raises(Exception, match=match) as caught:
        call.run(target)
    assert "INTERNAL" not in str(caught.value), str(caught.value)


STATE = ("counter", "record")


@pytest.mark.parametrize("masks", [False, True])
def test_the_state_is_what_the_call_announces(masks: bool) -> None:
    target = "dualbin_masks" if masks else "dualbin_update"
    announced = r"dualbin: operands and results must end in the arrays that state announces \(counter, record\), got "

    def changed(*, operand: Any = None, result: Any = None, state: Any = None, drop: tuple[str, ...] = ()) -> Call:
        call = update(masks=masks)
        for name in drop:
            del call.operands[name], call.results[name]
        call.aliases = tuple(name for name in call.aliases if name not in drop)
        if operand is not None:
            call.operands["more"] = operand
        if result is not None:
            call.results["more"] = result
        if state is not None:
            call.attrs["state"] = np.int32(state)
        return call

    for name in STATE:
        refused(changed(drop=(name,)), target, announced + "1 operands and 1 results")
        fewer = [other for other in STATE if other != name]
        refused(changed(state=announce(*fewer)), target, rf"announces \({', '.join(fewer)}\), got 2 operands and 2 results")
    refused(changed(operand=array(V)), target, announced + "3 operands and 2 results")
    refused(changed(result=array(V)), target, announced + "2 operands and 3 results")
    refused(changed(operand=array(V), result=array(V)), target, announced + "3 operands and 3 results")
    refused(changed(state=announce(*STATE_ARRAYS)), target, r"announces \(counter, ema, record, count, squares\), got 2 operands")
    for state in (-1, 1 << len(STATE_ARRAYS), int(announce(*STATE)) | 1 << 30):
        refused(changed(state=state), target, rf"dualbin: state has a bit for each of {len(STATE_ARRAYS)} arrays, got {state}")
    # announced as another one: its type or its shape tells
    refused(changed(state=announce("ema", "record")), target, "dualbin: ema must be float32, got uint8")
    refused(changed(state=announce("counter", "count")), target, r"dualbin: count must have ")
    # announced and given, but not what the rule needs
    refused(
        changed(drop=("counter",), state=announce("record")), target, "a counter rule of more bits than the table has planes needs counter"
    )
    refused(changed(drop=("record",), state=announce("counter")), target, "a dead zone that grows needs count")


@pytest.mark.parametrize("masks", [False, True])
def test_the_width_of_bits_tells_the_planes(masks: bool) -> None:
    target, wide = "dualbin_masks" if masks else "dualbin_update", rules.Counter(4, norm="adagrad")
    for planes in (1, 2, 4):
        update(masks=masks, rule=wide, planes=planes).run(target)
    call = update(masks=masks, rule=wide, planes=4)
    call.attrs["bits"] = np.int32(2)
    refused(call, target, "bits must be between the planes of the table and 8, got 2 for a table of 4 planes")
    call = update(masks=masks, rule=wide, planes=2)
    call.attrs["center"] = np.int32(1)
    refused(call, target, "center must be 0 for a table of more than one plane, got 1 for a table of 2 planes")
    call = update(masks=masks, rule=wide, planes=2)
    call.attrs["state"] = announce("counter")
    del call.operands["record"], call.results["record"]
    call.aliases = tuple(name for name in call.aliases if name != "record")
    refused(call, target, "the norm adagrad needs squares")


@pytest.mark.parametrize("masks", [False, True])
def test_a_call_without_state(masks: bool) -> None:
    rule = rules.Sign()
    call = update(masks=masks, rule=rule)
    for name in [name for name in STATE_ARRAYS if name in call.operands]:
        del call.operands[name], call.results[name]
    call.aliases = tuple(name for name in call.aliases if name in call.operands)
    call.attrs["state"] = np.int32(0)
    call.run("dualbin_masks" if masks else "dualbin_update")


def test_optional_operands_are_announced() -> None:
    gradient, bag = "dualbin_bag_gradient", "dualbin_lookup_bag"
    call = calls()[gradient]
    call.attrs |= {"mode": np.int32(BAG_MODES.index("mean")), "given": np.int32(1)}
    refused(call, gradient, "dualbin: counts must be int32, got float32")
    call.operands["weights"] = array(G, dtype=np.int32)
    call.run(gradient)
    call.attrs["given"] = np.int32(3)
    refused(call, gradient, "dualbin: the operands must be ids, offsets, dy, counts, weights, got 4")
    call.attrs["given"] = np.int32(0)
    refused(call, gradient, "dualbin: the operands must be ids, offsets, dy, got 4")
    del call.operands["weights"]
    refused(call, gradient, "dualbin: counts are given with the mode mean, and with no other")
    call.attrs["mode"] = np.int32(BAG_MODES.index("sum"))
    call.run(gradient)
    for given in (4, -1, 1 << 20):
        call = calls()[gradient]
        call.attrs["given"] = np.int32(given)
        refused(call, gradient, "dualbin: (given has a bit for each of 2 operands|the operands must be)")
    call = calls()[bag]
    call.operands["more"] = array(N)
    refused(call, bag, "dualbin: the operands must be bits, scale, ids, offsets, weights, got 6")
    del call.operands["more"], call.operands["weights"]
    call.attrs["given"] = np.int32(0)
    call.run(bag)


@pytest.mark.parametrize("target", sorted(set(calls()) - {"dualbin_update", "dualbin_masks"}))
def test_nothing_may_be_absent_or_too_much(target: str) -> None:
    for side in ("operands", "results"):
        names = list(getattr(calls()[target], side))
        call = calls()[target]
        if names[-1] not in call.aliases and names != ["out"]:  # XLA drops a call without results
            del getattr(call, side)[names[-1]]
            refused(call, target, f"dualbin: the {side} must be {', '.join(names)}, got {len(names) - 1}")
        call = calls()[target]
        getattr(call, side)["more"] = array(1)
        refused(call, target, f"dualbin: the {side} must be {', '.join(names)}, got {len(names) + 1}")
    for name in calls()[target].attrs:
        call = calls()[target]
        del call.attrs[name]
        refused(call, target, f"dualbin: the attribute {name} is absent or of another type")
        call.attrs[name] = np.float32(0.5)  # JAX would take one that is equal to the good value for it
        refused(call, target, f"dualbin: the attribute {name} is absent or of another type")
