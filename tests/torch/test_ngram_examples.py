"""The two scripts of docs/ngram.md, small."""

import functools
import importlib.util
import json
import math

import pytest
from ngram_cases import story

import dualbin.torch as dbt


def load(root, name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", root / "examples" / "torch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(root, monkeypatch, tmp_path):
    """The script, with a small transformer, and arguments for a small text."""
    pytest.importorskip("tqdm")  # the examples show progress
    monkeypatch.syspath_prepend(str(root / "examples"))
    module = load(root, "ngram")
    monkeypatch.setattr(module, "Settings", functools.partial(module.Settings, width=32, context=16))
    text = tmp_path / "story.txt"
    text.write_text(story())
    return module, ["--text", str(text), "--dim", "32", "--rows", "4096", "--out", str(tmp_path / "out.json")]


@pytest.mark.slow
def test_a_memory_lowers_perplexity(example, tmp_path, capsys):
    module, arguments = example
    none, *memories = module.main([*arguments, "--steps", "40"])
    assert [result.variant.planes for result in memories] == [1, 0, 0, 4, 0, 0]
    for result in memories:
        assert result.perplexity < (0.75 if result.variant.planes else 0.9) * none.perplexity
        assert result.step_ms > 0
    for result in memories:  # 32 bits and a scale are as many bytes as two floats, four times 32 as five
        assert result.served_bytes == 4096 * (8 if result in memories[:3] else 20)
    assert [(result.variant.rows, result.variant.dim) for result in memories[:3]] == [(4096, 32), (256, 32), (4096, 2)]
    printed = capsys.readouterr().out
    assert "time, ms/step" in printed
    assert f"{memories[0].perplexity / none.perplexity:.3f} of none" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert [each["perplexity"] for each in written["chosen"]] == [each.perplexity for each in (none, *memories)]
    assert len(written["results"][1]["curve"]) == 5


def test_settings_are_chosen_on_the_first_half(example, monkeypatch):
    """Every memory with every setting; the sizes with the one that was best on the first half of the held-out text, whatever the second."""
    module, arguments = example
    trained = []

    def train(variant, corpus, settings, options):
        trained.append(variant)
        best = {"norm": "adagrad"} if variant.planes else {"optimizer": "Adam", "lr": 0.03}
        good = all(getattr(variant, name) == value for name, value in best.items())
        return module.Result(variant, 0, chosen_on=1.0 if good else 2.0, perplexity=9.0 if good else 1.0)

    monkeypatch.setattr(module, "train", train)
    chosen = module.main([*arguments, "--sweep", "--rows-sweep"])
    rates = sum(map(len, module.RATES.values()))
    tried = 1 + 2 * (len(module.NORMS) + 2 * rates)
    assert len(set(trained[:tried])) == tried
    assert [result.perplexity for result in chosen[1:]] == [9.0] * 6
    assert {variant.norm for variant in trained[tried:] if variant.planes} == {"adagrad"}
    assert {(variant.optimizer, variant.lr) for variant in trained[tried:] if not variant.planes} == {("Adam", 0.03)}
    assert {variant.rows for variant in trained[tried:] if variant.planes} == {1 << 13, 1 << 15, 1 << 19, 1 << 21}


def test_a_large_memory_beside_a_transformer(root, tmp_path, capsys):
    module = load(root, "ngram_large")
    results = module.main(["--small", "--steps", "40", "--out", str(tmp_path / "out.json")])
    without, memory = results["without"], results["with"]
    assert without.losses[-1] > 0.9 * math.log(48)  # the text's rule is not learned in so few steps,
    assert memory.losses[-1] < 0.8 * without.losses[-1]  # but looked up
    assert memory.table_bytes == 20_000 * (3 + 4)
    assert memory.state_bytes == 20_000 * (3 + 16)
    assert memory.flips > 0
    assert 0 < memory.rows_a_step <= 16 * 32 * 8
    assert "share of the time of a step" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["with"]["losses"] == memory.losses


def test_the_large_form_is_what_the_page_says(root):
    module = load(root, "ngram_large")
    options = module.parse(["--device", "cuda"])
    assert options.rows * options.dim == 51_200_000_000
    assert options.batch * options.context * 2 * options.heads == 262_144
    assert dbt.NGramEmbedding(8 * 9, 1, heads=options.heads).ngrams.orders == (2, 3)


@pytest.mark.parametrize("name", ["torch/ngram", "torch/ngram_large", "jax/ngram"])
def test_an_example_is_short(root, name):
    assert len((root / "examples" / f"{name}.py").read_text().splitlines()) < 200
