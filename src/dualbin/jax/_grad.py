"""`value_and_grad`: like `jax.value_and_grad`, with a :class:`RowGrad` for every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import get_opaque_trace_state

from dualbin._checks import check_int
from dualbin.jax import _paths
from dualbin.jax._ids import row_dtype
from dualbin.jax._lookup import activate, mark
from dualbin.jax._table import BinaryTable, all_rows, check_table, is_table, make_table
from dualbin.jax._updates import RowGrad

Tables = Mapping[_paths.Path, BinaryTable]


def value_and_grad(
    loss_fn: Callable[..., Any], *, ids: Callable[..., Any] | None = None, capacity: int | None = None, has_aux: bool = False
) -> Callable[..., Any]:
    """The value of a loss and its gradient with respect to its first argument, a pytree with tables in it.

    A step has to know the rows it may use before it is differentiated. There are three ways:

    * `ids=lambda params, *args: {"emb": batch["ids"]}` names them by the table's path. The fastest; works with every transformation.
    * neither `ids` nor `capacity`: the loss is traced once more and its lookups are recorded. Works for lookups that are not inside a jit,
      scan, cond, vmap, checkpoint or shard_map of the loss (an outer jit is fine), and is free under an outer jit.
    * `capacity` alone: a first backward pass, of which XLA keeps only what belongs to the ids, marks the rows of every lookup, anywhere.
      Needs float32 `[V]` for a moment.

    Args:
        loss_fn: `loss_fn(params, *args, **kwargs)`, returns a scalar, or `(scalar, aux)`.
        ids: called with the loss's arguments; returns the ids of each table: a dict that mirrors params (`{"block": {"emb": ids}}`), or one
            with paths for keys ("block/emb" or "block.emb"), or the ids themselves where params is a table. A table may have a pytree of
            arrays, or None for no lookups.
        capacity: the most distinct rows of a table in a step.
        has_aux: the loss returns `(scalar, aux)`.

    Returns:
        A function with the arguments of `loss_fn` that returns `(value, grads)`; grads is the tree of params with a :class:`RowGrad` for
        each table. A declared row that no lookup used counts as a row with a zero gradient. Check :meth:`RowGrad.missed` while developing.

    Raises:
        TypeError, ValueError: an argument is wrong; when called: `ids` names no table, leaves one out or has another dtype, or the rows
            cannot be found by tracing.
    """
    if not callable(loss_fn):
        msg = f"loss_fn must be callable, got {type(loss_fn).__name__}"
        raise TypeError(msg)
    if ids is not None and not callable(ids):
        example = "lambda params, batch: {'emb': batch['ids']}"
        msg = f"ids must be a function of the loss's arguments, such as {example}, got {type(ids).__name__}"
        raise TypeError(msg)
    if capacity is not None:
        check_int("capacity", capacity, low=1)

    @wraps(loss_fn)
    def value_and_grads(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        places, leaves, treedef = _paths.named_leaves(params, is_table)
        tables = {path: check_table(leaves[place], f"params table {_paths.join(path)!r}") for path, place in places.items()}

        def loss_with(replaced: Tables, dense: list[Any]) -> Any:
            rest = iter(dense)
            swapped = {places[path]: table for path, table in replaced.items()}
            return loss_fn(treedef.unflatten([swapped[i] if i in swapped else next(rest) for i in range(len(leaves))]), *args, **kwargs)

        taken = set(places.values())
        dense = [leaf for i, leaf in enumerate(leaves) if i not in taken]
        if ids is not None:
            active = _declared(tables, ids(params, *args, **kwargs), capacity)
        elif capacity is not None:
            active = _marked(tables, lambda marked: loss_with(marked, dense), has_aux, capacity)
        else:
            active = _recorded(tables, lambda recording: loss_with(recording, dense))

        def loss_of(taps: dict[_paths.Path, Array], dense: list[Any]) -> Any:
            return loss_with({path: _with_tap(table, taps[path]) for path, table in active.items()}, dense)

        taps = {path: table.tap for path, table in active.items()}
        value, (sums, dense_grads) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=has_aux)(taps, dense)
        grads = iter(dense_grads)
        by_place = {places[path]: _row_grad(table, sums[path]) for path, table in active.items()}
        return value, treedef.unflatten([by_place[i] if i in by_place else next(grads) for i in range(len(leaves))])

    return value_and_grads


def grad(loss_fn: Callable[..., Any], *, ids: Any = None, capacity: int | None = None, has_aux: bool = False) -> Callable[..., Any]:
    """Like :func:`value_and_grad`, but returns the gradients alone, or `(grads, aux)`."""
    both = value_and_grad(loss_fn, ids=ids, capacity=capacity, has_aux=has_aux)

    @wraps(loss_fn)
    def grads(params: Any, *args: Any, **kwargs: Any) -> Any:
        value, result = both(params, *args, **kwargs)
        return (result, value[1]) if has_aux else result

    return grads


def _row_grad(table: BinaryTable, sums: Array) -> RowGrad:
    assert table.row_ids is not None  # it is active
    return RowGrad(table.row_ids, sums, all_rows(table))


def _with_tap(table: BinaryTable, tap: Array) -> BinaryTable:
    return make_table(table.bits, table.scale, table.row_ids, tap, dim=table.dim, axis=table.axis)


def _declared(tables: Tables, given: Any, capacity: int | None) -> dict[_paths.Path, BinaryTable]:
    by_path = _paths.by_path(given, {path: 0 for path in tables}, "ids")
    active = {}
    for path, table in tables.items():
        try:
            active[path] = activate(table, by_path[path], capacity=capacity)
        except TypeError as error:
            msg = f"ids of the table {_paths.join(path)!r}: {error}"
            raise TypeError(msg) from None
    return active


def _recorded(tables: Tables, trace: Callable[[Tables], Any]) -> dict[_paths.Path, BinaryTable]:
    """Trace the loss and activate each table with the ids of its lookups."""
    outside = get_opaque_trace_state()
    seen: dict[_paths.Path, list[Array]] = {path: [] for path in tables}

    def recorder(path: _paths.Path) -> Callable[[Array], None]:
        def record(ids: Array) -> None:
            if get_opaque_trace_state() != outside:
                msg = (
                    f"the rows of the table {_paths.join(path)!r} cannot be found: this lookup is inside a jit, scan, cond, vmap, "
                    "checkpoint or shard_map of the loss. Pass value_and_grad(..., ids=lambda params, *args: {path: ids}) or capacity="
                )
                raise ValueError(msg)
            seen[path].append(ids)

        return record

    trace(
        {
            path: make_table(table.bits, table.scale, dim=table.dim, axis=table.axis, recorder=recorder(path))
            for path, table in tables.items()
        }
    )
    return {path: activate(table, seen[path]) for path, table in tables.items()}


def _marked(tables: Tables, run: Callable[[Tables], Any], has_aux: bool, capacity: int) -> dict[_paths.Path, BinaryTable]:
    """Find the rows of each table by the gradient of the loss with respect to marks."""

    def marked_loss(marks: dict[_paths.Path, Array]) -> Any:
        out = run({path: mark(table, marks[path]) for path, table in tables.items()})
        return out[0] if has_aux else out

    marks = jax.grad(marked_loss)({path: jnp.zeros((all_rows(table),), jnp.float32) for path, table in tables.items()})
    active = {}
    for path, table in tables.items():
        rows = all_rows(table)
        (used,) = jnp.nonzero(marks[path], size=min(capacity, rows), fill_value=rows)
        active[path] = activate(table, used.astype(row_dtype(rows)))
    return active
