"""`xor`, the optax transformation, and `xor_update`, the direct form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dualbin._checks import warn_small_rate
from dualbin.jax import _ops
from dualbin.jax._ids import to_array, to_ids
from dualbin.jax._rowgrad import RowGrad, check_gradient, check_row_grad, update_ids
from dualbin.jax._stack import over_members, stack_axes
from dualbin.jax._state import (
    TableState,
    add_to_window,
    check_pending_rows,
    check_rate,
    check_seed,
    check_state,
    finish,
    has_rows,
    init_state,
    is_state,
    make_context,
    trains_scale,
)
from dualbin.jax._table import FLOATS, BinaryTable, all_rows, check_table, is_table, shard_axes, table_like
from dualbin.jax._updates import RowFlips, RowSet
from dualbin.jax._variables import without_variables
from dualbin.rules import Counter, Rule, check_rule, resolve

if TYPE_CHECKING:
    import optax


class XorState(NamedTuple):
    """State of :func:`xor`.

    Attributes:
        count: int32, calls of `update`, the argument of a schedule.
        tables: the tree of parameters, without any `nnx.Variable`, with a :class:`TableState` for each table.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    tables: Any


def xor(
    learning_rate: float | Array | Callable[[Array], Any] = 1.0,
    rule: Rule | None = None,
    scale_lr: float | Array = 3e-3,
    seed: int | Array = 0,
    *,
    pending_rows: int | None = None,
) -> optax.GradientTransformation:
    """Train packed tables: bits flip, scales follow row-wise Adam.

    Every leaf must be a :class:`BinaryTable` with a :class:`RowGrad`; use it for the label "table" of
    `optax.partition({...}, dualbin.jax.param_labels)`. The updates are for `optax.apply_updates`, which under jit with the parameters and
    the state donated changes table and state in place.

    The random numbers of a step depend on the seed and the table's own `step`, which counts its finished updates: a step without a row
    does not advance it. A schedule is called with the number of calls of `update` so far, as everywhere in optax.

    Args:
        learning_rate: at least 0, or an optax schedule; 1 is the tuned step, and a number as of a dense optimizer, 1e-3, gets a warning.
        rule: one of `dualbin.rules`; None is `Counter(8)`. With `every=K` the window is part of the state.
        scale_lr: rate of the scales, relative to learning_rate; 0 freezes them and allocates nothing for them.
        seed: at most 64 bits. Give replicas the same seed.
        pending_rows: only for a rule with `every > 1`: the most distinct rows of a window; None is V, for tables of at most 2**26 weights.
            Rows that do not fit are lost and counted: see :func:`check_errors`.

    Returns:
        An `optax.GradientTransformation` whose state is a :class:`XorState` and whose updates are tables of :class:`RowFlips` and
        :class:`RowSet`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range. `init` and `update` raise them for trees, gradients and
            states that do not fit, before anything changes.
    """
    try:
        import optax  # noqa: PLC0415  (lookups and xor_update work without it)
    except ImportError as error:
        msg = "dualbin.jax.xor needs optax: pip install 'optax>=0.2.4'"
        raise ImportError(msg) from error
    rule = check_rule(Counter(8) if rule is None else rule)
    schedule = learning_rate if callable(learning_rate) else None
    if schedule is None:
        check_rate("learning_rate", learning_rate)
        if isinstance(learning_rate, (int, float)):
            warn_small_rate("xor(%g)", learning_rate)
    check_rate("scale_lr", scale_lr)
    check_seed(seed)
    if pending_rows is not None:
        check_pending_rows(pending_rows)

    def init(params: Any) -> XorState:
        # `nnx.Optimizer` wraps the arrays of a state by itself; in a variable of the parameters it would take a state apart
        leaves, treedef = _tables(without_variables(params))
        fresh = partial(init_state, rule=rule, scale_lr=scale_lr, pending_rows=pending_rows)
        states = [over_members(fresh, len(stack_axes(table)))(table) for _, table in leaves]
        return XorState(count=jnp.zeros((), jnp.int32), tables=treedef.unflatten(states))

    def update(updates: Any, state: XorState, params: Any = None) -> tuple[Any, XorState]:
        if params is None:
            msg = "xor needs the parameters: tx.update(grads, state, params)"
            raise ValueError(msg)
        leaves, treedef = _tables(params)
        grads, states = treedef.flatten_up_to(updates), jax.tree.leaves(state.tables, is_leaf=is_state)
        if len(states) != len(leaves):
            msg = f"the state belongs to {len(states)} tables, the parameters have {len(leaves)}: use a state of tx.init(params)"
            raise ValueError(msg)
        grads = [check_row_grad(grad, f"gradient of {name}", table) for (name, table), grad in zip(leaves, grads, strict=True)]
        for (name, table), table_state in zip(leaves, states, strict=True):
            check_state(table_state, table, rule, scale_lr, f"state of {name}")
        rate = learning_rate if schedule is None else check_rate("learning_rate", schedule(state.count))
        masks = partial(_masks, learning_rate=rate, rule=rule, scale_lr=scale_lr, seed=seed)
        results = [
            over_members(masks, len(stack_axes(table)))(table, grad, table_state)
            for (_, table), grad, table_state in zip(leaves, grads, states, strict=True)
        ]
        state_tree = jax.tree.structure(state.tables, is_leaf=is_state)
        new_state = XorState(count=optax.safe_increment(state.count), tables=jax.tree.unflatten(state_tree, [new for _, new in results]))
        return treedef.unflatten([flips for flips, _ in results]), new_state

    return optax.GradientTransformation(init, update)


