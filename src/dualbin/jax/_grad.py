"""`value_and_grad`: like `jax.value_and_grad`, with a :class:`RowGrad` for every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import get_opaque_trace_state

from dualbin._checks import check_bool, check_int
from dualbin.jax import _ops, _paths, _slots
from dualbin.jax._active import declare
from dualbin.jax._constants import call_with_constants
from dualbin.jax._ids import row_dtype
from dualbin.jax._link import Link, Size, is_active, marked, recording, running_loss
from dualbin.jax._rowgrad import RowGrad, in_place_of
from dualbin.jax._stack import over_members, stack_axes
from dualbin.jax._table import BinaryTable, all_rows, check_table, is_table, link_of, with_link

_NO_GRADIENT = (
    "the loss depends on the scales or the leaves of the table {}, for which there is no gradient: put a penalty on looked-up rows, "
    "table[ids], or take jax.lax.stop_gradient of what is a constant"
)
_NESTED = (
    "the table {!r} is already part of a loss that is being differentiated: take the inner gradient with jax.grad, with respect to the "
    "other parameters, or make the table a constant: BinaryTable(table.bits, table.scale, table.dim, table.planes)"
)

Tables = Mapping[_paths.Path, BinaryTable]
#: the declared rows of each table
Declared = Mapping[_paths.Path, Array]


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    ids: Callable[..., Any] | None = None,
    capacity: int | None = None,
    has_aux: bool = False,
    checked: bool = False,
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
        checked: fail if a lookup uses a row that was not declared: a RuntimeError, under jit a `jax.errors.JaxRuntimeError` of the compiled
            call. It calls back to Python at every step: for development.

    Returns:
        A function with the arguments of `loss_fn` that returns `(value, grads)`; grads is the tree of params with a :class:`RowGrad` for
        each table. A declared row that no lookup used counts as a row with a zero gradient. Check :meth:`RowGrad.missed` while developing.

    Raises:
        TypeError, ValueError: an argument is wrong; when called: `ids` names no table, leaves one out or has another dtype, or the rows
            cannot be found by tracing.
    """
    _check_arguments(loss_fn, ids, capacity)
    check_bool("has_aux", has_aux)
    check_bool("checked", checked)

    @wraps(loss_fn)
    def value_and_grads(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = _Model(loss_fn, params)
        declared = _declare_all(model, ids, capacity, has_aux, args, kwargs)
        run = jax.value_and_grad(model.linked_loss(declared, has_aux), argnums=(0, 1), has_aux=has_aux)
        value, (sums, dense) = run(model.taps(declared), model.dense, args, kwargs)
        return value, model.gradients(declared, sums, dense, checked)

    return value_and_grads


def accumulate(
    loss_fn: Callable[..., Any],
    micro_batches: int,
    *,
    ids: Callable[..., Any] | None = None,
    capacity: int | None = None,
    checked: bool = False,
) -> Callable[..., Any]:
    """:func:`value_and_grad` in `micro_batches` parts of a batch, one after the other, with the activations of one in memory.

    Value and gradients are the means over the parts, which are those of the whole batch where the loss is a mean over it. The rows of the
    whole batch are declared once.

    Args:
        loss_fn: `loss_fn(params, *args, **kwargs)`, returns a scalar.
        micro_batches: K, at least 1. Every array of args is cut along its first axis, whose length K has to divide; kwargs are not cut.
        ids, capacity, checked: as for :func:`value_and_grad`; `ids` is called with the whole batch, and without it the loss is traced with
            the whole batch.

    Returns:
        A function with the arguments of `loss_fn` that returns `(value, grads)`.

    Raises:
        TypeError, ValueError: as for :func:`value_and_grad`; when called: a first axis cannot be cut.
    """
    _check_arguments(loss_fn, ids, capacity)
    check_bool("checked", checked)
    parts = check_int("micro_batches", micro_batches, low=1)

    @wraps(loss_fn)
    def value_and_grads(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = _Model(loss_fn, params)
        cut = jax.tree.map(lambda x: _cut(x, parts), args)
        declared = _declare_all(model, ids, capacity, False, args, kwargs)
        run = jax.value_and_grad(model.linked_loss(declared), argnums=(0, 1))
        taps = model.taps(declared)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, run(taps, model.dense, part, kwargs)), None

        first, rest = jax.tree.map(lambda x: x[0], cut), jax.tree.map(lambda x: x[1:], cut)
        total, _ = lax.scan(add, run(taps, model.dense, first, kwargs), rest)
        value, (sums, dense) = jax.tree.map(lambda x: x / parts, total)
        return value, model.gradients(declared, sums, dense, checked)

    return value_and_grads


def _cut(x: Any, parts: int) -> Array:
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] % parts:
        msg = f"micro_batches must divide the first axis of every array, got {parts} and an array of shape {list(x.shape)}"
        raise ValueError(msg)
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def grad(
    loss_fn: Callable[..., Any], *, ids: Any = None, capacity: int | None = None, has_aux: bool = False, checked: bool = False
) -> Callable[..., Any]:
    """Like :func:`value_and_grad`, but returns the gradients alone, or `(grads, aux)`."""
    both = value_and_grad(loss_fn, ids=ids, capacity=capacity, has_aux=has_aux, checked=checked)

    @wraps(loss_fn)
    def grads(params: Any, *args: Any, **kwargs: Any) -> Any:
        value, result = both(params, *args, **kwargs)
        return (result, value[1]) if has_aux else result

    return grads


