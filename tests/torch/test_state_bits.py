"""The packed bits of a state_dict: tensors as others, except that they cannot be averaged as bytes."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import dualbin.torch as dbt


def model():
    return nn.Sequential(dbt.BinaryEmbedding(20, 13), dbt.BinaryEmbeddingBag(20, 13))


def by_copies(ema, new):
    for key, value in ema.items():
        value.copy_(0.9 * value + 0.1 * new[key])


def in_place(ema, new):
    for key, value in ema.items():
        value.mul_(0.9).add_(new[key], alpha=0.1)


def by_floats(ema, new):
    for key, value in ema.items():
        ema[key] = (value.float() * 0.9 + new[key].float() * 0.1).to(value.dtype)


def by_lerp(ema, new):
    for key, value in ema.items():
        ema[key] = torch.lerp(value.float(), new[key].float(), 0.1)


def by_foreach(ema, new):
    torch._foreach_mul_([*ema.values()], 0.9)


def by_difference(ema, new):
    for key in ema:
        ema[key] -= 0.1 * (ema[key] - new[key])


def soup(ema, new):
    for key in ema:
        ema[key] = torch.stack([ema[key], new[key]]).float().mean(0)


def soup_of_sums(ema, new):
    for key in ema:
        ema[key] = sum([ema[key], new[key]]) / 2


@pytest.mark.parametrize("average", [by_copies, in_place, by_floats, by_lerp, by_foreach, by_difference, soup, soup_of_sums])
def test_averages_of_a_state_dict_name_the_call(average):
    ema, new = copy.deepcopy(model().state_dict()), model().state_dict()
    with pytest.raises(NotImplementedError, match=r"dualbin\.torch\.average.*lerp_"):
        average(ema, new)


def through_a_file(state, **options):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize(
    "way",
    [
        lambda state: through_a_file(state, weights_only=True),
        lambda state: through_a_file(state, weights_only=False),
        lambda state: pickle.loads(pickle.dumps(state)),
        lambda state: load(save(state)),
        lambda state: {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()},
    ],
)
def test_what_is_saved_is_plain(way):
    first, second = model(), model()
    state = way(first.state_dict())
    assert {type(value) for value in state.values()} == {torch.Tensor}
    second.load_state_dict(state)
    assert torch.equal(second[0].weight, first[0].weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda s: {k: v.clone().to("cpu") for k, v in s.items()}, lambda s: {k: v.detach() for k, v in s.items()}]
)
def test_copies_load_and_leave_tables_plain(way, assign):
    first, second = model(), model()
    second.load_state_dict(way(first.state_dict()), assign=assign)
    for mine, other in zip(second, first, strict=True):
        assert torch.equal(mine.weight, other.weight)
        assert type(mine.weight.bits) is torch.Tensor
    ids = torch.tensor([[1, 2]])
    assert torch.equal(second[0](ids), first[0](ids))


def test_it_is_the_memory_of_the_table_and_compares_as_any_tensor():
    module = model()[0]
    bits = module.state_dict()["weight.bits"]
    assert bits.data_ptr() == module.weight.bits.data_ptr()
    other = bits.clone()
    assert torch.equal(bits, other)
    torch.testing.assert_close(bits, other)
    other[0] ^= 255
    assert int((bits != other).sum()) == 2
    assert (bits == other).float().mean() * 100 == 95
    bits.zero_()
    assert not module.weight.bits.any()
    assert (bits.dtype, bits.shape, bits.tolist()) == (torch.uint8, (20, 2), [[0, 0]] * 20)


def _received(queue, state):
    queue.put([type(value).__name__ for value in state.values()])


def test_a_state_dict_goes_to_another_process():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_received, args=(queue, model().state_dict()))
    process.start()
    assert set(queue.get(timeout=120)) == {"Tensor"}
    process.join()


def test_averages_of_modules_do_what_was_meant():
    ema, new = model(), model()
    with torch.no_grad():
        for _ in range(100):
            for a, b in zip(ema.parameters(), new.parameters(), strict=True):
                a.lerp_(b, 0.2)
    assert torch.equal(ema[0].weight.bits, new[0].weight.bits)