def xor_update(
    table: BinaryTable,
    ids: Any,
    dy: Array,
    state: TableState,
    *,
    learning_rate: float | Array = 1.0,
    rule: Rule | None = None,
    scale_lr: float | Array = 3e-3,
    seed: int | Array = 0,
) -> tuple[BinaryTable, TableState]:
    """One fused step, for a loss that was differentiated with respect to the looked-up rows.

    Under jit with table and state donated everything changes in place.

    Args:
        table: the table.
        ids: int32 or int64, any shape, with repeats; traced ids outside [0, V) are skipped.
        dy: gradient of `lookup(table, ids)`, float32, float16 or bfloat16 of shape `ids.shape + (D,)`.
        state: of :func:`init_state`, with the same rule and scale_lr.
        learning_rate: at least 0.
        rule: one of `dualbin.rules`; None is `Counter(8)`.
        scale_lr: rate of the scales, relative to learning_rate.
        seed: at most 64 bits.

    Returns:
        The new table and state; `state.stats` has the counts of this step.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape, or state, rule and table do not fit each other.
        IndexError: an id outside [0, V), where ids are concrete and in host memory.
    """
    rows, dim = all_rows(check_table(table)), table.dim
    rule = resolve(Counter(8) if rule is None else rule, table.planes, table.dim)
    check_rate("learning_rate", learning_rate)
    check_rate("scale_lr", scale_lr)
    check_seed(seed)
    check_state(state, table, rule, scale_lr)
    array = to_ids(ids, rows)
    dy = to_array("dy", dy)
    check_gradient("xor_update", array, dy, tuple(kind.name for kind in FLOATS), "ids", "dy")
    if dy.shape[-1] != dim:
        msg = f"dy must have {dim} columns, those of the table, got {dy.shape[-1]}"
        raise ValueError(msg)
    flat, dy = _ops.replicate(array).reshape(-1), _ops.replicate(dy).reshape(-1, dim)
    done = has_rows(flat, rows)
    step = state.step
    if rule.every > 1:
        flat, dy, _ = _ops.reduce_rows(flat, dy, rows, min(flat.shape[0], rows))
        state, flat, dy, done = add_to_window(state, flat, dy, rule.every, rows)
    context = make_context(seed, step, learning_rate, scale_lr)
    axes = shard_axes(table.axis)
    bits, scale, arrays, stats = _ops.update(table.bits, table.scale, state.arrays, context, flat, dy, dim=dim, rule=rule, axes=axes)
    return table_like(table, bits, scale), finish(state, arrays, stats, done)


def _masks(
    table: BinaryTable, grad: RowGrad, state: TableState, learning_rate: Any, rule: Rule, scale_lr: Any, seed: Any
) -> tuple[BinaryTable, TableState]:
    """The update of one table, as an update for `optax.apply_updates`."""
    rows, dim, rule = all_rows(table), table.dim, resolve(rule, table.planes, table.dim)
    origin = _ops.unsummed(grad.slots, grad.rows) if rule.every == 1 else None
    ids, sums = (update_ids(grad), grad.rows) if origin is None else origin
    done = has_rows(ids, rows)
    context = make_context(seed, state.step, learning_rate, scale_lr)
    if rule.every > 1:
        state, ids, sums, done = add_to_window(state, ids, sums, rule.every, rows)
    axes = shard_axes(table.axis)
    mask, new_scale, arrays, stats = _ops.masks(table.bits, table.scale, state.arrays, context, ids, sums, dim=dim, rule=rule, axes=axes)
    if origin is not None:  # a row is changed once, at its first occurrence, where its scale is; one whose scale is 0 does not change
        ids = jnp.where(new_scale[:, 0] == 0, jnp.asarray(jnp.iinfo(ids.dtype).max, ids.dtype), ids)
    scale = RowSet(ids, new_scale, table.axis) if trains_scale(scale_lr) else RowSet(ids[:0], new_scale[:0], table.axis)
    return table_like(table, RowFlips(ids, mask, table.axis), scale), finish(state, arrays, stats, done)


def _tables(params: Any) -> tuple[list[tuple[str, BinaryTable]], Any]:
    """The tables of `params` with a name for messages, and the tree definition that has them as leaves."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_table)
    leaves = []
    for keys, leaf in flat:
        name = f"params{jax.tree_util.keystr(keys)}"
        if not is_table(leaf):
            msg = (
                f"xor updates tables only, {name} is a {type(leaf).__name__}: use optax.partition({{'table': dualbin.jax.xor(...), "
                "'dense': ...}, dualbin.jax.param_labels)"
            )
            raise TypeError(msg)
        leaves.append((name, check_table(leaf, name, stack=True)))
    return leaves, treedef