def _check_arguments(loss_fn: Any, ids: Any, capacity: int | None) -> None:
    if not callable(loss_fn):
        msg = f"loss_fn must be callable, got {type(loss_fn).__name__}"
        raise TypeError(msg)
    if ids is not None and not callable(ids):
        example = "lambda params, batch: {'emb': batch['ids']}"
        msg = f"ids must be a function of the loss's arguments, such as {example}, got {type(ids).__name__}"
        raise TypeError(msg)
    if capacity is not None:
        check_int("capacity", capacity, low=1)


class _Model:
    """A loss and its parameters, taken apart into tables and the rest."""

    def __init__(self, loss_fn: Callable[..., Any], params: Any) -> None:
        self.loss_fn = loss_fn
        self.places, self.leaves, self.treedef = _paths.named_leaves(params, is_table)
        self.tables = {
            path: check_table(self.leaves[place], f"params table {_paths.join(path)!r}", stack=True) for path, place in self.places.items()
        }
        for path, table in self.tables.items():
            if is_active(link_of(table)):
                raise NotImplementedError(_NESTED.format(_paths.join(path)))
        taken = set(self.places.values())
        self.dense = [leaf for i, leaf in enumerate(self.leaves) if i not in taken]
        #: ids, or their shape, of tables whose rows are declared for one lookup: see `running_loss`
        self.whole: dict[_paths.Path, Any] = {}

    def rebuild(self, by_path: Mapping[_paths.Path, Any], dense: list[Any]) -> Any:
        """The tree of params with something else for its tables and its other leaves."""
        by_place, rest = {self.places[path]: value for path, value in by_path.items()}, iter(dense)
        return self.treedef.unflatten([by_place[i] if i in by_place else next(rest) for i in range(len(self.leaves))])

    def loss(self, links: Mapping[_paths.Path, Link], dense: list[Any], args: Any, kwargs: Any, scales: Mapping[_paths.Path, Array]) -> Any:
        tables = {path: with_link(self.tables[path], link, scales[path]) for path, link in links.items()}
        whole = [(link.slots, self.whole[path]) for path, link in links.items() if path in self.whole]
        with running_loss({self.tables[path].shape: link for path, link in links.items()}, whole):
            return self.loss_fn(self.rebuild(tables, dense), *args, **kwargs)

    def taps(self, declared: Declared) -> dict[_paths.Path, Array]:
        return {path: jnp.zeros((*ids.shape, self.tables[path].dim), jnp.float32) for path, ids in declared.items()}

    @property
    def scales(self) -> dict[_paths.Path, Array]:
        return {path: table.scale for path, table in self.tables.items()}

    def linked_loss(self, declared: Declared, has_aux: bool = False) -> Callable[..., Any]:
        """The loss as a function of the taps of the tables and of the other leaves."""
        slots = {path: _slots.encode(ids) for path, ids in declared.items()}
        message = _NO_GRADIENT.format(" or ".join(repr(_paths.join(path)) for path in self.tables))

        def loss(taps: Mapping[_paths.Path, Array], dense: list[Any], args: Any, kwargs: Any) -> Any:
            links = {path: Link(slots[path], tap) for path, tap in taps.items()}
            run = partial(self.loss, links, dense, args, kwargs)
            return call_with_constants(run, self.scales, message, has_aux)

        return loss

    def gradients(self, declared: Declared, sums: Mapping[_paths.Path, Array], dense: list[Any], checked: bool) -> Any:
        grads = {path: RowGrad(ids, sums[path], all_rows(self.tables[path])) for path, ids in declared.items()}
        for grad in grads.values():
            _ops.name_rows(grad.rows, grad.slots)
        if checked:
            for path, grad in grads.items():
                check_missed(_paths.join(path), grad)
        return self.rebuild({path: in_place_of(self.tables[path], grad) for path, grad in grads.items()}, dense)


