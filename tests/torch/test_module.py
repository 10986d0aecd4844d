"""BinaryEmbedding: construction, padding, conversion, state_dict."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dualbin.torch as dbt
from dualbin import reference

IDS = torch.tensor([[3, 3, 7], [0, 3, 9]])


class Net(nn.Module):
    def __init__(self, rows=10, dim=11, **options):
        super().__init__()
        self.emb = dbt.BinaryEmbedding(rows, dim, **options)
        self.head = nn.Linear(dim, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.emb(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_new_module(dtype):
    emb = dbt.BinaryEmbedding(1000, 12, dtype=dtype)
    assert isinstance(emb, nn.Embedding)
    assert (emb.weight.bits.shape, emb.weight.bits.dtype) == ((1000, 2), torch.uint8)
    assert not bool((emb.weight.bits[:, 1] >> 4).any())
    signs = emb.weight.dequantize().sign()
    assert abs(float(signs.float().mean())) < 0.05
    assert torch.equal(emb.weight.scale, torch.full((1000, 1), 0.3))
    rows = emb(IDS)
    assert (rows.shape, rows.dtype) == ((2, 3, 12), dtype)
    assert torch.equal(rows, F.embedding(IDS, emb.weight.dequantize()))
    assert "1000, 12" in repr(emb)


def test_generator_and_scale():
    a, b = (dbt.BinaryEmbedding(50, 12, generator=torch.Generator().manual_seed(5), scale=0.1) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight.bits, dbt.BinaryEmbedding(50, 12).weight.bits)
    assert float(a.weight.scale[0]) == pytest.approx(0.1)


@pytest.mark.parametrize("padding_idx", [3, -7])
def test_padding_row(padding_idx, summed):
    emb = dbt.BinaryEmbedding(10, 11, padding_idx=padding_idx)
    assert emb.padding_idx == 3
    assert torch.equal(emb(torch.tensor(3)), torch.zeros(11))
    weight = emb.weight.dequantize().requires_grad_()
    (emb(IDS) + 1).pow(2).sum().backward()
    (F.embedding(IDS, weight, padding_idx=3) + 1).pow(2).sum().backward()
    torch.testing.assert_close(summed(emb.weight.grad), weight.grad)
    bits = emb.weight.bits.clone()
    optimizer = dbt.XOR([emb.weight])
    optimizer.step()
    assert optimizer.stats(emb.weight)["rows"] == 3
    assert torch.equal(emb.weight.bits[3], bits[3])
    assert float(emb.weight.scale[3]) == 0


def test_reset_parameters_keeps_the_padding_row_and_the_parameter():
    emb = dbt.BinaryEmbedding(10, 11, padding_idx=2, scale=0.5)
    weight, before = emb.weight, emb.weight.detach().clone()
    emb.reset_parameters()
    assert emb.weight is weight
    assert not torch.equal(weight, before)
    assert not bool((weight.bits[:, 1] >> 3).any())
    assert weight.scale.flatten().tolist() == [0.5, 0.5, 0.0, *[0.5] * 7]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "num_embeddings must be at least 1, got 0"),
        ((4, 0), {}, ValueError, "embedding_dim must be at least 1, got 0"),
        ((4.0, 4), {}, TypeError, "num_embeddings must be an integer"),
        ((4, 4, 4), {}, ValueError, "padding_idx must be between -4 and 3"),
        ((4, 4), {"dtype": torch.float64}, TypeError, "dtype must be torch.float32"),
        ((4, 4), {"scale": 0.0}, ValueError, "scale must be finite and at least 0.0001"),
        ((4, 4), {"spread": 0.6}, ValueError, "spread must be finite and between 0.0 and 0.5, got 0.6"),
        ((4, 4), {"max_norm": 1.0}, ValueError, "max_norm=1.0 of nn.Embedding cannot be used"),
        ((4, 4), {"scale_grad_by_freq": True}, ValueError, "scale_grad_by_freq=True of nn.Embedding cannot be used"),
        ((4, 4), {"sparse": True}, ValueError, "sparse=True of nn.Embedding cannot be used"),
        ((4, 4), {"_weight": torch.zeros(4, 4)}, ValueError, r"^_weight of nn.Embedding cannot be used.*BinaryEmbedding\.from_float"),
        ((4, 4), {"projection": 2.0}, TypeError, "projection must be True, False or an output width, got 2.0 of type float"),
        ((4, 4), {"projection": None}, TypeError, "projection must be True, False or an output width, got None"),
        ((4, 4), {"projection": 0}, ValueError, "projection must be True, False or an output width of at least 1, got 0"),
        ((4, 4), {"colour": 1}, TypeError, "unexpected argument 'colour'"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        dbt.BinaryEmbedding(*arguments, **options)


@pytest.mark.parametrize("module", [dbt.BinaryEmbedding, dbt.BinaryEmbeddingBag])
@pytest.mark.parametrize(("spread", "digits"), [(0.1, 26), (0.25, 64), (0.498, 127), (0.0, 0)])
def test_spread(module, spread, digits):
    emb = module(4000, 21, padding_idx=3, spread=spread, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        signs = torch.from_numpy(reference.unpack(emb.weight.bits.numpy(), 21)).float()
        assert not bool((emb.weight.bits[:, 2] >> 5).any()), "padding bits"
        pattern = signs.mean(0).sign()
        share = (signs != pattern).float().mean(0 if digits < 120 else (0, 1))  # near one half the pattern cannot be told from the rows
        torch.testing.assert_close(share, torch.full_like(share, digits / 256), rtol=0, atol=0.03)
        first = emb.weight.bits.clone()
        emb.reset_parameters()
        assert not torch.equal(emb.weight.bits, first), "another pattern"


def test_projection():
    emb = dbt.BinaryEmbedding(10, 11, padding_idx=3, projection=True)
    assert torch.equal(emb(IDS), dbt.lookup(emb.weight, IDS)), "the identity at first"
    assert set(emb.state_dict()) == {"weight.bits", "weight.scale", "projection"}
    assert "projection=True" in repr(emb)
    with torch.no_grad():
        emb.projection.normal_()
    dense, matrix = emb.weight.dequantize().requires_grad_(), emb.projection.detach().clone().requires_grad_()
    emb(IDS).pow(2).sum().backward()
    (F.embedding(IDS, dense, padding_idx=3) @ matrix).pow(2).sum().backward()
    torch.testing.assert_close(emb.projection.grad, matrix.grad)
    assert torch.equal(emb(torch.tensor([3])), torch.zeros(1, 11))
    before = emb.weight.detach().clone(), emb.projection.detach().clone()
    dense_parameters = [parameter for parameter in emb.parameters() if not isinstance(parameter, dbt.BinaryTable)]
    dbt.XOR([emb.weight]).step()
    torch.optim.AdamW(dense_parameters, lr=0.1).step()
    assert not torch.equal(emb.weight, before[0])
    assert not torch.equal(emb.projection, before[1])

    other = dbt.BinaryEmbedding.from_float(torch.randn(10, 11), padding_idx=3, projection=True)
    other.load_state_dict(emb.state_dict())
    assert torch.equal(other(IDS), emb(IDS))
    assert torch.equal(copy.deepcopy(emb)(IDS), emb(IDS))
    assert emb.half()(IDS).dtype == torch.float16
    emb.reset_parameters()
    assert torch.equal(emb.projection, torch.eye(11).half())
    with pytest.raises(RuntimeError, match="projection"):
        dbt.BinaryEmbedding(10, 11).load_state_dict(other.state_dict())


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width", [1, 2, 24])
def test_projection_to_a_width(width):
    emb = dbt.BinaryEmbedding(10, 11, padding_idx=3, projection=width, generator=generator(1))
    assert emb(IDS).shape == (*IDS.shape, width)
    assert torch.equal(emb(IDS), dbt.lookup(emb.weight, IDS) @ emb.projection)
    assert f"projection={width}" in repr(emb)
    assert torch.equal(emb.weight.bits, dbt.BinaryEmbedding(10, 11, padding_idx=3, generator=generator(1)).weight.bits), "drawn first"
    first = emb.projection.detach().clone()
    emb.reset_parameters()
    assert not torch.equal(emb.projection, first)
    emb.reset_parameters(generator(1))
    assert torch.equal(emb.projection, first)
    with pytest.raises(RuntimeError, match="size mismatch for projection"):
        dbt.BinaryEmbedding(10, 11, projection=True).load_state_dict(emb.state_dict())


def test_projection_starts_with_the_variance_of_the_rows():
    emb = dbt.BinaryEmbedding(10, 400, projection=300, generator=generator(1))
    matrix = emb.projection.detach()
    assert float(matrix.std()) == pytest.approx(400**-0.5, rel=0.02)
    assert abs(float(matrix.mean())) < 0.002
    assert torch.equal(dbt.BinaryEmbedding(10, 11, projection=11).projection, torch.eye(11)), "the width that the rows have"


@pytest.mark.parametrize("make", [dbt.BinaryEmbedding.from_float, dbt.BinaryEmbedding.from_pretrained])
def test_projection_of_given_values(make):
    w = torch.randn(10, 11).bfloat16()
    emb, again = (make(w, projection=4, generator=generator(2)) for _ in range(2))
    assert torch.equal(emb.projection, again.projection)
    assert (emb(IDS).shape, emb(IDS).dtype) == ((*IDS.shape, 4), torch.bfloat16)
    assert emb.projection.requires_grad, "the table may be frozen, the matrix is not"
    assert torch.equal(make(w, projection=True).projection, torch.eye(11).bfloat16())
    with pytest.raises(ValueError, match="projection must be True, False or an output width of at least 1, got -1"):
        make(w, projection=-1)


def test_from_float_module():
    source = nn.Embedding(10, 11, padding_idx=4, sparse=True).bfloat16().eval().requires_grad_(False)
    emb = dbt.BinaryEmbedding.from_float(source)
    assert (emb.padding_idx, emb.num_embeddings, emb.embedding_dim) == (4, 10, 11)
    assert (emb.weight.dtype, emb.weight.requires_grad, emb.training) == (torch.bfloat16, False, False)
    signs = torch.where(source.weight >= 0, 1, -1)
    magnitude = source.weight.double().abs().mean(1, keepdim=True).float()
    magnitude[4] = 0
    torch.testing.assert_close(emb.weight.dequantize(torch.float32), signs * magnitude)


def test_from_float_tensor_and_from_pretrained():
    w = torch.randn(10, 11)
    a, b = dbt.BinaryEmbedding.from_float(w, padding_idx=-1), dbt.BinaryEmbedding.from_pretrained(w, padding_idx=9)
    assert a.padding_idx == b.padding_idx == 9
    assert torch.equal(a.weight, b.weight)
    assert a.weight.requires_grad
    assert not b.weight.requires_grad


def test_from_float_refuses_what_cannot_be_kept():
    with pytest.raises(ValueError, match="max_norm"):
        dbt.BinaryEmbedding.from_float(nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(TypeError, match=r"embedding must be a tensor of float32, float16 or bfloat16, got torch\.float64"):
        dbt.BinaryEmbedding.from_float(torch.zeros(4, 4, dtype=torch.float64))


def test_bad_ids_leave_the_module_as_it_was():
    emb = dbt.BinaryEmbedding(10, 11)
    before = emb.weight.detach().clone()
    with pytest.raises(IndexError, match="10"):
        emb(torch.tensor([1, 10]))
    assert torch.equal(emb.weight, before)
    assert emb.weight.grad is None


def test_weight_tying(summed):
    a, b = dbt.BinaryEmbedding(10, 11), dbt.BinaryEmbedding(10, 11)
    b.weight = a.weight
    both = nn.ModuleList([a, b])
    assert len(list(both.parameters())) == 1
    (a(IDS).sum() + b(IDS).sum()).backward()
    assert float(summed(a.weight.grad)[3, 0]) == 6


# ---- state_dict --------------------------------------------------------------------------------------------------------------------------


def test_state_dict_keys_and_round_trip():
    net, other = Net(), Net()
    state = net.state_dict()
    assert list(state) == ["emb.weight.bits", "emb.weight.scale", "head.weight", "head.bias"]
    assert [value.dtype for value in state.values()] == [torch.uint8, torch.float32, torch.float32, torch.float32]
    weight = other.emb.weight
    other.load_state_dict(state)
    assert other.emb.weight is weight
    assert torch.equal(weight, net.emb.weight)
    assert weight.bits.data_ptr() != net.emb.weight.bits.data_ptr()


def test_state_dict_through_a_file():
    net, other, file = Net(), Net(), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(IDS), net(IDS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("emb.weight.bits"), r'Missing key.*"emb.weight.bits"'),
        (lambda s: s.pop("emb.weight.scale"), r'Missing key.*"emb.weight.scale"'),
        (lambda s: s.update({"emb.weight": torch.zeros(10, 11)}), r'Unexpected key.*"emb.weight"'),
        (lambda s: s.update({"emb.weight.bits": torch.zeros(10, 3, dtype=torch.uint8)}), r"size mismatch for emb.weight.bits.*\[10, 2\]"),
        (lambda s: s.update({"emb.weight.scale": torch.zeros(11, 1)}), r"size mismatch for emb.weight.scale.*\[10, 1\]"),
        (lambda s: s.update({"emb.weight.bits": torch.zeros(10, 2)}), r"size mismatch for emb.weight.bits: expected torch.uint8"),
        (lambda s: s.update({"emb.weight.bits": torch.full((10, 2), 255, dtype=torch.uint8)}), "another dim than 11"),
    ],
)
def test_load_state_dict_names_what_is_wrong(change, message):
    net = Net()
    before = net.emb.weight.detach().clone()
    state = Net().state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        net.load_state_dict(state)
    if "Unexpected" not in message:
        assert torch.equal(net.emb.weight, before)


def test_load_state_dict_not_strict():
    net = Net()
    before = net.emb.weight.detach().clone()
    result = net.load_state_dict({"head.bias": torch.zeros(3), "other": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["other"]
    assert torch.equal(net.emb.weight, before)
    with pytest.raises(RuntimeError, match=r"belong together, got only emb\.weight\.bits"):
        net.load_state_dict({"emb.weight.bits": torch.zeros(10, 2, dtype=torch.uint8)}, strict=False)
    assert torch.equal(net.emb.weight, before)


def test_meta_device():
    source = Net()
    with torch.device("meta"):
        net, empty = Net(), Net()
    assert net.emb.weight.bits.is_meta
    with pytest.raises(RuntimeError, match="meta device; load with assign=True"):
        net.emb.load_state_dict(source.emb.state_dict())
    net.load_state_dict(source.state_dict(), assign=True)
    empty.to_empty(device="cpu")
    assert not empty.emb.weight.bits.any()
    empty.load_state_dict(source.state_dict())
    for loaded in (net, empty):
        assert torch.equal(loaded.emb.weight, source.emb.weight)
        loaded(IDS).sum().backward()
        assert type(loaded.emb.weight.grad) is dbt.RowGrad


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_module_casts_keep_the_parameter(cast):
    net = Net()
    weight = net.emb.weight
    net.to(cast)
    assert net.emb.weight is weight
    assert (net.emb(IDS).dtype, weight.scale.dtype, weight.bits.dtype) == (cast, torch.float32, torch.uint8)
    assert weight.grad_dtype is None


def test_deepcopy_with_a_gradient():
    net = Net()
    net(IDS).sum().backward()
    other = copy.deepcopy(net)
    dbt.XOR([net.emb.weight]).step()
    assert not torch.equal(net.emb.weight, other.emb.weight)
    assert type(other.emb.weight.grad) is dbt.RowGrad
    other(IDS).sum().backward()


def test_functional_call():
    net = Net()
    rows = torch.func.functional_call(net, dict(net.named_parameters()), (IDS,))
    assert torch.equal(rows, net(IDS))
