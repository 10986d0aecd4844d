"""`lookup_bag` against the reference, its gradients against a dense model, its shards against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dualbin.jax as dbj
from dualbin import reference

V, D, N, G = 40, 19, 50, 6
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 20, N).astype(np.int32)
SEGMENTS = RNG.integers(-1, G + 1, N).astype(np.int32)
SEGMENTS[SEGMENTS == 2] = 3  # segment 2 is empty
WEIGHTS = RNG.normal(size=N).astype(np.float32)
MODES = ["sum", "mean", "majority"]


def expected(table, mode, weights=None, dtype=np.float32):
    order = np.argsort(SEGMENTS, kind="stable")
    offsets = np.searchsorted(SEGMENTS[order], np.arange(G + 1))
    weights = None if weights is None else weights[order]
    return reference.lookup_bag(table.bits, table.scale, IDS[order], offsets, D, mode, weights, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_matches_reference(new_table, mode, dtype):
    table = new_table(V, D, padding_idx=7)
    got = dbj.lookup_bag(table, IDS, SEGMENTS, G, mode, dtype=dtype)
    assert got.shape == (G, D)
    assert np.asarray(got).tobytes() == expected(table, mode, dtype=dtype).tobytes()
    if mode == "sum":
        got = jax.jit(lambda w: dbj.lookup_bag(table, IDS, SEGMENTS, G, weights=w, dtype=dtype))(WEIGHTS)
        assert np.asarray(got).tobytes() == expected(table, "sum", WEIGHTS, dtype).tobytes()


def dense_bag(w, weights, mode):
    counted = jnp.any(w != 0, axis=1).astype(jnp.float32)[IDS]
    total = jax.ops.segment_sum(w[IDS] * weights[:, None], SEGMENTS, G)
    counts = jax.ops.segment_sum(counted, SEGMENTS, G)[:, None]
    return total / jnp.maximum(counts, 1) if mode == "mean" else total


def head(y):
    return jnp.sum(y * jnp.arange(1, D + 1) * jnp.arange(1, G + 1)[:, None] + (y * 0.1) ** 2)


@pytest.mark.parametrize("way", [{"ids": lambda *_: IDS}, {"capacity": 30}, {}], ids=["ids", "capacity", "recorded"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients(new_table, dense, mode, way):
    table = new_table(V, D, padding_idx=7)
    weights = WEIGHTS if mode == "sum" else None
    params = {"emb": table, "w": jnp.asarray(WEIGHTS)}

    def loss(params):
        return head(dbj.lookup_bag(params["emb"], IDS, SEGMENTS, G, mode, None if weights is None else params["w"]))

    grads = jax.jit(dbj.grad(loss, **({"ids": lambda _: {"emb": IDS}} if "ids" in way else way)))(params)
    factors = jnp.ones(N) if weights is None else jnp.asarray(weights)
    table_grad, weight_grad = jax.grad(lambda w, f: head(dense_bag(w, f, mode)), argnums=(0, 1))(table.dequantize(), factors)
    keep = np.arange(V) != 7  # the optimizer skips padding rows
    np.testing.assert_allclose(dense(grads["emb"], V)[keep], table_grad[keep], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(grads["w"], weight_grad if mode == "sum" else 0 * weight_grad, rtol=1e-5, atol=1e-3)
    assert not grads["emb"].missed()


def test_gradient_of_majority_is_that_of_sum(new_table):
    factor = np.arange(D, dtype=np.float32)
    grads = [dbj.grad(lambda t, mode=mode: jnp.sum(dbj.lookup_bag(t, IDS, SEGMENTS, G, mode) * factor))(new_table(V, D)) for mode in MODES]
    np.testing.assert_array_equal(grads[2].rows, grads[0].rows)


def test_vmap_and_unsorted(new_table):
    table = new_table(V, D)
    ids, segments = IDS.reshape(2, -1), SEGMENTS.reshape(2, -1)
    got = jax.vmap(lambda i, s: dbj.lookup_bag(table, i, s, G))(ids, segments)
    for k in range(2):
        want = jax.ops.segment_sum(table.dequantize()[ids[k]], segments[k], G)
        np.testing.assert_allclose(got[k], want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded(new_table, make_mesh, kind):
    mesh = make_mesh("x", kind=kind)
    one = new_table(V, D, padding_idx=7)
    ids, segments = (jax.device_put(x[:48], NamedSharding(mesh, PartitionSpec("x"))) for x in (IDS, SEGMENTS))
    for rows in ("x", None):
        table = jax.device_put(one, NamedSharding(mesh, PartitionSpec(rows)))
        for mode in MODES:
            run = jax.jit(lambda t, i, s, mode=mode: dbj.lookup_bag(t, i, s, G, mode))
            want = dbj.lookup_bag(one, IDS[:48], SEGMENTS[:48], G, mode)
            np.testing.assert_allclose(run(table, ids, segments), want, rtol=1e-5, atol=1e-6)
            if rows:
                assert not [line for line in run.lower(table, ids, segments).compile().as_text().splitlines() if "u8[40,3]" in line]


@pytest.mark.parametrize(
    ("mode", "dtype", "kind"),
    [
        *((mode, dtype, None) for mode in [*MODES, "weighted"] for dtype in (jnp.float32, jnp.bfloat16)),
        *((mode, jnp.bfloat16, kind) for mode in ("mean", "weighted") for kind in (AxisType.Auto, AxisType.Explicit)),
    ],
    ids=str,
)
def test_gradients_of_the_reference(new_table, request, mode, dtype, kind):
    """Bit for bit, of rows and of weights, on one device and with the rows spread over a mesh."""
    table, padding_idx = new_table(V, D, padding_idx=7), 3
    order = np.argsort(SEGMENTS, kind="stable")
    offsets, ids, name = np.searchsorted(SEGMENTS[order], np.arange(G + 1)), IDS[order], "sum" if mode == "weighted" else mode
    dy = np.random.default_rng(1).normal(size=(G, D)).astype(dtype)
    weights = WEIGHTS if mode == "weighted" else None
    counts = reference.bag_counts(table.scale, ids, offsets, padding_idx) if mode == "mean" else None
    factors = None if weights is None else weights[order]
    rows = reference.bag_gradient(ids, offsets, dy, name, counts, factors, padding_idx)
    outside = (np.arange(N) < offsets[0]) | (np.arange(N) >= offsets[-1]) | (ids == padding_idx)
    want_ids, want = reference.row_gradient(np.where(outside, -1, ids), rows, V)
    if kind is not None:
        mesh = request.getfixturevalue("make_mesh")("x", kind=kind)
        table = jax.device_put(table, NamedSharding(mesh, PartitionSpec("x")))

    def loss(params):
        bags = dbj.lookup_bag(params["emb"], IDS, SEGMENTS, G, name, params.get("w"), dtype, padding_idx=padding_idx - V)
        return jnp.sum(bags.astype(jnp.float32) * dy.astype(jnp.float32))

    params = {"emb": table} if weights is None else {"emb": table, "w": jnp.asarray(weights)}
    grads = jax.jit(dbj.grad(loss, ids=lambda _: {"emb": IDS}))(params)
    found = {int(row): np.asarray(sums) for row, sums in zip(grads["emb"].ids, grads["emb"].rows, strict=True)}
    assert all(np.array_equal(found[int(row)], sums) for row, sums in zip(want_ids, want, strict=True))
    assert not found[padding_idx].any()
    if weights is not None:
        slopes = reference.bag_weight_gradient(table.bits, table.scale, ids, offsets, dy, D, padding_idx)
        assert np.asarray(grads["w"])[order].tobytes() == slopes.tobytes()


def test_bad_ids(new_table, on_gpu):
    table = new_table(V, D)
    with pytest.raises(IndexError, match="got 40"):
        dbj.lookup_bag(table, [1, 40], [0, 0], 1)

    def run():
        return jax.block_until_ready(jax.jit(lambda i: dbj.lookup_bag(table, i, jnp.arange(2), 2))(jnp.array([1, 40])))

    if not on_gpu:
        with pytest.raises(jax.errors.JaxRuntimeError, match="40"):
            run()
        return
    dbj.check_errors()
    assert np.isnan(run()).all(1).tolist() == [False, True]
    with pytest.raises(IndexError, match="40"):
        dbj.check_errors()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([1, 2], [0], 1), ValueError, r"same|both have shape \[N\]"),
        (([[1]], [[0]], 1), ValueError, r"both have shape \[N\]"),
        (([1], [0], 0), ValueError, "num_segments must be at least 1"),
        (([1], [0.5], 1), TypeError, "segment_ids must be integers"),
        (([1], [0], 1, "max"), ValueError, "mode must be one of 'sum', 'mean', 'majority', got 'max'"),
        (([1], [0], 1, "mean", [1.0]), ValueError, "weights must be None with mode 'mean'"),
        (([1], [0], 1, "sum", [1.0, 2.0]), ValueError, "weights must be floats of shape"),
        (([1], [0], 1, "sum", [1]), ValueError, "weights must be floats"),
    ],
)
def test_arguments(new_table, arguments, error, match):
    with pytest.raises(error, match=match):
        dbj.lookup_bag(new_table(V, D), *arguments)
