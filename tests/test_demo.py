"""The demo from end to end, with a few steps, and its text."""

import subprocess
import sys

import pytest

STEPS = 3


@pytest.fixture
def text():
    return pytest.importorskip("_text")


@pytest.mark.slow
def test_demo(root, tmp_path):
    for module in ("torch", "jax", "optax", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    story = tmp_path / "story.txt"
    story.write_text("\n\n".join(f"It was night number {n} and the wind, as ever, blew {n % 7} leaves away." for n in range(2500)))
    out = tmp_path / "out"
    command = [sys.executable, root / "examples" / "demo.py", "--text", story, "--steps", str(STEPS), "--out", out]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in ("fp32, PyTorch", "1-bit, PyTorch", "1-bit, JAX", "1-bit, bits never trained"):
        assert f"\n{name} " in result.stdout
    assert "written by PyTorch, JAX looks up the same bits" in result.stdout
    assert f"{STEPS}/{STEPS}" in result.stderr  # the progress bars
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.safetensors").is_file()


def test_text_that_is_too_short(text):
    with pytest.raises(ValueError, match="at least 20000 are needed"):
        text.make_corpus(["a few words"] * 20)


def test_corpus(text):
    documents = [f"Common word{'s' * (n % 2)}, {n}!" for n in range(8000)]
    corpus = text.make_corpus(documents, max_words=12)
    assert corpus.words[0] == text.UNKNOWN
    assert len(corpus.words) == 12
    assert "common" in corpus.words
    assert 0 < corpus.held_out.size < corpus.train.size / 5
    assert corpus.train.max() < len(corpus.words)


def test_documentation_of_python(text):
    documents = text.python_documents()
    assert len(documents) == len(set(documents)) > 1000
    assert any("dictionary" in document for document in documents)


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, 200), (0.19, 157), (0.25, 120), (60.0, 100)])
def test_fewer_steps_where_the_machine_is_busy(text, monkeypatch, capsys, seconds, steps):
    for module in ("torch", "jax", "optax", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    import demo
    from _setup import Settings

    monkeypatch.setattr(demo._torch_model, "seconds_of_a_step", lambda *_: seconds)
    settings = Settings(vocabulary=9, steps=demo.STEPS)
    assert demo.fitting_steps(None, settings, demo.parse(["--minutes", "3"])) == steps
    assert ("in place of 200" in capsys.readouterr().out) == (steps < demo.STEPS)


def test_a_step_is_timed(text):
    torch = pytest.importorskip("torch")
    import _torch_model
    import dualbin.torch as dbt
    from _setup import Settings

    corpus = text.make_corpus([f"Common word{'s' * (n % 2)}, {n}!" for n in range(8000)], max_words=12)
    settings = Settings(vocabulary=12, steps=9, width=16)
    table = dbt.BinaryEmbedding(12, 16)
    before = table.weight.bits.clone()
    assert 0 < _torch_model.seconds_of_a_step(table, corpus, settings, "cpu", steps=2) < 60
    assert not torch.equal(before, table.weight.bits)
