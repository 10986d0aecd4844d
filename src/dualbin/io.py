"""Tables and optimizer state on disk: one safetensors file that both frontends read and write.

Keys are `<name>.bits` (uint8 `[V, planes * B]`), `<name>.scale` (float32 `[V, 1]`) and, with optimizer state, `<name>.<array>` for the
names that `docs/design.md` lists; integers of the state are int64 arrays without dimensions. Metadata: `format`, `format_version`,
`<name>.dim` and `<name>.planes`, and `<name>.rule` where the rule that made the state is known. Files of version 1, which have neither
planes nor rules, and the planes of a counter in the opposite order, are read, too.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dualbin._checks import check_mapping
from dualbin._gguf import from_gguf, to_gguf
from dualbin._replace_file import replace_file
from dualbin._rule_text import check_rule_made, read_rule, rule_text
from dualbin._schema import MAX_PLANES, RECORD, STATE_ARRAYS, packed_width
from dualbin._state_checks import ExportedState, check_exported, check_state_planes
from dualbin._table_arrays import Table, checked_path, checked_table, table_of, to_numpy
from dualbin.rules import resolve

FORMAT = "dualbin"
FORMAT_VERSION = "2"
_VERSIONS = ("1", FORMAT_VERSION)

_TABLE_ARRAYS = ("bits", "scale")

_MAX_DIGITS = 19  #: of a number in the metadata: those of an int64

#: dtype, number of dimensions and whether the first one is V, for the arrays that `docs/design.md` names
_STATE_ARRAYS: dict[str, tuple[str, int, bool]] = {
    **{name: (array.dtype, 1 if array.per_row == "one" else 2, True) for name, array in STATE_ARRAYS.items() if name != "record"},
    **{name: (dtype, 1, True) for name, dtype in RECORD.items()},
    "step": ("int64", 0, False),
    "pending_ids": ("int64", 1, False),
    "pending_rows": ("float32", 2, False),
    "pending_steps": ("int64", 0, False),
}

State = dict[str, ExportedState]


def save(path: str | os.PathLike[str], tables: Mapping[str, Any], state: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write tables, and optionally their optimizer state, to a safetensors file.

    The file appears under `path` only when it is complete and on the disk; until then a file that was there stays as it was. Its mode
    stays, and so does a symbolic link, whose target is replaced; a new file has the mode that the umask says.

    Args:
        path: the file to write.
        tables: name -> anything with `.bits`, `.scale`, `.dim` and, if it has more than one, `.planes`: a table of either frontend or a
            :class:`Table`.
        state: name -> state arrays by name (see `docs/design.md`); every name must be one of `tables`. What `export_state` returned also
            knows the rule, which is written as it is resolved for the table.

    Raises:
        TypeError: path is none, tables or state are no dicts, or a value of `tables` is no table.
        ValueError: an array has the wrong dtype, shape or contents; the message names it.
        OSError: the file cannot be written.
    """
    path = checked_path(path)
    check_mapping("tables", tables, "names to tables")
    check_mapping("state", {} if state is None else state, "names to states")
    arrays: dict[str, np.ndarray] = {}
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    for name, source in tables.items():
        table = table_of(f"tables[{name!r}]", name, source)
        arrays[f"{name}.bits"], arrays[f"{name}.scale"] = table.bits, table.scale
        metadata |= {f"{name}.dim": str(table.dim), f"{name}.planes": str(table.planes)}
    for name, entries in (state or {}).items():
        if name not in tables:
            msg = f"state[{name!r}] belongs to no table; tables are {sorted(tables)}"
            raise ValueError(msg)
        table = Table(arrays[f"{name}.bits"], arrays[f"{name}.scale"], int(metadata[f"{name}.dim"]), int(metadata[f"{name}.planes"]))
        check_mapping(f"state[{name!r}]", entries, "names to arrays")
        check_state_planes(f"state[{name!r}]", entries, table.planes)
        for key, value in entries.items():
            where = f"state[{name!r}][{key!r}]"
            arrays[f"{name}.{key}"] = _state_array(where, key, to_numpy(value, where), table)
        written = {key: arrays[f"{name}.{key}"] for key in entries}
        check_exported(f"state[{name!r}]", written, table.bits.shape[0], table.dim)
        if (rule := getattr(entries, "rule", None)) is not None:
            rule = resolve(rule, table.planes, table.dim)
            metadata[f"{name}.rule"] = text = rule_text(rule)
            read_rule(f"state[{name!r}].rule", text, table.planes, table.dim)
            check_rule_made(f"state[{name!r}]", rule, written, table.bits.shape[0], table.dim, table.planes)
    _write(path, arrays, metadata)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Table], State]:
    """Read a file that :func:`save` wrote.

    Returns:
        The tables by name, and the state arrays by table name and array name (integers such as `step` as int). A table saved without state
        has no entry in the second dict. A state knows the planes of its table, and as `state[name].rule` the rule that made it, or None
        where the file does not tell; `import_state` refuses it for others.

    Raises:
        TypeError: path is none.
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: the file is damaged, is not a dualbin file, is of another version, or lacks a key; the message names file and key.
    """
    path = checked_path(path)
    arrays, metadata = _read(path)
    tables: dict[str, Table] = {}
    facts, texts = _facts(path, metadata)
    for name, sizes in facts.items():
        for array in _TABLE_ARRAYS:
            if f"{name}.{array}" not in arrays:
                msg = f"{path}: key '{name}.{array}' is missing, expected with metadata '{name}.dim'"
                raise ValueError(msg)
        tables[name] = checked_table(f"{path}: {name}", arrays.pop(f"{name}.bits"), arrays.pop(f"{name}.scale"), **sizes)
    state: State = {}
    for key, value in arrays.items():
        name, _, array = key.rpartition(".")
        if name not in tables:
            msg = f"{path}: key {key!r} belongs to no table, expected metadata '{name}.dim'"
            raise ValueError(msg)
        checked = _state_array(f"{path}: {key}", array, value, tables[name])
        if array == "counter" and metadata["format_version"] == "1":
            checked = _turned(checked, tables[name].dim)
        state.setdefault(name, ExportedState({}, tables[name].planes))[array] = checked if checked.ndim else checked.item()
    for name, entries in state.items():
        check_exported(f"{path}: {name}", entries, tables[name].bits.shape[0], tables[name].dim)
    for name, text in texts.items():
        key, table = f"metadata '{name}.rule'", tables[name]
        if name not in state:
            msg = f"{path}: {key} belongs to no state, expected arrays of the state of {name!r}"
            raise ValueError(msg)
        state[name].rule = rule = read_rule(f"{path}: {key}", text, table.planes, table.dim)
        check_rule_made(f"{path}: {name}", rule, state[name], table.bits.shape[0], table.dim, table.planes)
    return tables, state


