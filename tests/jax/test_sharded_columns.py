"""Tables whose columns are sharded: lookups and updates work on whole rows, and the table stays where it was put."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dualbin.jax as dbj
from dualbin.rules import Counter

V, D = 64, 64
IDS = jnp.array([[1, 2, 3], [2, 5, 7]])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("rows", [None, "y"])
def test_a_step_keeps_the_sharding(make_mesh, new_table, kind, rows):
    mesh = make_mesh("x", "y", kind=kind)
    table, rule = new_table(V, D), Counter(3)
    bits, scale = (NamedSharding(mesh, P(rows, *axes)) for axes in (("x",), ()))
    tx = dbj.xor(1.0, rule)
    one = (table, tx.init(table))
    placed = dbj.BinaryTable(jax.device_put(table.bits, bits), jax.device_put(table.scale, scale), D)
    many = (placed, tx.init(placed))

    @jax.jit
    def step(table, state):
        grads = dbj.grad(lambda table: jnp.sum(jnp.sin(table[IDS])), ids=lambda _: IDS)(table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    @jax.jit
    def fused(table, state):
        table, tables = dbj.xor_update(table, IDS, jnp.ones((*IDS.shape, D)), state.tables, rule=rule)
        return table, state._replace(tables=tables)

    for run in (step, fused):
        before = jax.tree.map(lambda x: x.sharding, many)
        one, many = run(*one), run(*many)
        np.testing.assert_array_equal(many[0].bits, one[0].bits)
        np.testing.assert_array_equal(many[0].scale, one[0].scale)
        assert many[0].bits.sharding.is_equivalent_to(bits, 2)
        assert many[0].scale.sharding.is_equivalent_to(scale, 2)
        if kind == AxisType.Explicit:  # else XLA chooses
            arrays = zip(jax.tree.leaves(many[1].tables.arrays), jax.tree.leaves(before[1].tables.arrays), strict=True)
            assert all(x.sharding.is_equivalent_to(was, x.ndim) for x, was in arrays)
