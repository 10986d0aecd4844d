"""Gradients of rows before they are summed, for an update that sums them by itself.

`value_and_grad` gives a table the sums of its gradient by row. :func:`dualbin.jax.xor` would read them once more, where the native update
takes a gradient as it leaves a lookup: N x D numbers are written and read for nothing. So the sums remember what they were made of. An
update that meets them as they were made takes that, and XLA leaves out sums that nothing else uses. Sums that went through anything, a
factor, a clip, a `psum`, another `jit`, are other arrays, and are used as they are.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import jax
from jax import Array

from dualbin.jax._ops.operation import explicit_mesh


class _Origin(NamedTuple):
    """What sums were made of. Nothing here keeps a tracer alive; one that is gone is one that nobody can use any more."""

    sums: weakref.ref[Any]
    slots: weakref.ref[Any] | None
    ids: weakref.ref[Any]
    dy: weakref.ref[Any]


class _Known(threading.local):
    def __init__(self) -> None:
        self.by_sums: dict[int, _Origin] = {}


_known = _Known()


def remember(sums: Array, ids: Array, dy: Array) -> None:
    """Note that `sums` has, at the places of some declared rows, the sums of the rows of dy `[N, D]` by the ids `[N]`, and nothing else."""
    arrays = (sums, ids, dy)
    if not all(isinstance(x, jax.core.Tracer) for x in arrays) or explicit_mesh(arrays) is not None or not _is_small(ids, sums):
        return
    key, by_sums = id(sums), _known.by_sums
    by_sums[key] = _Origin(weakref.ref(sums, lambda _: by_sums.pop(key, None)), None, weakref.ref(ids), weakref.ref(dy))


def _is_small(ids: Array, sums: Array) -> bool:
    """Whether a gradient that may be spread over devices has no more rows than its sums: an update needs all of either on every device."""
    if jax.device_count() == 1:
        return True
    counts = ids.shape[0], sums.shape[0]
    return all(isinstance(count, int) for count in counts) and counts[0] <= counts[1]


def name_rows(sums: Array, slots: Array) -> None:
    """Note that `slots` has the ids of the rows of `sums` in the form of `_slots`."""
    origin = _known.by_sums.get(id(sums))
    if origin is not None and origin.sums() is sums:
        _known.by_sums[id(sums)] = origin._replace(slots=weakref.ref(slots))


def unsummed(slots: Array, sums: Array) -> tuple[Array, Array] | None:
    """The ids `[N]`, with repeats, and the gradient `[N, D]` of which `sums` were made, if they are as they were made, rows and all."""
    origin = _known.by_sums.get(id(sums))
    if origin is None or origin.sums() is not sums or origin.slots is None or origin.slots() is not slots:
        return None
    ids, dy = origin.ids(), origin.dy()
    return None if ids is None or dy is None else (ids, dy)
