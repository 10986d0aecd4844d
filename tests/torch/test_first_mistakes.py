"""What a newcomer tries first, and what the library says to it."""

import warnings

import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin.rules import Counter


@pytest.fixture
def model():
    """Dense parameters before and behind a table, each with a gradient."""
    made = nn.Sequential(nn.Linear(3, 3), dbt.BinaryEmbedding(20, 16), nn.Linear(16, 2))
    (made[0](torch.ones(3)).sum() + made[2](made[1](torch.arange(4))).sum()).backward()
    return made


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SparseAdam, {}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_an_optimizer_of_all_parameters_fails_before_it_changes_any(model, kind, options, grouped):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = [{"params": list(part.parameters())} for part in model] if grouped else model.parameters()
    optimizer = kind(groups, **options)
    with pytest.raises(TypeError, match=rf"^{kind.__name__} cannot train a BinaryTable, got one of shape \(20, 16\) as parameter.*XOR"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_the_line_of_the_message_works(model):
    adam = torch.optim.Adam([p for p in model.parameters() if not isinstance(p, dbt.BinaryTable)])
    before = model[0].weight.detach().clone()
    adam.step()
    assert not torch.equal(before, model[0].weight)


def test_a_table_without_a_gradient_is_nobodys_business(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1].requires_grad_(False)
    model[1].weight.grad = None
    optimizer.step()


def test_optimizers_of_others_may_hold_one_of_tables(model):
    class Both(torch.optim.Optimizer):
        def __init__(self, *parts):
            self.parts = parts
            super().__init__([group for part in parts for group in part.param_groups], {})

        def step(self, closure=None):
            assert closure is None
            for part in self.parts:
                part.step()

    before = model[1].weight.detach().clone()
    Both(torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1), dbt.XOR([model[1].weight])).step()
    assert not torch.equal(before, model[1].weight)


@pytest.mark.parametrize("add", ["register_step_pre_hook", "register_step_post_hook", "global_pre", "global_post"])
def test_hooks_of_users_still_run(model, add):
    from torch.optim import optimizer

    calls = []
    xor = dbt.XOR([model[1].weight])
    register = {
        "global_pre": optimizer.register_optimizer_step_pre_hook,
        "global_post": optimizer.register_optimizer_step_post_hook,
    }.get(add) or getattr(xor, add)
    handle = register(lambda *_: calls.append(1))
    try:
        xor.step()
    finally:
        handle.remove()
    xor.step()
    assert calls == [1]


def test_a_rate_of_dense_optimizers_gets_a_warning():
    table = dbt.BinaryEmbedding(20, 16).weight
    with pytest.warns(UserWarning, match=r"XOR\(lr=0\.001\): 1 is the tuned step") as caught:
        dbt.XOR([{"params": [table]}], lr=1e-3)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="XOR"):
        dbt.XOR([{"params": [table], "lr": 3e-4}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (0.0, 0.1, 1.0, torch.tensor(1e-3)):
            dbt.XOR([table], lr=rate, capturable=isinstance(rate, torch.Tensor))
        xor = dbt.XOR([table], rule=Counter(4))
        xor.param_groups[0]["lr"] = 1e-6  # as a schedule ends
        dbt.lookup(table, torch.arange(3)).sum().backward()
        xor.step()


def test_options_of_nn_embedding_by_position():
    """In its order, behind padding_idx: with its defaults they say nothing, and else they are refused by name."""
    assert dbt.BinaryEmbedding(20, 16, 3, None, 2.0, False, False).padding_idx == 3
    assert dbt.BinaryEmbedding.from_pretrained(torch.ones(20, 16), True, 3, None, 2.0, False, False).padding_idx == 3
    with pytest.raises(ValueError, match=r"max_norm=1\.0 of nn\.Embedding cannot be used with a packed table"):
        dbt.BinaryEmbedding(20, 16, None, 1.0)
    with pytest.raises(ValueError, match=r"sparse=True of nn\.Embedding"):
        dbt.BinaryEmbedding.from_pretrained(torch.ones(20, 16), True, None, None, 2.0, False, True)
    with pytest.raises(ValueError, match=r"mode must be one of.*where nn\.EmbeddingBag has max_norm"):
        dbt.BinaryEmbeddingBag(20, 16, 1.0)
    with pytest.raises(TypeError, match="BinaryEmbedding got max_norm by position and by name"):
        dbt.BinaryEmbedding(20, 16, None, None, max_norm=None)
    with pytest.raises(TypeError, match=r"after max_norm.*must be given by name, got \('cpu',\)"):
        dbt.BinaryEmbedding(20, 16, None, None, 2.0, False, False, None, False, "cpu")


def test_rows_by_brackets_name_the_call(model):
    table = model[1].weight
    for ids in (torch.arange(3), 3, torch.ones(20, dtype=torch.bool)):
        with pytest.raises(NotImplementedError, match=r"table\[ids\] is dualbin\.torch\.lookup\(table, ids\)"):
            table[ids]


def test_a_lookup_says_what_it_got(model):
    ids = torch.arange(3)
    with pytest.raises(TypeError, match="got a BinaryEmbedding: give its weight, or call it"):
        dbt.lookup(model[1], ids)
    with pytest.raises(TypeError, match=r"got a Parameter: BinaryTable\.from_float packs floats"):
        dbt.lookup(model[0].weight, ids)
    jax = pytest.importorskip("jax")
    import dualbin.jax as dbj

    table = dbj.BinaryTable.create(jax.random.key(0), 20, 16)
    with pytest.raises(TypeError, match=r"got a dualbin\.jax\._table\.BinaryTable: dualbin\.torch\.from_jax makes one of it"):
        dbt.lookup(table, ids)
    with pytest.raises(TypeError, match=r"got dualbin\.torch\._table\.BinaryTable: dualbin\.jax\.from_torch makes one of it"):
        dbj.lookup(model[1].weight, [1])
