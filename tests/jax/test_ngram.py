"""NGramEmbed: the rows of the reference without 64-bit types, streaming, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dualbin.jax as dbj
from dualbin import NGrams, reference
from dualbin.jax._ngram import _row_in_part

SPECS = [NGrams(2**31 - 1, (2, 3), 2, boundary=1, seed=2**33), NGrams(9, (1, 4, 2), 3), NGrams(10**6, (1,), 1, boundary=0)]
tokens_of = jax.jit(dbj.ngram_rows, static_argnums=1)


@pytest.mark.parametrize("ngrams", SPECS)
@given(st.integers(0, 2**63))
@settings(max_examples=25, deadline=None)
def test_rows_are_those_of_the_reference(ngrams, seed):
    random = np.random.default_rng(seed)
    few = np.array([0, 1, 2, 65536, 2**31 - 1, -1], np.int32)
    ids, context, starts = few[random.integers(0, 5, (3, 7))], few[random.integers(0, 6, (3, 2))], random.random((3, 7)) < 0.3
    found = tokens_of(ids, ngrams, context, starts)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, reference.ngram_rows(ids, ngrams, context, starts))
    np.testing.assert_array_equal(tokens_of(ids, ngrams), reference.ngram_rows(ids, ngrams))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (2, 1, 5)])
def test_odd_shapes(shape):
    ids = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    np.testing.assert_array_equal(dbj.ngram_rows(ids, SPECS[1]), reference.ngram_rows(ids, SPECS[1]))


def test_rows_beyond_int32():
    ngrams, ids = NGrams(2**34 - 8, (2, 3), 4, seed=2**62), np.arange(200).reshape(4, 50) % 17
    with pytest.raises(ValueError, match="a table of 17179869176 rows needs int64 ids: set jax_enable_x64"):
        dbj.ngram_rows(ids, ngrams)
    with jax.enable_x64(True):
        found = dbj.ngram_rows(ids, ngrams)
    assert found.dtype == jnp.int64
    np.testing.assert_array_equal(found, reference.ngram_rows(ids, ngrams))


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_the_row_in_a_part(size, bits):
    high, low = (np.array([word], np.uint32) for word in (bits >> 32, bits & 0xFFFFFFFF))  # which the same code takes
    assert int(_row_in_part(high, low, np.array([size], np.uint32))[0]) == bits * size >> 64


@pytest.mark.parametrize("cut", [0, 3])
def test_a_text_in_pieces_is_the_whole_text(cut):
    random = np.random.default_rng(cut)
    ids, context, starts = random.integers(0, 3, (3, 7)), random.integers(-1, 3, (3, 2)), random.random((3, 7)) < 0.2
    memory = dbj.NGramEmbed(50, 3, orders=(2, 4), heads=1, boundary=1, rngs=nnx.Rngs(0))
    after = memory.next_context(ids[:, :cut], context, starts[:, :cut])
    assert after.shape == (3, 3)
    pieces = [memory(ids[:, :cut], context, starts[:, :cut]), memory(ids[:, cut:], after, starts[:, cut:])]
    np.testing.assert_array_equal(jnp.concatenate(pieces, -2), memory(ids, context, starts))


def test_under_jit_and_with_a_projection():
    memory = dbj.NGramEmbed(100, 3, planes=2, boundary=4, projection=7, rngs=nnx.Rngs(0))
    ids = np.arange(30).reshape(2, 15) % 6
    assert memory(ids).shape == (2, 15, 7)
    rows = jax.jit(dbj.ngram_rows, static_argnums=1)(jnp.asarray(ids), memory.ngrams)
    np.testing.assert_array_equal(rows, reference.ngram_rows(ids, memory.ngrams))
    bad = jax.jit(dbj.ngram_rows, static_argnums=1)(jnp.asarray([1, -3, 1, 1, 1]), NGrams(1000, (3, 1), 2))
    assert (bad == -1).tolist() == [[False] * 4, [True] * 4, [True, True, False, False], [True, True, False, False], [False] * 4]


def test_the_rows_of_pytorch():
    torch, dbt = pytest.importorskip("torch"), pytest.importorskip("dualbin.torch")
    other = dbt.NGramEmbedding(500, 8, boundary=2, planes=2, orders=(1, 3))
    memory = dbj.NGramEmbed(500, 8, boundary=2, planes=2, orders=(1, 3), rngs=nnx.Rngs(0))
    memory.embed.table.set_value(dbj.from_torch(other.embed.weight.detach()))
    ids = np.random.default_rng(0).integers(0, 9, (3, 20))
    np.testing.assert_array_equal(memory(ids), other(torch.from_numpy(ids)).detach().numpy())


def test_training_learns_what_only_a_trigram_knows():
    memory = dbj.NGramEmbed(6_000, 16, orders=(3,), heads=2, projection=8, rngs=nnx.Rngs(0))
    ngrams = memory.ngrams
    tx = optax.partition({"dense": optax.adam(3e-3), "table": dbj.xor(1.0)}, dbj.param_labels)
    optimizer = nnx.Optimizer(memory, tx, wrt=nnx.Param)
    ids = jax.random.randint(jax.random.key(1), (32, 34), 0, 8)
    target = (ids[:, 2:] + 3 * ids[:, 1:-1] + 5 * ids[:, :-2]) % 8

    @nnx.jit
    def step(memory, optimizer):
        graphdef, params = nnx.split(memory, nnx.Param)

        def loss_of(params):
            logits = nnx.merge(graphdef, params)(ids)[:, 2:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

        loss, grads = dbj.value_and_grad(loss_of, ids=lambda _: {"embed.table": dbj.ngram_rows(ids, ngrams)})(params)
        optimizer.update(memory, grads)
        return loss

    losses = [float(step(memory, optimizer)) for _ in range(60)]
    assert losses[0] > 1.9
    assert losses[-1] < 0.6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": 3}, ValueError, r"ids must have at least one dimension, \[..., T\]"),
        ({"ids": np.zeros((2, 3))}, TypeError, "ids must be integers, got float64"),
        ({"ids": np.array([1, -1])}, IndexError, r"ids must be in \[0, 2147483648\), got -1"),
        ({"ids": np.array([1, 2**31])}, IndexError, r"ids must be in \[0, 2147483648\), got 2147483648"),
        ({"ngrams": 7}, TypeError, "ngrams must be a dualbin.NGrams, got a int"),
        ({"context": np.zeros(2, int)}, ValueError, r"context must be \[2, 'C'\]"),
        ({"context": np.full((2, 1), -2)}, IndexError, r"context must be in \[-1, 2147483648\), got -2"),
        ({"starts": np.zeros((2, 3))}, TypeError, "starts must be an array of bool, got float64"),
        ({"starts": np.zeros((2, 1), bool)}, ValueError, r"starts must be \[2, 3\], as ids"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dbj.ngram_rows(**{"ids": np.zeros((2, 3), int), "ngrams": NGrams(100)} | arguments)


def test_too_few_rows_are_named_by_the_module():
    with pytest.raises(ValueError, match="num_embeddings: rows must be between 8 and"):
        dbj.NGramEmbed(7, 3, rngs=nnx.Rngs(0))
