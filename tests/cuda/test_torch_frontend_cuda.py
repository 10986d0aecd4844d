"""The PyTorch frontend on a GPU against the CPU: bags, models, and the example scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dualbin import rules

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

V, D = 300, 100
MODES = ["sum", "mean", "majority"]


@pytest.fixture
def dbt() -> Any:
    import dualbin.torch as module

    yield module
    torch.cuda.synchronize()


def pair(dbt: Any, mode: str, dtype: Any = None) -> tuple[Any, Any]:
    """The same bag on the CPU and on the GPU, with different scales and a padding row."""
    torch.manual_seed(0)
    here = dbt.BinaryEmbeddingBag(V, D, mode=mode, padding_idx=5, dtype=dtype)
    with torch.no_grad():
        here.weight.scale.mul_(torch.rand(V, 1) + 0.5)
    there = dbt.BinaryEmbeddingBag(V, D, mode=mode, padding_idx=5, dtype=dtype, device="cuda")
    there.load_state_dict(here.state_dict())
    return here, there


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_bags_and_their_training_give_the_bits_of_the_cpu(dbt: Any, mode: str, kind: str) -> None:
    modules = pair(dbt, mode, getattr(torch, kind))
    optimizers = [dbt.XOR([module.weight], rule=rules.Counter(4)) for module in modules]
    offsets = torch.tensor([0, 3, 3, 150, 400])
    for _ in range(3):
        ids, dy = torch.randint(0, V, (500,)), torch.randn(5, D).to(getattr(torch, kind))
        outputs = []
        for module, optimizer, device in zip(modules, optimizers, ("cpu", "cuda"), strict=True):
            output = module(ids.to(device), offsets.to(device))
            output.backward(dy.to(device))
            optimizer.step()
            outputs.append(output.detach().cpu())
        assert torch.equal(*outputs)
        grads = [module.weight.grad for module in modules]
        assert torch.equal(grads[0].ids, grads[1].ids.cpu())
        assert torch.equal(grads[0].rows, grads[1].rows.cpu())
        for optimizer in optimizers:
            optimizer.zero_grad()
    tables = [module.weight.cpu() for module in modules]
    assert torch.equal(tables[0].bits, tables[1].bits)
    assert torch.equal(tables[0].scale, tables[1].scale)


def test_weighted_bags_give_the_gradient_of_the_cpu(dbt: Any) -> None:
    here, there = pair(dbt, "sum")
    ids, weights = torch.randint(0, V, (20, 30)), torch.randn(20, 30)
    results = []
    for module, device in ((here, "cpu"), (there, "cuda")):
        factors = weights.clone().to(device).requires_grad_()
        output = module(ids.to(device), per_sample_weights=factors)
        output.backward(torch.ones(20, D, device=device))
        results.append((output.detach().cpu(), factors.grad.cpu(), module.weight.grad.rows.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def test_the_forward_of_a_bag_makes_nothing_of_n_by_d(dbt: Any) -> None:
    bag = dbt.BinaryEmbeddingBag(1000, 256, device="cuda")
    ids = torch.randint(0, 1000, (64, 2048), device="cuda")
    bag(ids)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bag(ids)
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20  # the rows of the ids would be 128 MiB


def test_a_bad_id_makes_its_bag_nan_and_a_later_error(dbt: Any) -> None:
    _, bag = pair(dbt, "mean")
    dbt.check_errors()
    before = bag.weight.bits.clone()
    ids = torch.tensor([[1, 2], [3, V], [4, 4]], device="cuda")
    output = bag(ids)
    output.nan_to_num().sum().backward()
    dbt.XOR([bag.weight]).step()
    assert output.isnan().all(1).tolist() == [False, True, False]
    changed = (bag.weight.bits != before).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {1, 2, 3, 4}
    with pytest.raises(IndexError, match=str(V)):
        dbt.check_errors()


def test_a_language_model_trains_on_the_gpu(dbt: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config).cuda()
    assert len(dbt.convert(model, min_rows=V).replaced) == 1
    table = model.get_input_embeddings().weight
    optimizer = dbt.XOR([table])
    ids = torch.randint(3, V, (4, 16), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert optimizer.stats()["flips"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "amp", "compile"])
def test_example(name: str) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "torch" / f"{name}.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=240, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "at the end" in result.stdout
