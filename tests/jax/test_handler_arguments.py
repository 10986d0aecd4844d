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


def table() -> dict[str, Any]:
    return {"bits": array(V, B, dtype=np.uint8), "scale": array(V, 1)}


def bags() -> dict[str, Any]:
    return {"ids": array(N, dtype=np.int32), "offsets": jnp.array([0, 2, 2, N], np.int32)}


def work() -> dict[str, Any]:
    return {"workspace": array(1 << 16, dtype=np.uint8)}  # more than any of the calls needs on a GPU; the CPU needs none


def rule_attrs(rule: rules.Rule) -> dict[str, Any]:
    kinds = {"kind": np.int32, "bits": np.int32, "eta": np.float32, "dead_zone_q8": np.int32, "anneal_q8": np.int32, "center": np.int32}
    attrs = {name: kinds.get(name, np.float32)(value) for name, value in rule.native().items()}
    return {"dim": np.int64(D), **attrs}


def update(*, masks: bool) -> Call:
    rule = rules.Counter(4)
    spec = rules.state_spec(rule, V, D, train_scale=True)
    state = {name: array(*spec[name][0], dtype=spec[name][1]) for name in spec} | {"ema": array(0)}
    state = {name: state[name] for name in ("counter", "ema", "count", "scale_m", "scale_v")}
    step = {"context": array(8, dtype=np.uint32), "ids": array(N, dtype=np.int32), "dy": array(N, D)}
    first = {"mask": array(N, B, dtype=np.uint8), "new_scale": array(N, 1)} if masks else table()
    results = first | state | {"stats": array(8, dtype=np.uint32)} | work()
    aliases = tuple(name for name, x in state.items() if x.size) + (() if masks else ("bits", "scale"))
    return Call(table() | state | step, results, rule_attrs(rule), aliases)


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
            bag | bad | {"dim": np.int64(D)},
            free=(("ids", 0),),
        ),
        "dualbin_bag_counts": Call(
            {"scale": table()["scale"]} | bags(),
            {"out": array(G, dtype=np.int32)},
            {"padding_idx": np.int64(-1)},
            free=(("scale", 0), ("ids", 0)),
        ),
        "dualbin_bag_gradient": Call(
            bags() | {"dy": array(G, D), "counts": array(0, dtype=np.int32), "weights": array(N)}, {"out": array(N, D)}, bag
        ),
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
                if value.size == 0 and name in {"weights", "counts", "ema"}:  # absent
                    continue
                with pytest.raises(Exception, match="dualbin: ") as caught:
                    call.run(target)
                assert "INTERNAL" not in str(caught.value), (name, str(caught.value))
