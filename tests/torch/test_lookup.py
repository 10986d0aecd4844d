"""dualbin.torch.lookup: values, gradients, ids of every kind, and bad input."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin.torch as dbt
from dualbin import _errors
from dualbin.torch import _native_call


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_values(dim, dtype, ids_dtype):
    table = dbt.BinaryTable.from_float(torch.randn(30, dim), padding_idx=3)
    ids = torch.randint(0, 30, (4, 5), dtype=ids_dtype)
    rows = dbt.lookup(table, ids, dtype=dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows, F.embedding(ids, table.dequantize(dtype)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4)])
def test_ids_of_any_shape(table, shape):
    ids = torch.randint(0, 40, shape)
    rows = dbt.lookup(table, ids)
    assert rows.shape == (*shape, 20)
    assert torch.equal(rows, F.embedding(ids, table.dequantize()))
    rows.sum().backward()
    assert table.grad.ids.tolist() == ids.flatten().tolist()


def test_ids_that_are_not_contiguous(table):
    ids = torch.randint(0, 40, (6, 8)).t()[::2]
    assert not ids.is_contiguous()
    rows = dbt.lookup(table, ids)
    assert torch.equal(rows, F.embedding(ids, table.dequantize()))
    weight = torch.randn_like(rows)
    (rows * weight).sum().backward()
    assert table.grad.ids.tolist() == ids.flatten().tolist()


def test_default_dtype_is_the_tables_also_under_autocast():
    table = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(4, 6)).half())
    ids = torch.tensor([1])
    assert dbt.lookup(table, ids).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert dbt.lookup(table, ids).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_is_a_copy_of_dy(table, dtype):
    ids = torch.randint(0, 39, (3, 4))
    rows = dbt.lookup(table, ids, dtype=dtype)
    dy = torch.randn_like(rows)
    rows.backward(dy)
    grad = table.grad
    assert type(grad) is dbt.RowGrad
    assert grad.shape == table.shape
    assert grad.dtype == dtype
    assert torch.equal(grad.rows, dy.view(12, 20))
    assert grad.rows.data_ptr() != dy.data_ptr()  # the caller may fill it again
    assert torch.equal(grad.ids, ids.flatten())


def test_gradient_against_a_dense_table(table, dense, summed):
    weight, target = dense(table), torch.randn(5, 7, 20)
    ids = torch.randint(0, 39, (5, 7))
    (dbt.lookup(table, ids) - target).pow(2).sum().backward()
    (F.embedding(ids, weight) - target).pow(2).sum().backward()
    torch.testing.assert_close(summed(table.grad), weight.grad)


def test_functional_embedding_and_plain_modules(table, dense, summed):
    weight, ids = dense(table), torch.randint(0, 40, (30,))
    module = nn.Embedding(40, 20, padding_idx=7)
    module.weight = table
    assert torch.equal(module(ids), F.embedding(ids, weight))
    (module(ids) * 2).sum().backward()
    (F.embedding(ids, weight, padding_idx=7) * 2).sum().backward()
    torch.testing.assert_close(summed(table.grad), weight.grad)
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            F.embedding(ids, table, **option)


def test_nothing_is_recorded_where_no_gradient_is_needed(table):
    ids = torch.tensor([1, 2])
    with torch.no_grad():
        assert not dbt.lookup(table, ids).requires_grad
    with torch.inference_mode():
        assert torch.equal(dbt.lookup(table, ids), table.dequantize()[ids])
    assert dbt.lookup(table, ids).requires_grad
    table.requires_grad_(False)
    assert not dbt.lookup(table, ids).requires_grad


def test_a_buffer_of_ids_can_be_filled_again(table, dense, summed):
    weight, buffer = dense(table), torch.empty(6, dtype=torch.int64)
    for _ in range(3):
        buffer.random_(0, 39)
        dbt.lookup(table, buffer).sum().backward()
        F.embedding(buffer.clone(), weight).sum().backward()
        buffer.fill_(0)
    torch.testing.assert_close(summed(table.grad), weight.grad)


def test_flips_between_forward_and_backward_are_allowed(table):
    before = dbt.lookup(table, torch.tensor([1, 2]))
    loss = before.pow(2).sum()
    dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
    dbt.XOR([table]).step()
    loss.backward()
    assert torch.equal(table.grad.rows, 1 + 2 * before)


def test_out(table):
    ids = torch.tensor([[1, 2, 39]])
    out = torch.full((1, 3, 20), 7.0, dtype=torch.bfloat16)
    version = out._version
    with torch.no_grad():
        assert dbt.lookup(table, ids, out=out) is out
    assert torch.equal(out, table.dequantize(torch.bfloat16)[ids])
    assert out._version > version


@pytest.mark.parametrize(
    ("out", "dtype", "error", "message"),
    [
        (torch.empty(2, 20), None, ValueError, "out must be a contiguous tensor of shape"),
        (torch.empty(20, 3).t(), None, ValueError, "out must be a contiguous tensor of shape"),
        (torch.empty(3, 20, device="meta"), None, ValueError, "out must be a contiguous tensor of shape"),
        (torch.empty(3, 20, dtype=torch.float64), None, TypeError, "out must be a tensor of float32"),
        (torch.empty(3, 20), torch.float16, TypeError, "out must have dtype torch.float16"),
        (np.empty((3, 20), np.float32), None, TypeError, "out must be a tensor of float32"),
    ],
)
@torch.no_grad()
def test_bad_out(table, out, dtype, error, message):
    with pytest.raises(error, match=message):
        dbt.lookup(table, torch.tensor([1, 2, 3]), dtype=dtype, out=out)


def test_out_is_refused_where_a_gradient_is_needed(table):
    with pytest.raises(ValueError, match="out cannot be used where a gradient is required"):
        dbt.lookup(table, torch.tensor([1]), out=torch.empty(1, 20))


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
@pytest.mark.parametrize("use_out", [False, True])
def test_bad_ids_name_the_id(table, bad, use_out):
    ids = torch.tensor([0, 5, bad, 3])
    out = torch.full((4, 20), 7.0) if use_out else None
    with torch.no_grad(), pytest.raises(IndexError, match=str(bad)):
        dbt.lookup(table, ids, out=out)
    assert out is None or bool((out == 7).all())


@pytest.mark.parametrize(
    ("ids", "dtype", "error", "message"),
    [
        (torch.tensor([1.0]), None, TypeError, "ids must be a tensor of int32 or int64, got torch.float32"),
        (torch.tensor([1], dtype=torch.uint8), None, TypeError, "ids must be a tensor of int32 or int64"),
        ([1, 2], None, TypeError, "ids must be a tensor of int32 or int64, got a list"),
        (torch.tensor([1], device="meta"), None, ValueError, "ids must be on the device of the table, cpu, got meta"),
        (torch.tensor([1]), torch.float64, TypeError, "dtype must be torch.float32"),
    ],
)
def test_bad_arguments(table, ids, dtype, error, message):
    with pytest.raises(error, match=message):
        dbt.lookup(table, ids, dtype=dtype)


def test_a_dense_table_is_refused():
    with pytest.raises(TypeError, match=r"table must be a dualbin\.torch\.BinaryTable, got a Tensor"):
        dbt.lookup(torch.zeros(3, 4), torch.tensor([1]))


def test_operators_give_the_same(table):
    ids = torch.randint(0, 40, (3, 4))
    expected = dbt.lookup(table, ids)
    assert torch.equal(torch.ops.dualbin.lookup(table, ids), expected)
    assert torch.equal(torch.ops.dualbin.lookup_packed(table.bits, table.scale, ids, 20, torch.float32), expected)
    torch.ops.dualbin.lookup(table, ids).sum().backward()
    assert type(table.grad) is dbt.RowGrad


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_traced_lookup_looks_rows_up():
    """The tracer records operators only: a call past them would leave the memory of the trace as the result."""
    emb, ids = dbt.BinaryEmbedding(40, 20).requires_grad_(False), torch.tensor([3, 1, 38])
    traced = torch.jit.trace(emb, torch.tensor([1, 2]), check_trace=False)
    assert torch.equal(traced(ids), emb(ids))


def test_vmap_over_ids(table):
    ids = torch.randint(0, 40, (3, 4))
    assert torch.equal(torch.func.vmap(lambda row: dbt.lookup(table, row))(ids), dbt.lookup(table, ids))


def test_meta_tables():
    table = dbt.BinaryTable.from_float(torch.randn(4, 6)).to("meta")
    rows = dbt.lookup(table, torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    assert rows.shape == (2, 3, 6)
    assert rows.is_meta


def test_check_errors_has_nothing_to_report_on_the_cpu(table):
    with pytest.raises(IndexError):
        dbt.lookup(table, torch.tensor([99]))
    assert dbt.check_errors() is None


def test_check_errors_names_devices_counts_and_ids(monkeypatch):
    class Native:
        def take_errors(self):
            return {1: (3, -77), 0: (1, 5)}

    monkeypatch.setattr(_errors, "load_native", lambda: (Native(), ""))
    with pytest.raises(IndexError, match="1 on cuda:0, the first is 5; 3 on cuda:1, the first is -77"):
        dbt.check_errors()


@pytest.mark.parametrize(
    ("name", "message"), [("cuda:0", "got cuda:0: this dualbin was built without CUDA code"), ("meta", "a CPU or a CUDA device, got meta")]
)
def test_devices_without_code_are_refused(name, message):
    if name == "cuda:0" and _native_call.HAS_CUDA:
        pytest.skip("this build has CUDA code")
    with pytest.raises(ValueError, match=message):
        _native_call.ordinal(torch.device(name))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of pages")
@pytest.mark.parametrize("size", [2**23, 2**26])
def test_large_results_come_in_huge_pages(size):
    """As far as the system has any; the values are those of small pages."""
    dim, rows = 256, size // 1024 + 3
    table = dbt.BinaryTable(torch.arange(10 * 32, dtype=torch.int64).to(torch.uint8).reshape(10, 32), torch.full((10, 1), 0.5), dim)
    ids = torch.arange(rows) % 10
    out = dbt.lookup(table, ids)
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    address = out.data_ptr() + out.nbytes // 2
    holding = [text for text in mappings if any(low <= address < high for low, high in _ranges(text))]
    flags = [mappings[mappings.index(text) + 1].split("\n")[0].split() for text in holding]
    assert len(flags) == 1
    assert "hg" in flags[0]
    assert torch.equal(out, dbt.lookup(table, ids, out=torch.empty(rows, dim)))
    assert dbt.lookup(table, ids[:5]).equal(out[:5])


def _ranges(text):
    return [tuple(int(x, 16) for x in match) for match in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", text, re.MULTILINE)]
