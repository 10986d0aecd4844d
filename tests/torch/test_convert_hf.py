"""The example that converts a Hugging Face model, small; the page's recipe, which reads a file with nothing of dualbin."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest


@pytest.mark.slow
def test_the_example(root, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    command = [sys.executable, root / "examples/torch/convert_hf.py", "--steps", "6", "--words", "1200", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    assert "replaced model.embed_tokens: 1200 x 128" in result.stdout
    assert result.stdout.count("bits the same when read back") == 2
    floats, converted, tuned = map(
        float, re.search(r"perplexity ([\d.]+) as floats, ([\d.]+) converted to 4 bits a weight, ([\d.]+)", result.stdout).groups()
    )
    assert converted < 1.05 * floats
    assert tuned < 1.05 * converted
    assert (tmp_path / "embeddings-q1_0.gguf").stat().st_size < (tmp_path / "embeddings-q4_1.gguf").stat().st_size


def test_the_example_is_short(root):
    assert len((root / "examples/torch/convert_hf.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("planes", [1, 3])
def test_reading_a_file_without_dualbin(root, tmp_path, monkeypatch, planes):
    """The code of docs/huggingface.md, where `import dualbin` fails."""
    import dualbin
    from dualbin import io

    w = np.random.default_rng(0).standard_normal((9, 13)).astype(np.float32)
    bits, scale = dualbin.pack(w, planes), dualbin.row_scale(w, planes).reshape(-1, 1)
    io.save(tmp_path / "table.safetensors", {"emb": io.Table(bits, scale, 13, planes)})
    page = (root / "docs" / "huggingface.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(import numpy.*?)^```", page, re.MULTILINE | re.DOTALL)
    script = f"import sys\nsys.modules['dualbin'] = None\n{block}\nnp.save('values.npy', values)\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    from dualbin import reference

    expected = reference.lookup(bits, scale, np.arange(9), dim=13, planes=planes)
    assert np.array_equal(np.load(tmp_path / "values.npy"), expected)
