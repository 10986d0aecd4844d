"""The compiler, export and function transforms. Whole training scripts under torch.compile are in test_training.py."""

import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dualbin.torch as dbt

V, D = 64, 20
IDS = torch.randint(0, V, (4, 6), generator=torch.Generator().manual_seed(3))
OPS = torch.ops.dualbin


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = dbt.BinaryEmbedding(V, D, padding_idx=2)
        self.bag = dbt.BinaryEmbeddingBag(V, D, mode="mean")
        self.head = nn.Linear(D, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.emb(ids)) + self.bag(ids).unsqueeze(1))


def compare_gradients(net, other, rtol=None, atol=None):
    for name in ("emb", "bag"):
        grads = [module.get_submodule(name).weight.grad for module in (net, other)]
        assert [type(grad) for grad in grads] == [dbt.RowGrad] * 2
        assert torch.equal(grads[0].ids, grads[1].ids)
        torch.testing.assert_close(grads[0].rows, grads[1].rows, rtol=rtol, atol=atol)
    torch.testing.assert_close(net.head.weight.grad, other.head.weight.grad, rtol=rtol, atol=atol)


# ---- operators ---------------------------------------------------------------------------------------------------------------------------


def operators():
    """(operator, arguments, whether the table trains) of everything that is registered."""
    table = dbt.BinaryTable.from_float(torch.randn(V, D))
    flat, bounds, weights = IDS.flatten(), torch.tensor([0, 5, 5, 24]), torch.rand(24)
    for trains in (True, False):
        weight = nn.Parameter(table.clone(), requires_grad=trains)
        yield OPS.lookup.default, (weight, IDS, torch.bfloat16, 2), trains
        yield OPS.lookup_bag.default, (weight, flat, bounds, None, "mean", 2), trains
        yield OPS.lookup_bag.default, (weight, flat, bounds, weights.clone().requires_grad_(not trains), "sum"), trains
        yield OPS.bag_counts.default, (weight, flat, bounds, 2), False
    yield OPS.lookup_packed.default, (table.bits, table.scale, IDS, D, torch.float16), False
    yield OPS.lookup_bag_packed.default, (table.bits, table.scale, flat, bounds, weights, D, "sum", torch.float32, 2), False
    dy, counts = torch.randn(3, D, dtype=torch.bfloat16), torch.tensor([5, 0, 19], dtype=torch.int32)
    yield OPS.bag_counts_packed.default, (table.scale, flat, bounds, 2), False
    yield OPS.bag_gradient.default, (flat, bounds, dy, "mean", counts, None, 2), False
    yield OPS.bag_gradient.default, (flat, bounds, dy, "sum", None, weights), False
    yield OPS.bag_weight_gradient.default, (table, flat, bounds, dy, 2), False
    yield OPS.bag_weight_gradient_packed.default, (table.bits, table.scale, flat, bounds, dy, 2), False


