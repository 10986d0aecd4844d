"""The param groups of a state_dict of :class:`XOR`, checked before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from dualbin.rules import from_plain, resolve, to_plain
from dualbin.torch._replicas import Replicas, check_saved_part
from dualbin.torch._step import OPTIONS, check_options, form


def checked_groups(
    saved_groups: Sequence[Mapping[str, Any]], own_groups: Sequence[Mapping[str, Any]], replicas: Replicas | None
) -> list[dict[str, Any]]:
    """Param groups with the options of `saved_groups` and the tables of `own_groups`, those of the optimizer that loads them.

    Raises:
        TypeError, ValueError: they are of another optimizer, of another version, or do not fit the tables.
    """
    sizes = [len(group["params"]) for group in own_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        msg = f"state_dict must have param groups of {sizes} parameters, as this optimizer has, got groups of {saved_sizes}"
        raise ValueError(msg)
    groups = []
    for saved, group in zip(saved_groups, own_groups, strict=True):
        if missing := [name for name in OPTIONS if name not in saved]:
            msg = f"state_dict must come from an XOR optimizer, its param_groups lack {missing}"
            raise ValueError(msg)
        kept = {name: group[name] for name in ("params", "param_names") if name in group}
        loaded = kept | copy.deepcopy({name: value for name, value in saved.items() if name != "params"})
        check_saved_part(loaded.pop("part", None), replicas)
        loaded["rule"] = from_plain(loaded["rule"])
        if isinstance(saved["rule"], Mapping) and "norm" not in saved["rule"].get("Counter", {"norm": None}):
            msg = "state_dict is of a version of dualbin that kept the planes of a Counter in the opposite order and knew no norm: "
            msg += 'write tables and state with dualbin.io.save there, and go on with import_state and Counter(norm="rms")'
            raise ValueError(msg)
        for (planes, dim), plain in loaded.pop("resolved", ()):
            if (now := resolve(loaded["rule"], planes, dim)) != from_plain(plain):
                msg = f"state_dict was saved with {plain} for tables of {planes} planes and {dim} columns, but this version's defaults "
                msg += f"make {to_plain(now)} of its rule: give the tables param groups of their own"
                raise ValueError(msg)
        check_options(loaded)
        for table in loaded["params"]:
            resolve(loaded["rule"], *form(table))
        groups.append(loaded)
    return groups
