"""What a loss must not depend on: values that get no gradient though their dtype suggests it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import get_opaque_trace_state


def call_with_constants(loss: Callable[[Any], Any], constants: Any, message: str, has_aux: bool) -> Any:
    """`loss(constants)`, which raises ValueError with `message` if its value depends on them in a way that has a derivative.

    Whether it does is seen in forward mode: there JAX leaves out what has no derivative, also in a scan, where reverse mode fills in zeros.

    Args:
        loss: returns a value, or a pair of it and something else.
        constants: a pytree of float arrays.
        message: of the error.
        has_aux: loss returns a pair.
    """
    outside = get_opaque_trace_state()

    @jax.custom_jvp
    def watch(value: Any) -> Any:
        return value

    @partial(watch.defjvp, symbolic_zeros=True)
    def watch_rule(primals: Any, tangents: Any) -> Any:
        # the rule meets the derivatives of all transformations around; those of this call are the innermost
        if get_opaque_trace_state() == outside and any(map(_is_derivative, jax.tree.leaves(tangents))):
            raise ValueError(message)
        return primals[0], tangents[0]

    def watched(constants: Any) -> tuple[Any, Any]:
        out = loss(constants)
        value, aux = out if has_aux else (out, None)
        return watch(value), aux

    value, _, aux = jax.jvp(watched, (constants,), (jax.tree.map(_direction, constants),), has_aux=True)
    return (value, aux) if has_aux else value


def _is_derivative(tangent: Any) -> bool:
    if type(tangent) is jax.custom_derivatives.SymbolicZero:
        return False
    return isinstance(tangent, jax.core.Tracer) or bool(jnp.any(tangent != 0))


def _direction(x: Array) -> Array:
    """A tangent of `x`; where its values can be seen, one in which derivatives do not cancel."""
    if isinstance(x, jax.core.Tracer):
        return x
    return x * (1 + lax.broadcasted_iota(x.dtype, x.shape, 0) % 7)
