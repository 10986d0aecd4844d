"""Tables in GGUF files, as llama.cpp reads them: one plane is its type `Q1_0`, two to four planes are its type `Q4_1`.

`Q1_0` has blocks of 128 weights: a scale d in float16, and 16 bytes of signs with the bits where a plane has them. `Q4_1` has blocks of 32:
d and a minimum m in float16, and a number q of four bits a weight, whose value is `d * q + m`; byte j holds those of the weights j and
j + 16. Every block of a row has the scale of the row, so nothing but the rounding of d and m is lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dualbin._checks import check_mapping
from dualbin._replace_file import replace_file
from dualbin._schema import packed_width
from dualbin._table_arrays import Table, checked_path, checked_table, table_of

_ONE_PLANE, _MORE = "Q1_0", "Q4_1"
_BLOCK = {_ONE_PLANE: 128, _MORE: 32}  #: weights
_HEAD = {_ONE_PLANE: 2, _MORE: 4}  #: bytes before those of the weights
_MAX_PLANES = 4
_PIECE = 1 << 22  #: weights that are unpacked at a time

_HALF = np.dtype("<f2")


def to_gguf(target: Any, tables: Mapping[str, Any]) -> None:
    """Write tables as tensors of a GGUF file. Needs the package gguf: `pip install gguf`.

    Args:
        target: the file to write, which has these tensors alone and appears when it is complete; or a `gguf.GGUFWriter`, to which they
            are added, as to one that writes the rest of a model.
        tables: name of the tensor, such as "token_embd.weight", -> table, as in :func:`dualbin.io.save`: of one plane, D a multiple of 128,
            or of two to four, D a multiple of 32.

    Raises:
        ImportError: gguf is not installed.
        TypeError: target is no path, tables is no dict, or a value of it no table.
        ValueError: a table has other planes or columns, or a scale that float16 cannot hold.
        OSError: the file cannot be written.
    """
    gguf = _gguf("to_gguf")
    is_writer = isinstance(target, gguf.GGUFWriter)
    path = None if is_writer else checked_path(target, "target, if no gguf.GGUFWriter,")
    check_mapping("tables", tables, "names to tables")
    packed = {name: _packed(f"tables[{name!r}]", table_of(f"tables[{name!r}]", name, source)) for name, source in tables.items()}

    def add(writer: Any) -> None:
        for name, (kind, data) in packed.items():
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def write(new: Path) -> None:
        writer = gguf.GGUFWriter(new, arch="dualbin")
        try:
            add(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    if path is None:
        add(target)
    else:
        replace_file(path, write)


def from_gguf(path: str | os.PathLike[str], names: list[str] | None = None) -> dict[str, Table]:
    """Read tables that :func:`to_gguf` wrote, alone or into a model's file. Needs the package gguf: `pip install gguf`.

    Args:
        path: the file.
        names: the tensors to read; None: all matrices of the types `Q1_0` and `Q4_1`.

    Returns:
        The tables by name, with the bits that were written and the scales as float16 has them.

    Raises:
        ImportError: gguf is not installed.
        TypeError: path is none, or names is no list of str.
        ValueError: the file is no GGUF file, lacks a tensor, or has one that is no packed table: of another type, or quantised by others,
            with blocks of a row that have scales of their own.
        FileNotFoundError: there is no such file.
    """
    gguf = _gguf("from_gguf")
    path = checked_path(path)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        msg = f"names must be a list of str, or None for all tables, got {names!r}"
        raise TypeError(msg)
    with path.open("rb"):  # to say first that there is none
        pass
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        msg = f"{path}: not a complete GGUF file: {error}"
        raise ValueError(msg) from error
    if names is None:
        names = [name for name, tensor in tensors.items() if tensor.tensor_type.name in _BLOCK and len(tensor.shape) == 2]
    tables = {}
    for name in names:
        if name not in tensors:
            msg = f"{path}: there is no tensor {name!r}, these are {sorted(tensors)}"
            raise ValueError(msg)
        tables[name] = _unpacked(f"{path}: {name}", tensors[name])
    return tables


def _gguf(function: str) -> ModuleType:
    try:
        import gguf  # noqa: PLC0415  (optional)
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        msg = f"dualbin.io.{function} needs the package gguf: pip install 'gguf>=0.19'"
        raise ImportError(msg) from error
    return gguf


def _packed(where: str, table: Table) -> tuple[str, np.ndarray]:
    """The name of the type, and uint8 `[V, bytes of a row]`."""
    rows, dim, planes = len(table.bits), table.dim, table.planes
    if planes > _MAX_PLANES:
        msg = (
            f"{where} must have 1 to {_MAX_PLANES} planes, for which GGUF has types, got {planes}: with_planes({_MAX_PLANES}) makes it one"
        )
        raise ValueError(msg)
    kind = _ONE_PLANE if planes == 1 else _MORE
    block, head = _BLOCK[kind], _HEAD[kind]
    if dim % block:
        msg = f"{where} must have a multiple of {block} columns, the block of {kind}, got {dim}"
        raise ValueError(msg)
    wanted = table.scale if planes == 1 else table.scale * np.float32(2.0 ** (2 - planes))  # d, [V, 1]
    with np.errstate(over="ignore", under="ignore"):
        scale = wanted.astype(_HALF)
        heads = scale if planes == 1 else np.concatenate([scale, _minimum(scale, planes)], axis=1)
    wrong = ~np.isfinite(heads).all(axis=1) | ((scale == 0) != (wanted == 0))[:, 0]
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        msg = f"{where}: float16, in which GGUF has scales, cannot hold that of row {row}, {float(table.scale[row, 0]):g}"
        raise ValueError(msg)
    blocks = np.empty((rows, dim // block, head + block * (1 if planes == 1 else 4) // 8), np.uint8)
    blocks[:, :, :head] = np.ascontiguousarray(heads).view(np.uint8)[:, None]
    if planes == 1:
        blocks[:, :, head:] = table.bits.reshape(rows, dim // block, -1)
    else:
        for part in _pieces(rows, dim):
            low_high = _levels(table.bits[part], planes).reshape(-1, dim // block, 2, block // 2)
            blocks[part, :, head:] = low_high[:, :, 0] | low_high[:, :, 1] << 4
    return kind, blocks.reshape(rows, -1)


def _unpacked(where: str, tensor: Any) -> Table:
    kind = tensor.tensor_type.name
    if kind not in _BLOCK or len(tensor.shape) != 2:
        msg = (
            f"{where} must be a matrix of the type {_ONE_PLANE} or {_MORE}, got {kind} of shape {[int(n) for n in reversed(tensor.shape)]}"
        )
        raise ValueError(msg)
    dim, rows = (int(size) for size in tensor.shape)
    block, head = _BLOCK[kind], _HEAD[kind]
    blocks = np.asarray(tensor.data).reshape(rows, dim // block, -1)
    if (blocks[:, :, :head] != blocks[:, :1, :head]).any():
        msg = f"{where} is no packed table: blocks of one row have scales of their own. BinaryTable.from_float packs its values"
        raise ValueError(msg)
    heads = np.ascontiguousarray(blocks[:, 0, :head]).view(_HALF)
    scale, planes = heads[:, :1].astype(np.float32), 1
    if kind == _MORE:
        # where all rows are padding, as many as there can be
        planes = next((k for k in range(_MAX_PLANES, 1, -1) if (_minimum(heads[:, :1], k) == heads[:, 1:]).all()), 0)
        if not planes or not np.isfinite(scale).all():
            msg = f"{where} is no packed table: its levels do not lie evenly around 0. BinaryTable.from_float packs its values"
            raise ValueError(msg)
        bits = np.empty((rows, planes * packed_width(dim)), np.uint8)
        for part in _pieces(rows, dim):
            low_high = blocks[part, :, head:]
            levels = np.stack([low_high & 15, low_high >> 4], axis=2).reshape(-1, dim)
            if (levels >> planes).any():
                msg = f"{where} is no packed table: it has levels beyond those of {planes} planes"
                raise ValueError(msg)
            bits[part] = _planes(levels, planes)
        scale *= np.float32(2.0 ** (planes - 2))
    else:
        bits = np.ascontiguousarray(blocks[:, :, head:]).reshape(rows, -1)
    return checked_table(where, bits, scale, dim, planes)


def _minimum(scale: np.ndarray, planes: int) -> np.ndarray:
    """m of `Q4_1` from d, both float16 `[V, 1]`: the lowest level is as far below 0 as the highest is above. Adding 0 makes -0 a 0."""
    return (scale.astype(np.float32) * np.float32((1 - 2**planes) / 2) + np.float32(0)).astype(_HALF)


def _levels(bits: np.ndarray, planes: int) -> np.ndarray:
    """q of every weight, from 0, the lowest value, on: uint8 `[rows, D]`, D a multiple of 8."""
    unpacked = np.unpackbits(bits.reshape(len(bits), planes, -1), axis=2, bitorder="little")
    magnitude: Any = np.zeros_like(unpacked[:, 0])
    for plane in range(1, planes):
        magnitude = magnitude << 1 | unpacked[:, plane]
    half = np.uint8(1 << planes - 1)
    return np.where(unpacked[:, 0] == 1, half + magnitude, half - 1 - magnitude)


def _planes(levels: np.ndarray, planes: int) -> np.ndarray:
    """The inverse."""
    half = np.uint8(1 << planes - 1)
    sign = levels >= half
    magnitude = np.where(sign, levels - half, half - 1 - levels)
    digits = [sign, *(magnitude >> plane & 1 for plane in range(planes - 2, -1, -1))]
    return np.packbits(np.stack(digits, axis=1), axis=2, bitorder="little").reshape(len(levels), -1)


def _pieces(rows: int, dim: int) -> Iterator[slice]:
    step = max(1, _PIECE // dim)
    return (slice(start, start + step) for start in range(0, rows, step))
