"""What an argument can be that it should not be, by kind: made from a good value of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

#: of any argument: no array, no table, no number of its range
PLAIN: dict[str, Callable[[], Any]] = {
    "an object": object,
    "a str": lambda: "x",
    "bytes": lambda: b"x",
    "a dict": lambda: {"x": 1},
    "a list": lambda: [object()],
    "a set": lambda: {1},
    "a function": lambda: lambda: None,
    "a class": lambda: int,
    "None": lambda: None,
    "an ellipsis": lambda: ...,
    "True": lambda: True,
    "complex": lambda: 1j,
    "half": lambda: 0.5,
    "minus one": lambda: -1,
    "minus 1.5": lambda: -1.5,
    "zero": lambda: 0,
    "2**63": lambda: 2**63,
    "-2**63 - 1": lambda: -(2**63) - 1,
    "10**400": lambda: 10**400,
    "1e39": lambda: 1e39,
    "NaN": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "an array of objects": lambda: np.array([object()]),
    "an array of str": lambda: np.array(["x"]),
    "complex numbers": lambda: np.ones(3, np.complex64),
}

DTYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64")


def of_shape(x: Any, is_torch: bool) -> Iterator[tuple[str, Any]]:
    """Other ranks, sizes and layouts of an array."""
    yield "one axis more", x[None]
    yield "two axes more", x[None, None]
    if x.ndim:
        yield "one axis less", x[0]
        yield "no rows", x[:0]
        yield "a row less", x[:-1]
        yield "flat", x.reshape(-1)
    if x.ndim > 1:
        yield "a column less", x[..., :-1]
        yield "no columns", x[..., :0]
        yield "transposed", x.T
    if is_torch and x.ndim:
        import torch

        yield "a row more", torch.cat([x, x[:1]])
        yield "every other", torch.cat([x, x], dim=-1)[..., ::2]
        yield "on meta", x.to("meta")
        yield "sparse", x.to_sparse()
        if not x.dtype.is_complex:
            yield "NumPy", x.cpu().numpy()
        if x.device.type != "cpu":
            yield "on the CPU", x.cpu()
    elif x.ndim:
        yield "a row more", np.concatenate([np.asarray(x), np.asarray(x)[:1]])
        yield "masked", np.ma.array(np.asarray(x))


def of_values(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Other values in the same dtype and shape."""
    if x.dtype.kind == "f":
        for value in (np.nan, np.inf, -np.inf):
            yield f"{value} in the first place", np.where(np.arange(x.size).reshape(x.shape) == 0, value, x).astype(x.dtype)
    elif x.dtype.kind in "iu":
        largest = np.iinfo(x.dtype)
        for value in {largest.max, largest.min, -1 if largest.min else 255}:
            yield f"{value} everywhere", np.full_like(x, value)


def from_array(x: Any) -> Iterator[tuple[str, Any]]:
    """Wrong arrays in place of a good one, NumPy, of JAX or a plain tensor."""
    if type(x).__module__.startswith("torch"):
        import torch

        yield from of_shape(x, True)
        for name in DTYPES:
            if name != str(x.dtype).removeprefix("torch."):
                yield f"of {name}", x.to(getattr(torch, name))
        for name, values in of_values(x.detach().cpu().numpy()):
            yield name, torch.from_numpy(values).to(x.device)
        return
    yield from of_shape(x, False)
    host = np.asarray(x)
    for name in DTYPES:
        if name != host.dtype.name:
            yield f"of {name}", host.astype(name)
    yield from of_values(host)
    if not isinstance(x, np.ndarray):
        import jax.numpy as jnp

        gone = jnp.array(x)
        gone.delete()
        yield "deleted", gone


def is_array(x: Any) -> bool:
    kind = type(x)
    if isinstance(x, np.ndarray):
        return True
    return (kind.__module__ == "torch" and kind.__name__ == "Tensor") or kind.__name__ == "ArrayImpl"


def wrong_values(name: str, good: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All wrong values of an argument, with what is wrong with them."""
    x = good[name]
    for kind, make in PLAIN.items():
        yield kind, make()
    for other, value in good.items():
        if other != name:
            yield f"the value of {other}", value
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        yield "a str of it", str(x)
        yield "negative", -x
        yield "an array of it", np.array([x])
    if isinstance(x, str):
        yield "another word", x + "s"
        yield "no letters", ""
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        yield "one entry less", x[:-1]
        yield "one entry more", [*x, object()]
    if isinstance(x, dict):
        yield "no entries", {}
        yield "another key", {("other", key): value for key, value in x.items()}
        yield "other values", dict.fromkeys(x, object())
    if is_array(x) and getattr(x, "dtype", None) is not None and "key" not in str(x.dtype):
        yield from from_array(x)
