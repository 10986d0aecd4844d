"""Checks of what a table is made from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dualbin._checks import check_padding_bits, check_table_arrays
from dualbin._schema import MAX_PLANES, packed_width
from dualbin.torch import _native_call


def check_dtype(name: str, dtype: object) -> torch.dtype:
    """Return `dtype` if rows can have it."""
    if isinstance(dtype, torch.dtype) and dtype in _native_call.FLOAT_TYPES:
        return dtype
    msg = f"{name} must be torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}"
    raise TypeError(msg)


def clear_padding_bits(bits: Tensor, dim: int) -> None:
    """Zero the bits beyond column `dim - 1` of every plane."""
    width = packed_width(dim)
    if dim % 8:
        bits[:, width - 1 :: width] &= (1 << dim % 8) - 1


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise if a generator cannot fill what lies on `device`."""
    if isinstance(generator, torch.Generator) and generator.device.type != device.type:
        msg = f"generator must be on the device of the embeddings, {device}, got one on {generator.device}: give one of that device"
        raise ValueError(msg)


def check_arrays(bits: Any, scale: Any, dim: int, planes: int) -> tuple[Tensor, Tensor]:
    """Return bits and scale if they are those of a table of this dim and so many planes."""
    for name, array in (("bits", bits), ("scale", scale)):
        if not isinstance(array, Tensor):
            msg = f"{name} must be a tensor, got a {type(array).__name__}"
            raise TypeError(msg)
    check_table_arrays(tuple(bits.shape), _dtype_name(bits), tuple(scale.shape), _dtype_name(scale), dim, planes)
    for name, array in (("bits", bits), ("scale", scale)):
        if not array.is_contiguous():
            msg = f"{name} must be contiguous, got strides {array.stride()} for shape {list(array.shape)}; call .contiguous()"
            raise ValueError(msg)
    if bits.device != scale.device:
        msg = f"scale must be on the device of bits, {bits.device}, got {scale.device}"
        raise ValueError(msg)
    if not bits.is_meta:
        check_padding_bits("bits", bits, dim)
    return bits, scale


def check_operator_arrays(bits: Tensor, scale: Tensor, dim: int) -> None:
    """Raise if operands of an operator are no table of `dim` columns, as the native call would: before memory for its output is taken.

    The planes follow from the width of bits, as there.
    """
    width = bits.shape[1] if bits.ndim == 2 and dim > 0 else 0
    planes = max(1, min(MAX_PLANES, width // packed_width(max(1, dim))))
    check_table_arrays(tuple(bits.shape), _dtype_name(bits), tuple(scale.shape), _dtype_name(scale), dim, planes)


def check_float_table(w: Any, packed: type[Tensor], name: str = "w") -> None:
    """Raise unless `w` is a float table, and not one of class `packed`."""
    if not isinstance(w, Tensor) or isinstance(w, packed) or w.dtype not in _native_call.FLOAT_TYPES:
        got = w.dtype if type(w) in {Tensor, torch.nn.Parameter} else f"a {type(w).__name__}"
        msg = f"{name} must be a tensor of float32, float16 or bfloat16, got {got}"
        raise TypeError(msg)
    if w.ndim != 2 or w.numel() == 0:
        msg = f"{name} must have shape [V, D] with V and D at least 1, got {list(w.shape)}"
        raise ValueError(msg)
    if w.layout != torch.strided:
        msg = f"{name} must be a dense tensor, got one of layout {w.layout}; call .to_dense()"
        raise ValueError(msg)


def _dtype_name(array: Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")


def check_params(name: str, params: Any) -> Any:
    """Return `params` if they can be the parameters of a group, else raise TypeError."""
    if isinstance(params, (str, bytes)) or not isinstance(params, Iterable):
        msg = f"{name} must be BinaryTables in a list or another iterable, got a {type(params).__name__}"
        raise TypeError(msg)
    return params
