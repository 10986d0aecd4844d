"""torch.compile, torch.export and the operators on a GPU."""

from __future__ import annotations

import io
from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
functorch_config = pytest.importorskip("torch._functorch.config")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of the compiler differ between releases
]

V, D = 300, 100
DEVICE = "cuda"


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    torch._dynamo.reset()
    return module


def make_net(dbt: Any) -> Any:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.emb, self.bag = dbt.BinaryEmbedding(V, D, padding_idx=2), dbt.BinaryEmbeddingBag(V, D)
            self.head = torch.nn.Linear(D, 3)

        def forward(self, ids: Any) -> Any:
            return self.head(torch.tanh(self.emb(ids)) + self.bag(ids).unsqueeze(1))

    return Net().to(DEVICE)


def batch(count: int) -> Any:
    return torch.randint(0, V, (count, 7), device=DEVICE)


def compare_gradients(net: Any, other: Any, **tolerance: float) -> None:
    for name in ("emb", "bag"):
        grads = [module.get_submodule(name).weight.grad for module in (net, other)]
        assert torch.equal(grads[0].ids, grads[1].ids)
        torch.testing.assert_close(grads[0].rows, grads[1].rows, **tolerance)


def test_inductor_gives_the_gradients_of_eager_code_for_every_batch_size(dbt: Any) -> None:
    net, other = make_net(dbt), make_net(dbt)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for count in (6, 4, 9):
        ids = batch(count)
        with torch.compiler.set_stance("default" if count == 6 else "fail_on_recompile"):
            compiled(ids).pow(2).sum().backward()
        other(ids).pow(2).sum().backward()
    compare_gradients(net, other)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@functorch_config.patch(enable_autograd_cache=False)  # torch 2.11 would take the code that it cached for the other dtype
def test_inductor_under_autocast(dbt: Any, kind: str) -> None:
    net, other = make_net(dbt), make_net(dbt)
    compiled = torch.compile(net, fullgraph=True)
    ids = batch(6)
    for function in (compiled, other):
        with torch.autocast(DEVICE, getattr(torch, kind)):
            y = function(ids)
        assert y.dtype is getattr(torch, kind)
        y.float().pow(2).sum().backward()
    assert net.emb.weight.grad.dtype is torch.float32
    compare_gradients(net, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_gives_the_bits_of_eager_training(dbt: Any, backend: str) -> None:
    """The gradient of the rows is a power of two times the batch's weights, which no order of operations rounds."""
    tables = []
    for compiled in (False, True):
        torch.manual_seed(0)
        emb = dbt.BinaryEmbedding(V, D, padding_idx=5).to(DEVICE)
        optimizer = dbt.XOR(emb.parameters(), rule=rules.Counter(3))

        def loss_of(ids: Any, weights: Any, emb: Any = emb) -> Any:
            return (emb(ids) * weights).sum() / 4

        function = torch.compile(loss_of, backend=backend, fullgraph=True) if compiled else loss_of
        for _ in range(4):
            function(batch(8), torch.randn(8, 7, D, device=DEVICE)).backward()
            assert type(emb.weight.grad) is dbt.RowGrad
            optimizer.step()
            optimizer.zero_grad()
        tables.append(emb.weight)
    assert torch.equal(*tables)


def test_export_through_a_file(dbt: Any) -> None:
    net = make_net(dbt).eval()
    program = torch.export.export(net, (batch(4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (4, 2):
        ids = batch(count)
        assert torch.equal(loaded(ids), net(ids))


def test_every_operator_passes_opcheck(dbt: Any) -> None:
    operators = torch.ops.dualbin
    weight = torch.nn.Parameter(dbt.BinaryTable.from_float(torch.randn(V, D, device=DEVICE)))
    frozen = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    ids, bounds = batch(4), torch.tensor([0, 5, 5, 28], device=DEVICE)
    flat, weights, dy = ids.flatten(), torch.rand(28, device=DEVICE), torch.randn(3, D, device=DEVICE)
    checked = set()
    for operator, arguments in (
        (operators.lookup, (weight, ids, torch.bfloat16, 2)),
        (operators.lookup, (frozen, ids)),
        (operators.lookup_packed, (weight.bits, weight.scale, ids, D, torch.float16)),
        (operators.lookup_bag, (weight, flat, bounds, None, "mean", 2)),
        (operators.lookup_bag, (frozen, flat, bounds, weights, "sum")),
        (operators.lookup_bag_packed, (weight.bits, weight.scale, flat, bounds, weights, D, "sum", torch.float32)),
        (operators.bag_counts, (frozen, flat, bounds)),
        (operators.bag_counts_packed, (weight.scale, flat, bounds, 2)),
        (operators.bag_gradient, (flat, bounds, dy, "mean", torch.tensor([5, 0, 23], dtype=torch.int32, device=DEVICE), None, 2)),
        (operators.bag_gradient, (flat, bounds, dy.bfloat16(), "sum", None, weights)),
        (operators.bag_weight_gradient, (frozen, flat, bounds, dy)),
        (operators.bag_weight_gradient_packed, (weight.bits, weight.scale, flat, bounds, dy, 2)),
    ):
        # of what trains, gradients are rows, which opcheck cannot compare: the tests above do
        tests = ["test_schema", "test_faketensor", "test_autograd_registration" if arguments[0] is weight else "test_aot_dispatch_dynamic"]
        assert set(torch.library.opcheck(operator.default, arguments, test_utils=tests).values()) == {"SUCCESS"}
        checked.add(operator.default.name())
    assert checked == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dualbin::")}


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_ids_and_functional_call(dbt: Any, dim: int) -> None:
    net, other = make_net(dbt), make_net(dbt)
    ids = batch(4)
    rows = torch.func.vmap(net.emb, in_dims=dim, out_dims=dim)(ids)
    assert torch.equal(rows, other.emb(ids))
    for each in (rows, other.emb(ids)):
        each.pow(2).sum().backward()
    sums = [module.emb.weight.grad.coalesce() for module in (net, other)]
    assert torch.equal(sums[0].ids, sums[1].ids)
    torch.testing.assert_close(sums[0].rows, sums[1].rows)
    other.emb.reset_parameters()
    assert torch.equal(torch.func.functional_call(net, dict(other.named_parameters()), (ids,)), other(ids))