def _facts(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """dim and planes of every table in the metadata of a file, and the texts of the rules that it has."""
    fields = ("dim",) if metadata["format_version"] == "1" else ("dim", "planes")
    sizes: dict[str, dict[str, int]] = {}
    texts: dict[str, str] = {}
    for key, text in metadata.items():
        if key in {"format", "format_version"}:
            continue
        name, _, field = key.rpartition(".")
        if name and field == "rule" and metadata["format_version"] != "1":
            texts[name] = text
            sizes.setdefault(name, {})
            continue
        if not name or field not in fields or not text.isascii() or not text.isdecimal() or len(text) > _MAX_DIGITS:
            allowed = " or ".join(f"'<table>.{field}'" for field in fields)
            msg = f"{path}: metadata {key!r} is {text!r}, expected {allowed} with an integer"
            raise ValueError(msg)
        sizes.setdefault(name, {})[field] = int(text)
    for name, found in sizes.items():
        for field in fields:
            if field not in found:
                msg = f"{path}: metadata '{name}.{field}' is missing, expected with every table"
                raise ValueError(msg)
    return sizes, texts


def _turned(counter: np.ndarray, dim: int) -> np.ndarray:
    """A counter of version 1, which wrote its least significant plane first, with the most significant first."""
    width = packed_width(dim)
    return np.ascontiguousarray(counter.reshape(len(counter), -1, width)[:, ::-1]).reshape(counter.shape)


def _state_array(where: str, key: object, value: np.ndarray, table: Table) -> np.ndarray:
    if key == "record":
        msg = f"{where} is how a state lies in memory: give what export_state returns, which has {', '.join(RECORD)}"
        raise ValueError(msg)
    if not isinstance(key, str) or not key or "." in key or key in _TABLE_ARRAYS:
        msg = f"{where}: the name of a state array must be a str without a dot, other than bits and scale, got {key!r}"
        raise ValueError(msg)
    if key not in _STATE_ARRAYS:
        msg = f"{where} is no array of a state, these are {', '.join(_STATE_ARRAYS)}"
        raise ValueError(msg)
    (dtype, ndim, by_row), rows = _STATE_ARRAYS[key], table.bits.shape[0]
    if value.dtype.name != dtype or value.ndim != ndim or (by_row and value.shape[0] != rows):
        first = f" and {rows} rows" if by_row else ""
        msg = f"{where} must be {dtype} with {ndim} dimensions{first}, got {value.dtype.name} of shape {list(value.shape)}"
        raise ValueError(msg)
    width, most = packed_width(table.dim), MAX_PLANES - table.planes
    if key == "counter" and (value.shape[1] % width or value.shape[1] > most * width):
        msg = f"{where} must have rows of a multiple of {width} bytes, at most {most * width}, for dim {table.dim} and "
        msg += f"planes={table.planes}, got {value.shape[1]}"
        raise ValueError(msg)
    return value


def _write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    try:
        replace_file(path, lambda new: save_file(arrays, new, metadata))
    except SafetensorError as error:
        # safetensors reports a disk that is full in its own words
        msg = f"{path}: cannot be written: {error}"
        raise OSError(msg) from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if path.is_dir():  # safetensors would not name it
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118  (not a dict)
    except (SafetensorError, AttributeError) as error:  # the latter for a dtype that NumPy has not
        msg = f"{path}: not a complete safetensors file: {error}"
        raise ValueError(msg) from error


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        msg = f"{path}: metadata 'format' is {metadata.get('format')!r}, expected {FORMAT!r}"
        raise ValueError(msg)
    if metadata.get("format_version") not in _VERSIONS:
        msg = f"{path}: metadata 'format_version' is {metadata.get('format_version')!r}, expected {' or '.join(map(repr, _VERSIONS))}"
        raise ValueError(msg)


__all__ = ["FORMAT", "FORMAT_VERSION", "State", "Table", "from_gguf", "load", "save", "to_gguf"]
