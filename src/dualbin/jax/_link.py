"""What a loss's tables carry while `value_and_grad` runs it: how a packed table gets a gradient.

The cotangent of an integer array carries nothing in JAX, and a dense float one of V x D is what this library avoids. So the rows of a step
are declared first. Inside the loss their table is linked to a tap: a float32 `[U, D]` array of zeros that no one reads but whose cotangent
is the row gradient. JAX adds the cotangents of several lookups and carries them through scan, checkpoint, vmap, cond and jit, since the
link is made of leaves of the table. So that a table has one tree structure throughout a loss, all tables have these leaves there, linked or
not, and `jax.tree.map` over the parameters and a second tree works; elsewhere none has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dualbin.jax import _slots

#: receives the ids of a lookup
Recorder = Callable[[Array], None]

#: V and D of a table, or of a shard of it, with the axes of a stack in front
Size = tuple[int, ...]


class Link(NamedTuple):
    """The leaves of a table beside bits and scale, of one of these kinds.

    * declared rows: slots float32 `[U, k]`, the ids in the form of `_slots`; tap float32 `[U, D]`
    * marks: slots `[1, 1]`, tap float32 `[V]`, whose cotangent is above 0 at the rows that a loss uses
    * recorded: slots `[1, 1]`, tap `[2, 1]`, whose lookups hand their ids to a recorder
    * nothing: zeros, of the shapes that a table of this size has in the same loss if there is one, since some frameworks compare shapes

    All have the axes of a stack in front. Only the link of a single table says anything: lookups use the members of a stack one by one.
    """

    slots: Any
    tap: Any


def marked(marks: Array) -> Link:
    return Link(_zeros((*marks.shape[:-1], 1, 1)), marks)


def is_declared(link: Link) -> bool:
    return link.slots.shape[-1] > 1


def is_marks(link: Link) -> bool:
    return link.tap.ndim == 1


def is_active(link: Link | None) -> bool:
    return link is not None and link.tap.shape[-2:] != (1, 1)


def row_ids(link: Link) -> Array:
    """The declared rows, ascending, V in unused slots."""
    return _slots.decode(jax.lax.stop_gradient(link.slots))


# ---- the loss that runs ------------------------------------------------------------------------------------------------------------------


class _Running(threading.local):
    #: for every loss that runs, the shapes of slots and tap by the size of the table
    losses: tuple[Mapping[Size, tuple[Any, Any]], ...] = ()
    #: of the innermost one, slots of links with the ids of the one lookup for which their rows were declared
    whole: tuple[tuple[Any, Any], ...] = ()
    #: of the innermost recording: the taps with their recorders, and what to do with a lookup of a table of some size that has none of them
    recorders: tuple[tuple[Any, Recorder], ...] = ()
    stranger: Callable[[Size], None] | None = None


_running = _Running()


@contextmanager
def running_loss(links: Mapping[Size, Link], whole: Sequence[tuple[Any, Any]] = ()) -> Iterator[None]:
    """Around the call of a loss function: tables have the leaves of their links.

    Args:
        links: one for every size of a linked table.
        whole: slots of links with the ids of the one lookup for which their rows were declared, all of them; or with the shape of these
            ids, where the loss itself told them in a first run: then its lookup has others, which are the same.
    """
    before, before_whole = _running.losses, _running.whole
    shapes = {size: (link.slots.shape, link.tap.shape) for size, link in links.items()}
    members = {size[k:]: (slots[k:], tap[k:]) for size, (slots, tap) in shapes.items() for k in range(1, len(size) - 1)}
    _running.losses, _running.whole = (*before, members | shapes), tuple(whole)
    try:
        yield
    finally:
        _running.losses, _running.whole = before, before_whole


def is_whole(link: Link, ids: Array) -> bool:
    """Whether the rows of the link were declared for the lookup of these ids alone, and for all of them."""
    for slots, declared in _running.whole:
        if slots is link.slots:
            if type(declared) is jax.ShapeDtypeStruct:
                return (declared.shape, declared.dtype) == (ids.shape, ids.dtype)
            return declared is ids
    return False


def in_loss() -> bool:
    return bool(_running.losses)


@contextmanager
def recording(recorders: Sequence[Recorder], stacks: Sequence[Size], stranger: Callable[[Size], None]) -> Iterator[list[Link]]:
    """Around a loss that is traced only for the ids of its lookups: one link for every recorder, with the axes of a stack in front."""
    before = _running.recorders, _running.stranger
    links = [Link(_zeros((*stack, 1, 1)), jnp.zeros((*stack, 2, 1), jnp.float32)) for stack in stacks]
    _running.recorders = (*before[0], *((link.tap, recorder) for link, recorder in zip(links, recorders, strict=True)))
    _running.stranger = stranger
    try:
        yield links
    finally:
        _running.recorders, _running.stranger = before


def record(link: Link | None, size: Size, ids: Array) -> None:
    """Hand the ids of a lookup to the recorder of a link that has one."""
    if link is None or is_declared(link) or link.tap.shape != (2, 1):
        return
    for tap, recorder in _running.recorders:
        if tap is link.tap:
            recorder(ids)
            return
    if _running.stranger is not None:
        _running.stranger(size)


# ---- leaves ------------------------------------------------------------------------------------------------------------------------------


def leaves(link: Link | None, bits: Any, scale: Any, dim: int) -> Link:
    """The leaves of a table's link inside a loss; for a table without one such that stand for nothing and fit what scale is."""
    if link is not None:
        return link
    if isinstance(scale, PartitionSpec):
        return Link(PartitionSpec(), PartitionSpec())
    if isinstance(scale, Sharding):
        place = NamedSharding(scale.mesh, PartitionSpec()) if isinstance(scale, NamedSharding) else scale
        return Link(place, place)
    if scale is None or isinstance(scale, bool | int | str):
        return Link(scale, scale)
    *stack, rows = getattr(bits, "shape", ())[:-1] or (0,)
    size, shapes = (*stack, rows, dim), ((*stack, 1, 1), (*stack, 1, 1))
    for loss in _running.losses:
        shapes = loss.get(size, shapes)
    if isinstance(scale, jax.ShapeDtypeStruct):
        return Link(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return Link(*map(_zeros, shapes))


def _zeros(shape: tuple[int, ...]) -> Array:
    with jax.ensure_compile_time_eval():
        return jnp.zeros(shape, jnp.float32)
