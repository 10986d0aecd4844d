"""New rows for a trained table: what was learned stays to the bit, and training goes on as if the table had always been larger."""

import copy

import pytest
import torch
from torch import nn

import dualbin.torch as dbt
from dualbin.rules import Bop, Counter, Sign

V, D, MORE = 30, 13, 7
RULES = [Counter(8), Counter(1), Counter(4, every=3), Bop(), Sign()]


def step(module, optimizer, seed, rows=V):
    ids = torch.randint(0, rows, (8, 5), generator=torch.Generator().manual_seed(seed))
    module(ids).sub(0.3).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale_lr", [0.0, 0.05])
@pytest.mark.parametrize("kind", [dbt.BinaryEmbedding, dbt.BinaryEmbeddingBag])
def test_training_goes_on_to_the_same_bits(rule, scale_lr, kind):
    module = kind(V, D, padding_idx=3)
    optimizer = dbt.XOR(module.parameters(), rule=rule, scale_lr=scale_lr)
    for seed in range(7):  # the window of every=3 is open
        step(module, optimizer, seed)
    small = copy.deepcopy(module)
    other = dbt.XOR(small.parameters(), rule=rule, scale_lr=scale_lr)
    other.load_state_dict(optimizer.state_dict())
    parameter = module.weight
    dbt.grow(module, V + MORE, optimizer=optimizer)
    assert module.weight is parameter is optimizer.param_groups[0]["params"][0]
    assert (module.num_embeddings, tuple(parameter.shape), parameter.requires_grad) == (V + MORE, (V + MORE, D), True)
    assert repr(module).startswith(f"{kind.__name__}({V + MORE}, {D}, ")
    for seed in range(7, 14):
        step(module, optimizer, seed)
        step(small, other, seed)
    assert torch.equal(parameter.bits[:V], small.weight.bits)
    assert torch.equal(parameter.scale[:V], small.weight.scale)
    assert optimizer.state[parameter].keys() == other.state[small.weight].keys()
    for name, array in other.state[small.weight].items():
        mine = optimizer.state[parameter][name]
        if isinstance(array, torch.Tensor) and len(array) == V:
            assert torch.equal(mine[:V], array)
            assert mine.shape == (V + MORE, *array.shape[1:])
            assert not mine[V:].any()
        else:
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(array))
    before = parameter.detach().clone()
    for seed in range(14, 20):
        step(module, optimizer, seed, rows=V + MORE)
    assert not torch.equal(parameter.bits[V:], before.bits[V:])


def test_new_rows_are_random_or_given():
    module = dbt.BinaryEmbedding(2000, 64, padding_idx=5)
    module.weight.scale[:1000] = -0.5  # a scale may become negative in a file, its size counts
    module.weight.scale[5] = 0
    old = module.weight.detach().clone()
    dbt.grow(module, 4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module.weight[:2000], old)
    size = (999 * 0.5 + 1000 * float(torch.tensor(0.3))) / 1999
    torch.testing.assert_close(module.weight.scale[2000:], torch.full((2000, 1), size))
    share = (module.weight.dequantize()[2000:] > 0).float().mean()
    assert abs(share - 0.5) < 0.01
    again = copy.deepcopy(module)
    dbt.grow(module, 4001, generator=torch.Generator().manual_seed(2))
    dbt.grow(again, 4001, generator=torch.Generator().manual_seed(2))
    assert torch.equal(module.weight, again.weight)
    values = torch.randn(3, 64)
    dbt.grow(module, 4004, values=values)
    assert torch.equal(module.weight[4001:], dbt.BinaryTable.from_float(values))


def test_new_rows_of_a_module_with_spread_are_near_the_common_pattern():
    module = dbt.BinaryEmbedding(500, 64, spread=0.1)
    pattern = module.weight.dequantize().sum(0).sign()
    dbt.grow(module, 1000)
    differ = (module.weight.dequantize()[500:].sign() != pattern).float().mean()
    assert 0.08 < differ < 0.12


def test_gradients_frozen_rows_and_sharing_modules():
    first, second = dbt.BinaryEmbedding(V, D), dbt.BinaryEmbedding(V, D)
    second.weight = first.weight
    dbt.freeze_rows(first, [2])
    second(torch.tensor([1, 2])).sum().backward()
    dbt.grow(first, V + MORE)
    assert first.weight.grad.shape == first.weight.shape
    assert first.weight.frozen.nonzero().flatten().tolist() == [2]
    (second(torch.tensor([V + 1])) + first(torch.tensor([2]))).sum().backward()
    assert sorted({*first.weight.grad.ids.tolist()}) == [1, 2, V + 1]
    before = first.weight.detach().clone()
    dbt.XOR([first.weight], rule=Sign()).step()
    changed = (first.weight.bits != before.bits).any(1).nonzero().flatten().tolist()
    assert changed == [1, V + 1]


@pytest.mark.parametrize("hooked", [False, True])
def test_growing_between_forward_and_backward_or_with_hooks(hooked):
    """A hook keeps torch's node for the parameter alive, which remembers the old shape."""
    module, seen = dbt.BinaryEmbedding(V, D), []
    if hooked:
        module.weight.register_post_accumulate_grad_hook(lambda table: seen.append(table.grad.shape))
    optimizer = dbt.XOR(module.parameters())
    step(module, optimizer, 0)
    dbt.grow(module, V + MORE, optimizer=optimizer)
    step(module, optimizer, 1, rows=V + MORE)
    assert [tuple(shape) for shape in seen] == [(V, D), (V + MORE, D)] * hooked


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((V,), {}, ValueError, "num_embeddings must be at least 31, got 30"),
        ((40.0,), {}, TypeError, "num_embeddings must be an integer"),
        ((40,), {"values": torch.randn(9, D)}, ValueError, r"values must have shape \[10, 13\] on cpu, got \[9, 13\]"),
        ((40,), {"values": torch.full((10, D), torch.nan)}, ValueError, "values of grow: w must be finite, got nan"),
        ((40,), {"values": [1.0]}, TypeError, "values of grow: w must be a tensor of float32"),
        ((40,), {"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "optimizer must be the XOR that trains the table, got a SGD"),
        ((40,), {"optimizer": dbt.XOR(dbt.BinaryEmbedding(3, 3).parameters())}, ValueError, "got one that does not"),
    ],
)
def test_arguments_that_are_refused(arguments, options, error, message):
    module = dbt.BinaryEmbedding(V, D)
    before = module.weight.detach().clone()
    with pytest.raises(error, match=message):
        dbt.grow(module, *arguments, **options)
    assert torch.equal(module.weight, before)


def test_modules_that_are_refused(alone):
    for module in (nn.Embedding(V, D), dbt.ShardedBinaryEmbedding(V, D), dbt.BinaryEmbedding(V, D).weight):
        with pytest.raises(TypeError, match=f"module of grow must be .*, got a {type(module).__name__}"):
            dbt.grow(module, V + 1)


def test_a_table_without_contents_does_not_grow():
    with pytest.raises(ValueError, match="must not be on the meta device: load its table first"):
        dbt.grow(dbt.BinaryEmbedding(V, D, device="meta"), V + 1)


def test_a_forgotten_optimizer_is_noticed():
    module = dbt.BinaryEmbedding(V, D)
    optimizer = dbt.XOR(module.parameters())
    step(module, optimizer, 0)
    dbt.grow(module, V + MORE)
    with pytest.raises(ValueError, match=r"of shape \[37, 14\], got .*torch\.grow\(module, rows, optimizer"):
        step(module, optimizer, 1)
