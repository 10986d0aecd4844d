"""Whole training scripts: AdamW and XOR side by side on real text, and the same under torch.compile."""

import pydoc_data.topics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin.torch as dbt
from dualbin import rules


def text(length=20_000):
    """English of Python's documentation as byte values."""
    joined = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return torch.tensor(list(joined.encode("ascii", "replace")[:length]))


class Model(nn.Module):
    """Predicts the next byte from the last three."""

    def __init__(self):
        super().__init__()
        self.emb = dbt.BinaryEmbedding(128, 60)
        self.body = nn.Sequential(nn.Linear(180, 64), nn.ReLU(), nn.Linear(64, 128))

    def forward(self, ids):
        return self.body(self.emb(ids).flatten(1))


def train(model, steps, train_table=True):
    """The mean loss of the first and the last 20 steps."""
    data, generator = text(), torch.Generator().manual_seed(1)
    table = model.emb.weight.requires_grad_(train_table)
    optimizers = [torch.optim.AdamW(model.body.parameters(), lr=3e-3)]
    if train_table:
        optimizers.append(dbt.XOR([table], rule=rules.Counter(4)))
    losses = []
    for _ in range(steps):
        at = torch.randint(0, len(data) - 4, (64,), generator=generator)
        for half in at.split(32):
            loss = F.cross_entropy(model(data[half[:, None] + torch.arange(3)]), data[half + 3]) / 2
            loss.backward()
            losses.append(2 * loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return sum(losses[:40]) / 40, sum(losses[-40:]) / 40


def test_adamw_and_xor_learn_real_text():
    model = Model()
    before = model.emb.weight.detach().clone()
    first, last = train(model, 300)
    assert last < first - 1.0
    assert not torch.equal(model.emb.weight, before)
    torch.manual_seed(0)
    _, untrained = train(Model(), 300, train_table=False)
    assert last < untrained


def test_xor_alone_fits_a_small_target():
    """Nothing but flips and scales: the error comes close to what one bit a weight can reach."""
    target = torch.randn(50, 32)
    table = nn.Parameter(dbt.BinaryEmbedding(50, 32).weight.detach())

    def error(table):
        return (table.dequantize() - target).pow(2).mean().item()

    untrained = error(table)
    optimizer, ids = dbt.XOR([table], scale_lr=1e-2), torch.arange(50)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    for _ in range(400):
        (dbt.lookup(table, ids) - target).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    best = error(dbt.BinaryTable.from_float(target))
    assert best <= error(table) < 1.35 * best
    assert best < 0.5 * untrained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_gives_the_bits_of_eager(dtype):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        emb = dbt.BinaryEmbedding(64, 20, padding_idx=5, dtype=dtype)
        optimizer = dbt.XOR(emb.parameters())

        def loss_of(ids, more, emb=emb):
            return emb(ids).float().sin().sum() + dbt.lookup(emb.weight, more).float().pow(3).sum()

        function = torch.compile(loss_of, backend="aot_eager", fullgraph=True) if compiled else loss_of
        for _ in range(3):
            for summed in (False, True):
                function(torch.randint(0, 64, (4, 6)), torch.randint(0, 64, (3,))).backward()
                assert type(emb.weight.grad) is dbt.RowGrad
                assert emb.weight.grad.dtype == (torch.float32 if summed else dtype)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(emb.weight)
    assert torch.equal(runs[0], runs[1])


def test_compiled_functional_embedding_and_frozen_table(table):
    torch._dynamo.reset()
    ids = torch.randint(0, 39, (3, 4))
    function = torch.compile(lambda ids: F.embedding(ids, table) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(function(ids), dbt.lookup(table, ids) * 2)
    table.requires_grad_(False)
    assert torch.equal(function(ids), dbt.lookup(table, ids) * 2)


def test_a_compiled_step_runs_as_it_is(table):
    torch._dynamo.reset()
    other = nn.Parameter(table.detach().clone())
    for parameter, compiled in ((table, False), (other, True)):
        optimizer = dbt.XOR([parameter])
        dbt.lookup(parameter, torch.arange(9)).sum().backward()
        (torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step)()
        assert optimizer.stats(parameter)["flips"] > 0
    assert torch.equal(table, other)


def test_dynamic_shapes_do_not_recompile_for_every_batch(table, dense, summed):
    torch._dynamo.reset()
    weight = dense(table)
    function = torch.compile(lambda ids: dbt.lookup(table, ids).sin().sum(), backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (5, 3, 7):
        ids = torch.randint(0, 39, (count, 2))
        with torch.compiler.set_stance("default" if count == 5 else "fail_on_recompile"):
            function(ids).backward()
        F.embedding(ids, weight).sin().sum().backward()
    torch.testing.assert_close(summed(table.grad), weight.grad)


def test_compiled_code_checks_its_arguments(table):
    torch._dynamo.reset()
    function = torch.compile(lambda ids: dbt.lookup(table, ids), backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match="40"):
        function(torch.tensor([1, 40]))


def test_operator_registrations(table):
    ids = torch.randint(0, 39, (3, 4))
    arguments = (table.bits, table.scale, ids, 20, torch.bfloat16)
    torch.library.opcheck(torch.ops.dualbin.lookup_packed.default, arguments, test_utils=("test_schema", "test_faketensor"))
