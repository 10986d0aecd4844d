"""`freeze_rows`, the transformation that keeps some rows of a table as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from dualbin.jax import _paths
from dualbin.jax._ids import to_ids
from dualbin.jax._rowgrad import RowGrad, in_place_of, row_grad
from dualbin.jax._table import is_table

if TYPE_CHECKING:
    import optax


def freeze_rows(ids: Any) -> optax.GradientTransformation:
    """Leave rows of tables alone: their bits, scales and optimizer state stay as they are.

    It takes these rows out of the gradients, so it belongs in front of what uses them::

        tx = optax.chain(dbj.freeze_rows({"emb": [0, 1, 2]}), optax.partition({...}, dbj.param_labels))

    To freeze a whole table use `optax.set_to_zero()` for its label.

    Args:
        ids: the rows to freeze, integers of any shape in [0, V), by the table's path: a dict that mirrors the parameters
            (`{"block": {"emb": ids}}`), or one with paths for keys ("block/emb" or "block.emb"), or the ids themselves where the parameters
            are a table. Tables that are not named train as ever.

    Returns:
        An `optax.GradientTransformation` without state. Leaves that are no :class:`RowGrad` pass through it.

    Raises:
        TypeError, ValueError, IndexError: in `update`: ids of another type, a path that leads to no table, an id outside [0, V).
    """
    try:
        import optax  # noqa: PLC0415  (lookups work without it)
    except ImportError as error:
        msg = "dualbin.jax.freeze_rows needs optax: pip install 'optax>=0.2.4'"
        raise ImportError(msg) from error

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        places, leaves, treedef = _paths.named_leaves(updates, lambda x: isinstance(x, RowGrad))
        for path, frozen in _paths.by_path(ids, places, "ids", every=False).items():
            if frozen is not None:
                leaves[places[path]] = _without(leaves[places[path]], frozen, _paths.join(path))
        return treedef.unflatten(leaves), state

    return optax.GradientTransformation(lambda _params: optax.EmptyState(), update)


def _without(place: Any, frozen: Any, name: str) -> Any:
    """The gradient with the frozen rows as unused slots, which hold V."""
    grad = row_grad(place)
    if grad.num_rows is None:
        msg = f"the gradient of the table {name!r} must have num_rows: RowGrad(ids, rows, num_rows=V)"
        raise ValueError(msg)
    rows = grad.num_rows
    known = jnp.sort(to_ids(frozen, rows, f"ids of the table {name!r}").reshape(-1))
    if not known.size:
        return place
    found = jnp.minimum(jnp.searchsorted(known, grad.ids), known.size - 1)
    new = RowGrad(jnp.where(known[found] == grad.ids, jnp.asarray(rows, grad.ids.dtype), grad.ids), grad.rows, rows)
    return in_place_of(place, new) if is_table(place) else new