@pytest.mark.parametrize(("operator", "arguments", "trains"), list(operators()))
def test_opcheck(operator, arguments, trains):
    # The last check compares gradients with torch.allclose, which needs dense ones; `test_compiled_gradients` compares the rows instead.
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", *([] if trains else ["test_aot_dispatch_dynamic"])]
    if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in arguments):
        checks.remove("test_autograd_registration")  # needs an input that requires a gradient
    assert set(torch.library.opcheck(operator, arguments, test_utils=checks).values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dualbin::")}
    assert registered == {operator.name() for operator, _, _ in operators()}


# ---- torch.compile -----------------------------------------------------------------------------------------------------------------------


def test_compiled_gradients():
    torch._dynamo.reset()
    net, other = Net(), Net()
    function = torch.compile(net, backend="aot_eager", fullgraph=True)
    for shift in range(2):  # the second time accumulates
        ids = (IDS + shift) % V
        function(ids).pow(2).sum().backward()
        other(ids).pow(2).sum().backward()
    compare_gradients(net, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_inductor_with_dynamic_shapes():
    torch._dynamo.reset()
    net, other = Net(), Net()
    function = torch.compile(net, fullgraph=True, dynamic=True)
    for count in (4, 3, 2):
        with torch.compiler.set_stance("default" if count == 4 else "fail_on_recompile"):
            function(IDS[:count].clone()).pow(2).sum().backward()  # of a view the compiler also knows the base
        other(IDS[:count]).pow(2).sum().backward()
    compare_gradients(net, other)
    for module in (net, other):
        dbt.XOR([module.emb.weight, module.bag.weight]).step()
    assert not torch.equal(net.emb.weight, Net().emb.weight)


def test_checkpoint_inside_compiled_code():
    torch._dynamo.reset()
    net, other = Net(), Net()
    function = torch.compile(lambda ids: checkpoint(net, ids, use_reentrant=False).pow(2).sum(), backend="aot_eager", fullgraph=True)
    function(IDS).backward()
    other(IDS).pow(2).sum().backward()
    compare_gradients(net, other)


def test_autocast_around_compiled_code():
    torch._dynamo.reset()
    net, other = Net(), Net()
    for module, function in ((net, torch.compile(net, backend="aot_eager", fullgraph=True)), (other, other)):
        with torch.autocast("cpu", torch.bfloat16):
            rows = function(IDS)
        assert rows.dtype == torch.bfloat16
        rows.float().pow(2).sum().backward()
        assert module.emb.weight.grad.dtype == torch.float32  # as nn.Embedding: autocast does not touch lookups
    compare_gradients(net, other, rtol=0.05, atol=0.05)


# ---- torch.export ------------------------------------------------------------------------------------------------------------------------


def test_export_through_a_file():
    net = Net().eval()
    program = torch.export.export(net, (IDS,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert {"dualbin.lookup.default", "dualbin.lookup_bag.default"} <= {str(node.target) for node in loaded.graph.nodes}
    assert loaded.state_dict["emb.weight"].bits.data_ptr() != net.emb.weight.bits.data_ptr()
    for count in (4, 2):
        assert torch.equal(loaded.module()(IDS[:count]), net(IDS[:count]))


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_decompositions_leave_operators_of_plain_tensors():
    net = Net().eval().requires_grad_(False)  # else torch refuses the uint8 tensor as a parameter that requires a gradient
    program = torch.export.export(net, (IDS,)).run_decompositions()
    assert {"dualbin.lookup_packed.default", "dualbin.lookup_bag_packed.default"} <= {str(node.target) for node in program.graph.nodes}
    assert {value.dtype for name, value in program.state_dict.items() if "head" not in name} == {torch.uint8, torch.float32}
    assert torch.equal(program.module()(IDS), net(IDS))


# ---- function transforms -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_ids_trains(dim):
    net, other = dbt.BinaryEmbedding(V, D), dbt.BinaryEmbedding(V, D)
    other.load_state_dict(net.state_dict())
    rows = torch.func.vmap(net, in_dims=dim, out_dims=dim)(IDS)
    assert torch.equal(rows, other(IDS))
    rows.pow(2).sum().backward()
    other(IDS).pow(2).sum().backward()
    sums = [module.weight.grad.coalesce() for module in (net, other)]
    assert torch.equal(sums[0].ids, sums[1].ids)
    torch.testing.assert_close(sums[0].rows, sums[1].rows)


def test_functional_call_with_another_table():
    net, other = Net(), Net()
    other.emb.reset_parameters()
    output = torch.func.functional_call(net, dict(other.named_parameters()), (IDS,))
    assert torch.equal(output, other(IDS))
    assert not torch.equal(output, net(IDS))
    output.pow(2).sum().backward()
    assert net.emb.weight.grad is None
    assert type(other.emb.weight.grad) is dbt.RowGrad


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 cannot compile anew while table.grad holds rows")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_backward_and_clipping_in_a_compiled_function(backend):
    net, other = Net(), Net()

    def step(net):
        net(IDS).pow(2).sum().backward()

    def clip(net):
        return torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)

    torch.compile(step, backend=backend)(net)
    step(other)
    compare_gradients(net, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.compile(clip, backend=backend)(net), clip(other))
    compare_gradients(net, other, rtol=1e-5, atol=1e-5)
