"""What a table says to those who take it for an array."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dualbin.jax as dbj


@pytest.fixture
def table():
    return dbj.BinaryTable.create(jax.random.key(0), 1000, 256)


def test_it_prints_in_one_line(table):
    device = table.bits.device
    assert repr(table) == f"BinaryTable(rows=1000, dim=256, device={device})"
    assert repr(dbj.activate(table, [1])) == f"ActiveTable(rows=1000, dim=256, device={device})"
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), table)
    assert repr(stack) == f"BinaryTable(stack=[2], rows=1000, dim=256, device={device})"
    assert repr(jax.eval_shape(lambda: table)) == "BinaryTable(rows=1000, dim=256)"
    assert repr(jax.tree.map(lambda _: 0, table)) == "BinaryTable(bits=0, scale=0, dim=256)"
    text = []
    jax.jit(lambda table: text.append(repr(table)))(table)
    assert text == ["BinaryTable(rows=1000, dim=256)"]
    assert str(dbj.BinaryEmbed(1000, 256, rngs=nnx.Rngs(0))).count("\n") < 20


def test_it_is_no_array(table):
    with pytest.raises(TypeError, match=r"table\.dequantize\(\)"):
        np.asarray(table)
    with pytest.raises(AttributeError, match=r"dbj\.attend\(table, query\)"):
        table.T  # noqa: B018


def test_a_table_of_the_other_frontend():
    other = types.new_class("BinaryTable")
    other.__module__ = "dualbin.torch"
    with pytest.raises(TypeError, match=r"got dualbin\.torch\.BinaryTable: dualbin\.jax\.from_torch makes one of it"):
        dbj.lookup(other(), [1])


def test_names_that_need_flax_are_listed():
    assert "BinaryEmbed" in dir(dbj)


def test_a_rate_of_dense_optimizers_gets_a_warning():
    with pytest.warns(UserWarning, match=r"xor\(0\.001\): 1 is the tuned step") as caught:
        dbj.xor(1e-3)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (0.0, 0.1, 1, jnp.float32(1e-3), lambda _: 1e-3):
            dbj.xor(rate)
