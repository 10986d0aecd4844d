"""What `nnx.Variable`s hold. They are known by what they can do: flax is not imported."""

from __future__ import annotations

from typing import Any

import jax


def is_variable(x: object) -> bool:
    return hasattr(x, "get_value") and hasattr(x, "get_metadata")


def without_variables(tree: Any) -> Any:
    """The tree with the value of every `nnx.Variable` in its place."""
    return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable)
