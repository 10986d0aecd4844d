"""Packed bits in a state_dict, which are bytes of eight weights each: numbers to copy and to save, not to calculate with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dualbin.torch._hf_saving import check_is_named

_ARITHMETIC = {
    *("add", "radd", "iadd", "sub", "subtract", "rsub", "isub", "mul", "multiply", "rmul", "imul"),
    *("div", "divide", "true_divide", "truediv", "rtruediv", "itruediv", "addcmul", "addcdiv", "lerp", "mean"),
}
_COPIES = {"bfloat16", "clone", "contiguous", "cpu", "cuda", "detach", "double", "float", "half", "stack", "to", "type"}


class StateBits(torch.Tensor):
    """A uint8 tensor that a module saves as `weight.bits`, in its own memory. It is a plain tensor to everything but arithmetic.

    Averages of a state_dict (EMA, SWA, "soups") would be averages of bytes, and flip bits on which all agree; so the arithmetic that they
    are made of raises. Pickled, it is a plain tensor: files say nothing of it.
    """

    @classmethod
    def of(cls, bits: Tensor) -> Tensor:
        """`bits` as a tensor of this class, in the same memory."""
        return bits.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "").strip("_").removeprefix("foreach_")
        if name in _ARITHMETIC:
            msg = (
                f"{name} on the packed bits of a state_dict, of which every byte holds 8 weights: average the tables with "
                "dualbin.torch.average(a, b, weight), or all parameters of two modules with a.lerp_(b, weight)"
            )
            raise NotImplementedError(msg)
        if name == "contiguous":  # as save_pretrained calls it, also of a state_dict that it was given
            check_is_named()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if name in _COPIES and type(result) is Tensor else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = duplicate = self.of(copy.deepcopy(plain(self), memo))
        return duplicate


def plain(array: Any) -> Any:
    """The tensor behind a :class:`StateBits`; anything else as it is."""
    with torch._C.DisableTorchFunctionSubclass():
        return array.as_subclass(Tensor) if isinstance(array, StateBits) else array