def _declare_all(model: _Model, ids: Callable[..., Any] | None, capacity: int | None, has_aux: bool, args: Any, kwargs: Any) -> Declared:
    def loss(links: Mapping[_paths.Path, Link]) -> Any:
        return model.loss(links, model.dense, args, kwargs, model.scales)

    if ids is not None:
        params = model.treedef.unflatten(model.leaves)
        given = _paths.by_path(ids(params, *args, **kwargs), {path: 0 for path in model.tables}, "ids")
        declared = _named(model.tables, given, capacity)
        if capacity is None:
            model.whole = {path: x for path, x in given.items() if isinstance(x, jax.core.Tracer) and not stack_axes(model.tables[path])}
    elif capacity is None:
        seen = _recorded(model.tables, loss)
        declared = {path: _declare(table, seen[path]) for path, table in model.tables.items()}
        one = {path: arrays[0] for path, arrays in seen.items() if len(arrays) == 1 and not stack_axes(model.tables[path])}
        model.whole = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in one.items()}
    else:
        declared = _marked(model.tables, loss, has_aux, capacity)
    # tables of one size have as many slots, since tables without a link have those of their size: see Link
    slots: dict[Size, int] = {}
    for path, row_ids in declared.items():
        size = model.tables[path].shape[-2:]
        slots[size] = jax.core.max_dim(slots.get(size, 0), row_ids.shape[-1])
    return {
        path: _longer(row_ids, slots[table.shape[-2:]], all_rows(table))
        for path, row_ids in declared.items()
        for table in [model.tables[path]]
    }


def _longer(row_ids: Array, slots: int, rows: int) -> Array:
    """`[..., slots]`, with V in the new ones."""
    widths = [(0, 0)] * (row_ids.ndim - 1) + [(0, slots - row_ids.shape[-1])]
    return jnp.pad(row_ids, widths, constant_values=rows)


def check_missed(name: str, grad: RowGrad) -> None:
    """Fail, now or when the compiled call runs, if a lookup used a row that was not declared."""

    def fail(missed: Any) -> None:
        if missed:
            msg = f"a lookup used rows of the table {name!r} that were not declared: pass all ids, or a larger capacity"
            raise RuntimeError(msg)

    missed = grad.missed()
    if isinstance(missed, jax.core.Tracer):
        jax.debug.callback(fail, missed)
    else:
        fail(missed)


def _named(tables: Tables, given: Mapping[_paths.Path, Any], capacity: int | None) -> Declared:
    declared = {}
    for path, table in tables.items():
        try:
            declared[path] = _declare(table, given[path], capacity)
        except TypeError as error:
            msg = f"ids of the table {_paths.join(path)!r}: {error}"
            raise TypeError(msg) from None
    return declared


def _recorded(tables: Tables, loss: Callable[[Mapping[_paths.Path, Link]], Any]) -> dict[_paths.Path, list[Array]]:
    """Trace the loss for the ids of its lookups, table by table."""
    outside = get_opaque_trace_state()
    seen: dict[_paths.Path, list[Array]] = {path: [] for path in tables}

    def refuse(names: str) -> None:
        msg = (
            f"the rows of the table {names} cannot be found: this lookup is inside a jit, scan, cond, vmap, checkpoint or shard_map of the "
            "loss, or the table was changed. Pass value_and_grad(..., ids=lambda params, *args: {path: ids}) or capacity="
        )
        raise ValueError(msg)

    def recorder(path: _paths.Path) -> Callable[[Array], None]:
        def record(ids: Array) -> None:
            if get_opaque_trace_state() != outside:
                refuse(repr(_paths.join(path)))
            seen[path].append(ids)

        return record

    def stranger(size: tuple[int, ...]) -> None:
        named = [repr(_paths.join(path)) for path, table in tables.items() if table.shape[-len(size) :] == size]
        refuse(" or ".join(named) or f"of size {list(size)}")

    with recording([recorder(path) for path in tables], [stack_axes(table) for table in tables.values()], stranger) as links:
        loss(dict(zip(tables, links, strict=True)))
    return seen


def _declare(table: BinaryTable, ids: Any, capacity: int | None = None) -> Array:
    """The declared rows, int `[..., U]`: the same for all members of a stack."""
    row_ids = declare(table, ids, capacity)
    return jnp.broadcast_to(row_ids, (*stack_axes(table), *row_ids.shape))


def _marked(tables: Tables, loss: Callable[[Mapping[_paths.Path, Link]], Any], has_aux: bool, capacity: int) -> Declared:
    """Find the rows of each table by the gradient of the loss with respect to marks."""

    def marked_loss(marks: dict[_paths.Path, Array]) -> Any:
        out = loss({path: marked(x) for path, x in marks.items()})
        return out[0] if has_aux else out

    marks = jax.grad(marked_loss)({path: jnp.zeros((*stack_axes(table), all_rows(table)), jnp.float32) for path, table in tables.items()})
    declared = {}
    for path, table in tables.items():
        rows = all_rows(table)
        find = partial(jnp.nonzero, size=min(capacity, rows), fill_value=rows)
        members = len(stack_axes(table))
        (used,) = over_members(find, members)(marks[path])
        declared[path] = over_members(partial(declare, table), members)(used.astype(row_dtype(rows)))
    return declared
