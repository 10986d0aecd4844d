"""Tables by their path in a parameter tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

#: names along the way to a leaf; "a/b" and "a.b" are both ("a", "b")
Path = tuple[str, ...]


def split(name: object) -> Path:
    return tuple(part for part in re.split(r"[/.]", str(name)) if part)


def join(path: Path) -> str:
    return ".".join(path)


def key_path(keys: tuple[Any, ...]) -> Path:
    """The path of a leaf from the keys that `jax.tree_util` gives it, without the attribute `value` of an `nnx.Variable` around it."""
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return tuple(part for key in keys for part in split(_name(key)))


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool]) -> tuple[dict[Path, int], list[Any], Any]:
    """Flatten `tree`.

    Returns:
        The position of every leaf for which `is_leaf` holds, by path; all leaves; the tree definition.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    found: dict[Path, int] = {}
    for position, (keys, leaf) in enumerate(flat):
        if is_leaf(leaf):
            path = key_path(keys)
            if path in found:
                msg = f"two tables have the path {join(path)!r}: rename one of them"
                raise ValueError(msg)
            found[path] = position
    return found, [leaf for _, leaf in flat], treedef


def by_path(values: Any, paths: Mapping[Path, int], argument: str, *, every: bool = True) -> dict[Path, Any]:
    """Sort what a user gave for each table by path.

    Args:
        values: dicts and sequences that mirror the parameters, with keys such as "emb" or "block/emb" or "block.emb", down to one value for
            each table; for parameters that are a table, the value itself.
        paths: the tables.
        argument: name of the argument, for messages.
        every: every table must be named.

    None is allowed anywhere, so that a tree of the same structure as the parameters will do.

    Raises:
        ValueError: a path leads to no table, is given twice, or a table is left out.
    """
    found: dict[Path, Any] = {}
    _collect(values, (), paths, argument, found)
    missing = [path for path in paths if path not in found]
    if missing and every:
        msg = f"{argument} does not name the tables {_list(missing)}; give None for a table without lookups"
        raise ValueError(msg)
    return found


def _collect(value: Any, path: Path, paths: Mapping[Path, int], argument: str, found: dict[Path, Any]) -> None:
    if path in paths:
        if path in found:
            msg = f"{argument} names the table {join(path)!r} twice"
            raise ValueError(msg)
        found[path] = value
        return
    if value is None:
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple) and path in {known[: len(path)] for known in paths}:
        items = list(enumerate(value))
    else:
        given = f"names {join(path)!r}, which is no table" if path else f"must be a dict by path of the table, got {type(value).__name__}"
        msg = f"{argument} {given}; tables are {_list(paths)}"
        raise ValueError(msg)
    for key, item in items:
        _collect(item, path + split(key), paths, argument, found)


def _list(paths: Any) -> str:
    return ", ".join(repr(join(path)) for path in paths) or "none"


def _name(key: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
