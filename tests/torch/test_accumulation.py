"""Gradients of several backward passes: in which order they are summed, and what that costs."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin import reference, rules


def sum_in_order(parts, rows):
    """ids and rows as docs/design.md defines them: each part is summed by rows, then the sums are added in order."""
    total = {}
    for ids, dy in parts:
        part_ids, sums = reference.row_gradient(ids.numpy(), dy.float().numpy(), rows)
        for row, values in zip(part_ids.tolist(), sums, strict=True):
            total[row] = total[row] + values if row in total else values
    return sorted(total), np.stack([total[row] for row in sorted(total)])


def batches(count, rows, dim, sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    for step in range(count):
        n = sizes[step % len(sizes)]
        magnitude = 10.0 ** torch.randint(-4, 4, (n, 1), generator=generator)
        yield torch.randint(0, rows, (n,), generator=generator), (torch.randn(n, dim, generator=generator) * magnitude).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "rows", "sizes"),
    [
        (2, 1000, (30,)),  # beside each other
        (3, 20, (100, 3)),  # more occurrences than rows: one array, from the first on
        (150, 4000, (7, 1)),  # more than one block of parts
        (40, 300, (25, 60)),  # beside each other first, then one array
        (1, 50, (90,)),
    ],
)
def test_the_order_of_the_sum_does_not_depend_on_how_it_is_held(count, rows, sizes, dtype):
    table = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))))
    looked_at = copy.deepcopy(table)
    parts = list(batches(count, rows, 5, sizes, dtype))
    for step, (ids, dy) in enumerate(parts):
        for parameter in (table, looked_at):
            dbt.lookup(parameter, ids, dtype=dtype).backward(dy)
        if step % 3 == 1:
            looked_at.grad.rows  # noqa: B018  (makes the sum)
    expected_ids, expected = sum_in_order(parts, rows)
    for grad in (looked_at.grad, table.grad.coalesce(), table.grad):
        grad = grad.coalesce() if count == 1 else grad  # noqa: PLW2901
        assert grad.rows.dtype == torch.float32
        assert grad.ids.tolist() == expected_ids
        np.testing.assert_array_equal(grad.rows.numpy(), expected)


def test_arithmetic_adds_in_the_same_order():
    parts = list(batches(4, 30, 5, (40,)))
    grads = [dbt.RowGrad(ids, dy, (30, 5)) for ids, dy in parts]
    expected_ids, expected = sum_in_order(parts, 30)
    total = grads[0] + grads[1] + grads[2] + grads[3]
    assert total.ids.tolist() == expected_ids
    np.testing.assert_array_equal(total.rows.numpy(), expected)
    assert [grad.ids.shape[0] for grad in grads] == [40] * 4
    with pytest.raises(IndexError, match=r"ids must be in \[0, 30\)"):
        grads[0] + dbt.RowGrad(torch.tensor([30]), torch.zeros(1, 5), (30, 5))


@pytest.mark.parametrize("size", [4, 60])
def test_a_window_of_steps_and_micro_batches_give_the_same_bits(size):
    steps = list(batches(3, 40, 9, (size,)))
    tables = [nn.Parameter(dbt.BinaryTable.from_float(torch.randn(40, 9, generator=torch.Generator().manual_seed(1)))) for _ in range(2)]
    window, once = dbt.XOR([tables[0]], rule=rules.Counter(8, every=3)), dbt.XOR([tables[1]], rule=rules.Counter(8))
    for ids, dy in steps:
        for table in tables:
            dbt.lookup(table, ids).backward(dy)
        window.step()
        window.zero_grad()
    once.step()
    assert torch.equal(*tables)
    assert once.stats() == window.stats()


def test_nothing_but_the_rows_makes_the_sum(table):
    for _ in range(3):
        dbt.lookup(table, torch.tensor([1, 2])).sum().backward()
        table.grad += table.grad.new_zeros(0)
        assert not table.grad.requires_grad
        assert table.grad.grad_fn is None
    assert len(table.grad._held) == 1
    assert table.grad.rows.tolist() == [[3.0] * 20] * 2


def test_lookups_of_one_backward_pass_are_one_list_of_occurrences(table):
    ids, dy = torch.tensor([3, 3, 7]), torch.randn(3, 20)
    ((dbt.lookup(table, ids) * dy).sum() + (dbt.lookup(table, ids) * dy).sum()).backward()
    assert table.grad.ids.tolist() == [3, 3, 7, 3, 3, 7]


@pytest.mark.parametrize("size", [3, 50])
def test_a_sum_is_copied_pickled_scaled_and_cleared(size, tmp_path, summed):
    table = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(30, 5)))

    def accumulate():
        for ids, dy in batches(3, 30, 5, (size,)):
            dbt.lookup(table, ids).backward(dy)

    accumulate()
    expected = summed(table.grad)
    for copied in (copy.deepcopy, lambda grad: pickle.loads(pickle.dumps(grad)), torch.clone, lambda grad: grad.detach()):
        table.grad = None
        accumulate()
        again = copied(table.grad)
        torch.testing.assert_close(summed(again), expected, rtol=0, atol=0)
        table.grad.mul_(0.5)
        torch.testing.assert_close(summed(table.grad), expected / 2)
    table.grad = None
    accumulate()
    torch.save(table.grad, tmp_path / "grad.pt")
    torch.testing.assert_close(summed(torch.load(tmp_path / "grad.pt", weights_only=True)), expected, rtol=0, atol=0)
    dbt.XOR([table]).zero_grad(set_to_none=False)
    assert table.grad.ids.numel() == 0
    accumulate()
    torch.testing.assert_close(summed(table.grad), expected, rtol=0, atol=0)


def test_what_a_hook_keeps_does_not_change_when_more_is_added(summed):
    table, kept = nn.Parameter(dbt.BinaryTable.from_float(torch.randn(30, 5))), []
    table.register_post_accumulate_grad_hook(lambda parameter: kept.append((parameter.grad.clone(), summed(parameter.grad))))
    for ids, dy in batches(4, 30, 5, (50,)):
        dbt.lookup(table, ids).backward(dy)
    for grad, then in kept:
        assert torch.equal(summed(grad), then)


def test_slots_that_are_not_used():
    """What a GPU keeps, where counting would wait."""
    from dualbin.torch import _native_call

    ids, rows = torch.tensor([7, 2, 7, 2]), torch.ones(4, 3)
    out_ids, sums = _native_call.reduce_rows(ids, rows, 9, wait=False)
    assert out_ids.tolist() == [2, 7, 9, 9]
    assert sums.tolist() == [[2.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3]


def held_bytes(parameter):
    grad = parameter.grad
    return grad.ids.nbytes + grad.rows.nbytes if isinstance(grad, dbt.RowGrad) else grad.nbytes


def test_many_micro_batches_take_no_more_memory_and_time_than_a_dense_gradient():
    rows, dim, count = 8000, 128, 24
    modules = nn.Embedding(rows, dim), dbt.BinaryEmbedding(rows, dim)
    ids = torch.randint(0, rows, (count, 2048))
    best = float("inf")
    for _ in range(4):
        times = []
        for module in modules:
            module.weight.grad = None
            start = time.process_time()
            for batch in ids:
                module(batch).sum().backward()
            times.append(time.process_time() - start)
        best = min(best, times[1] / times[0])
        if best <= 1.3:
            break
    assert best <= 1.3
    assert held_bytes(modules[1].weight) <= 1.05 * held_bytes(modules[0].weight)


def test_few_rows_of_a_large_table_take_few_bytes():
    module = dbt.BinaryEmbedding(1_000_000, 16)
    for _ in range(40):
        module(torch.randint(0, 1000, (500,))).sum().backward()
    assert held_bytes(module.weight) <= 1000 * (16 * 4 + 8)
