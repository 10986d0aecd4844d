"""examples/jax/ngram.py, small, and its rows beside those of the PyTorch example."""

import functools
import importlib.util

import numpy as np
import pytest
from ngram_cases import story

WIDTH = 32


def load(root, name):
    spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_memory_lowers_perplexity(root, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(root / "examples"))
    module = load(root, "jax/ngram")
    monkeypatch.setattr(module, "Settings", functools.partial(module.Settings, width=WIDTH, context=16))
    text = tmp_path / "story.txt"
    text.write_text(story())
    arguments = ["--text", str(text), "--dim", "16", "--rows", "4096", "--planes", "2", "--steps", "40"]
    model, ratio = module.main(arguments)
    assert ratio < 0.8
    assert f"perplexity is {ratio:.3f} of that without" in capsys.readouterr().out

    pytest.importorskip("torch")
    pytest.importorskip("tqdm")
    other = load(root, "torch/ngram")
    memory = other.make_memory(other.Variant("2 planes", 4096, 16, 2), model.memory.ngrams.boundary, WIDTH)
    ids = np.random.default_rng(0).integers(0, 20, (3, 16))
    np.testing.assert_array_equal(np.asarray(model.memory.rows(ids)), memory.rows(other.torch.from_numpy(ids)).numpy())
    assert memory.ngrams == model.memory.ngrams
