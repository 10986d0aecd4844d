"""The operations that train: `update`, in place, `masks`, which leaves the table alone, and the two that apply its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualbin._schema import STATE_ARRAYS
from dualbin.jax._ops import arithmetic
from dualbin.jax._ops.operation import Axes, Operation, Plan, Spec, explicit_mesh, native_call, own_ids
from dualbin.jax._ops.sums import workspace
from dualbin.rules import NUMBERS, Rule

State = Mapping[str, Array]


def update(
    bits: Array, scale: Array, state: State, context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule, axes: Axes = ()
) -> tuple[Array, Array, dict[str, Array], Array]:
    """The fused update.

    Args:
        bits, scale: the table.
        state: its arrays by name, those that the rule has.
        context: the step context, uint32 `[8]`, of the whole table.
        ids: `[N]`; ids outside [0, V) are skipped.
        dy: `[N, D]`, the gradient of the rows.
        dim, rule: D, the rule as resolved for the planes of the table.
        axes: as for :class:`Operation`.

    Returns:
        bits, scale, the new state and stats uint32 `[8]`; all but stats reuse the operands' memory.
    """
    return _run(Update(_present(state), dim, rule, masks=False), bits, scale, state, context, ids, dy, axes)


def masks(
    bits: Array, scale: Array, state: State, context: Array, ids: Array, dy: Array, *, dim: int, rule: Rule, axes: Axes = ()
) -> tuple[Array, Array, dict[str, Array], Array]:
    """The update without its effect on the table; arguments as for :func:`update`.

    Returns:
        mask uint8 `[N, planes * B]` (zero except at a row's first occurrence), new scale float32 `[N, 1]`, the new state, which reuses
        the operands' memory, and stats uint32 `[8]`.
    """
    return _run(Update(_present(state), dim, rule, masks=True), bits, scale, state, context, ids, dy, axes)


def _run(
    operation: Update, bits: Array, scale: Array, state: State, context: Array, ids: Array, dy: Array, axes: Axes
) -> tuple[Array, Array, dict[str, Array], Array]:
    arrays = [state[name] for name in operation.present]
    first, second, *arrays, stats = operation(bits, scale, *arrays, context, ids, dy, axes=axes)
    return first, second, dict(zip(operation.present, arrays, strict=True)), stats


def _present(state: State) -> tuple[str, ...]:
    return tuple(name for name in STATE_ARRAYS if name in state)


@dataclass(frozen=True)
class Update(Operation):
    """(bits, scale, the present state arrays, context, ids, dy) -> (bits and scale, or mask and new scale; the state arrays; stats)."""

    #: names of the state arrays
    present: tuple[str, ...]
    dim: int
    rule: Rule
    masks: bool

    def native(self, bits: Array, scale: Array, *rest: Array) -> list[Array]:
        *state, context, ids, dy = rest
        first = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (bits, scale)]
        if self.masks:
            count = ids.shape[0]
            first = [jax.ShapeDtypeStruct((count, bits.shape[1]), jnp.uint8), jax.ShapeDtypeStruct((count, 1), jnp.float32)]
        fixed = [*first, jax.ShapeDtypeStruct((8,), jnp.uint32), workspace("update", ids.shape[0], bits.shape[0], self.dim)]
        results = [*fixed, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state)]
        operands = (bits, scale, context, ids, dy)
        aliases = {len(operands) + k: len(fixed) + k for k in range(len(state))} | ({} if self.masks else {0: 0, 1: 1})
        target = "dualbin_masks" if self.masks else "dualbin_update"
        one, two, stats, _, *new = native_call(target, results, *operands, *state, aliases=aliases, **self._attrs())
        return [one, two, *new, stats]

    def _attrs(self) -> dict[str, np.generic]:
        native = self.rule.native()
        numbers = {name: np.float32(native[name]) if isinstance(native[name], float) else np.int32(native[name]) for name in NUMBERS}
        state = sum(1 << k for k, name in enumerate(STATE_ARRAYS) if name in self.present)
        return {"dim": np.int64(self.dim), "state": np.int32(state), "kind": np.int32(native["kind"]), **numbers}

    def fallback(self, bits: Array, scale: Array, *rest: Array) -> list[Array]:
        *given, context, ids, dy = rest
        state = dict(zip(self.present, given, strict=True))
        first, second, state, stats = arithmetic.update_rows(bits, scale, state, context, ids, dy, dim=self.dim, rule=self.rule)
        if not self.masks:
            rows = bits.shape[0]
            places = jnp.where(arithmetic.first_occurrence(ids, rows), ids, jnp.asarray(rows, ids.dtype))
            first = ChangeRows(flip=True).fallback(bits, places, first)[0]
            second = ChangeRows(flip=False).fallback(scale, places, second)[0]
        return [first, second, *(state[name] for name in self.present), stats]

    def changes(self) -> Mapping[int, int]:
        return {k: k for k in range(2 if self.masks else 0, 2 + len(self.present))}

    def sharding_rule(self, *operands: Array) -> str:
        state = [f"v c{k}" if x.ndim == 2 else "v" for k, x in enumerate(operands[2:-3])]
        # every device makes all of a mask and needs it: how the batch is spread says nothing about it
        results = ["q m", "r p"] if self.masks else ["v b", "v o"]
        return f"{', '.join(['v b', 'v o', *state, 'k', 'n', 'n d'])} -> {', '.join([*results, *state, 's'])}"

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        table: list[Spec] = [(axes, ()), (axes, ())]
        state: list[Spec] = [(axes, *[()] * (len(spec) - 1)) for spec in specs[2:-3]]
        gradient: list[Spec] = [((),), ((),), ((), ())]  # context, ids, dy: every device needs all of them
        first: list[Spec] = [((), ()), ((), ())] if self.masks else table
        return Plan([*table, *state, *gradient], [*first, *state, ((),)], partial(self.shard, axes=axes))

    def shard(self, bits: Array, scale: Array, *rest: Array, axes: Axes) -> list[Array]:
        *state, context, ids, dy = rest
        rows = bits.shape[0]
        own = own_ids(ids, rows, axes, other=rows)
        first, second, *arrays, stats = self.on_device(bits, scale, *state, own_context(context, rows, axes), own, dy)
        if self.masks and axes:
            second = jnp.where((own >= 0)[:, None] & (own < rows)[:, None], second, 0)
            first, second = lax.psum((first, second), axes)  # one device has the row, the others zeros
        return [first, second, *arrays, _add_stats(stats, axes)]


def _add_stats(stats: Array, axes: Axes) -> Array:
    """The sum over `axes` of four uint64, each two uint32 words."""
    if not axes:
        return stats
    parts = lax.psum(jnp.stack([stats & 0xFFFF, stats >> 16]), axes)  # 16 bits at a time: no carry is lost
    halves = jnp.stack([parts[0, 0::2], parts[1, 0::2], parts[0, 1::2], parts[1, 1::2]])
    carry = jnp.zeros_like(halves[0])
    digits = []
    for half in halves:
        total = half + carry
        digits.append(total & 0xFFFF)
        carry = total >> 16
    low, high = digits[0] | digits[1] << 16, digits[2] | digits[3] << 16
    return jnp.stack([low, high], axis=1).reshape(8)


def own_context(context: Array, rows: int, axes: Axes) -> Array:
    """The step context of the whole table as that of this device's shard of `rows` rows: with the row at which it starts."""
    if not axes:
        return context
    index = lax.axis_index(axes).astype(jnp.uint32)
    low, middle, high = (index * np.uint32(word) for word in (rows & 0xFFFF, rows >> 16 & 0xFFFF, rows >> 32))  # fewer than 2**16 devices
    total = low + (middle << 16)
    first_row = jnp.stack([total, high + (middle >> 16) + (total < low).astype(jnp.uint32)])
    return jnp.concatenate([context[:4], first_row, context[6:]])


# ---- applying an update ------------------------------------------------------------------------------------------------------------------


def xor_rows(bits: Array, ids: Array, mask: Array, axes: Axes = ()) -> Array:
    """`bits[ids[n]] ^= mask[n]`, in place where XLA may reuse bits. Ids are distinct; those outside [0, V) are skipped."""
    return bits if ids.size == 0 else ChangeRows(flip=True)(bits, ids, mask, axes=axes)[0]


def set_rows(scale: Array, ids: Array, values: Array, axes: Axes = ()) -> Array:
    """`scale[ids[n]] = values[n]`, likewise."""
    return scale if ids.size == 0 else ChangeRows(flip=False)(scale, ids, values, axes=axes)[0]


@dataclass(frozen=True)
class ChangeRows(Operation):
    """(array, ids, values) -> array."""

    #: exclusive or with the rows as they are; else the values take their place
    flip: bool

    def native(self, array: Array, ids: Array, values: Array) -> list[Array]:
        if not self.flip:
            return self.fallback(array, ids, values)
        return native_call("dualbin_xor_rows", [jax.ShapeDtypeStruct(array.shape, array.dtype)], array, ids, values, aliases={0: 0})

    def fallback(self, array: Array, ids: Array, values: Array) -> list[Array]:
        places = jnp.where(ids < 0, jnp.asarray(array.shape[0], ids.dtype), ids)  # a negative index would count from the end
        if self.flip:
            values = array.at[places].get(mode="fill", fill_value=0) ^ values
        return [array.at[places].set(values, mode="drop")]

    def batch(self, size: int, batched: Sequence[bool], operands: Sequence[Array], axes: Axes) -> tuple[list[Array], list[bool]]:
        array, ids, values = operands
        if axes or not all(batched) or explicit_mesh(operands) is not None or size * array.shape[1] > np.iinfo(ids.dtype).max:
            return super().batch(size, batched, operands, axes)
        # one array of all members' rows, in place as that of one table is; `size * rows` is nobody's row
        rows = array.shape[1]
        first = jnp.arange(size, dtype=ids.dtype)[:, None] * jnp.asarray(rows, ids.dtype)
        places = jnp.where((ids >= 0) & (ids < rows), ids + first, jnp.asarray(size * rows, ids.dtype))
        changed = self(array.reshape(size * rows, -1), places.reshape(-1), values.reshape(-1, values.shape[-1]))[0]
        return [changed.reshape(array.shape)], [True]

    def changes(self) -> Mapping[int, int]:
        return {0: 0}

    def sharding_rule(self, *_operands: Array) -> str:
        return "v b, i, n c -> v b"  # every device needs all ids and values: how the batch is spread says nothing about them

    def plan(self, specs: list[Spec]) -> Plan:
        axes = specs[0][0]
        return Plan([(axes, ()), ((),), ((), ())], [(axes, ())], partial(self.shard, axes=axes))

    def shard(self, array: Array, ids: Array, values: Array, *, axes: Axes) -> list[Array]:
        rows = array.shape[0]
        return self.on_device(array, own_ids(ids, rows, axes, other=rows), values)
