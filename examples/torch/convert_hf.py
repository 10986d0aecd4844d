"""A Hugging Face model whose embeddings become a packed table: converted, tuned on text, saved, loaded, and exported to GGUF.

The model is a small Llama that is trained here first, since nothing is downloaded. A model of yours comes from `from_pretrained` and goes
on with `convert`.

python examples/torch/convert_hf.py [--out FOLDER] [--steps N]
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dualbin
import dualbin.torch as dbt
import dualbin.torch.hf  # so that from_pretrained knows tables
from dualbin.rules import Counter

sys.path.insert(0, str(Path(__file__).parents[1]))
from _text import Corpus, make_corpus, python_documents

WIDTH, CONTEXT, BATCH = 128, 64, 16


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """In a language model of this size most parameters are those of the input embeddings and of the output layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(tokens: np.ndarray, steps: int, seed: int) -> Iterable[torch.Tensor]:
    random, window = np.random.default_rng(seed), np.arange(CONTEXT)
    for _ in range(steps):
        start = random.integers(0, tokens.size - CONTEXT, (BATCH, 1))
        yield torch.from_numpy(tokens[start + window]).long()


@torch.no_grad()
def perplexity(model: nn.Module, tokens: np.ndarray, windows: int = 40) -> float:
    model.eval()
    span = BATCH * CONTEXT
    parts = tokens[: min(windows, tokens.size // span) * span].reshape(-1, BATCH, CONTEXT)
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in torch.from_numpy(parts).long()]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(model: nn.Module, corpus: Corpus, steps: int, lr: float, xor: dbt.XOR | None = None, seed: int = 0) -> None:
    """AdamW for everything but tables, and XOR for these, if there are any; all rates rise and fall together."""
    dense = [p for p in model.parameters() if not isinstance(p, dbt.BinaryTable)]
    optimizers = [torch.optim.AdamW(dense, lr=lr), *([] if xor is None else [xor])]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: min(1.0, (step + 1) / max(1, steps // 20)) * (1 - step / steps))
        for each in optimizers
    ]
    for ids in batches(corpus.train, steps, seed):
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(dense, 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        for each in optimizers:
            each.zero_grad()


def export(table: dbt.BinaryTable, folder: Path) -> None:
    """Four planes as Q4_1 and, from them, one as Q1_0; then what the package gguf reads is compared with the table."""
    right = True
    for name, each in (("q4_1", table), ("q1_0", table.with_planes(1))):
        path = folder / f"embeddings-{name}.gguf"
        dualbin.io.to_gguf(path, {"token_embd.weight": each})
        back = dualbin.io.from_gguf(path)["token_embd.weight"]
        right &= (same := np.array_equal(back.bits, each.bits.numpy()))
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, bits {'the same' if same else 'DIFFERENT'} when read back")
    (tensor,) = gguf.GGUFReader(folder / "embeddings-q4_1.gguf").tensors
    wrong = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - table.dequantize().numpy()).max()
    print(f"the package gguf reads Q4_1 with an error of {wrong / table.scale.max().item():.1e} of the largest scale")
    if not right or wrong > 2e-3 * table.scale.max().item():
        msg = "the table in the GGUF file is another one"
        raise RuntimeError(msg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("convert-hf-out"), help="folder for the model and the GGUF files")
    parser.add_argument("--steps", type=int, default=300, help="of the training of the float model; a third as many after converting")
    parser.add_argument("--words", type=int, default=8000, help="the most words in the vocabulary")
    options = parser.parse_args()

    corpus = make_corpus(python_documents(), max_words=options.words)
    model = make_model(len(corpus.words))
    train(model, corpus, options.steps, lr=3e-3)
    floats = perplexity(model, corpus.held_out)
    print(f"float model: perplexity {floats:.1f} on held-out text")

    report = dbt.convert(model, min_rows=1000, planes=4)
    print(report)
    converted = perplexity(model, corpus.held_out)
    table = model.get_input_embeddings().weight
    xor = dbt.XOR([table], lr=0.3, rule=Counter(8))  # below 1, as fine-tuning is: the table has learned something already
    train(model, corpus, max(1, options.steps // 3), lr=1e-3, xor=xor, seed=1)
    tuned = perplexity(model, corpus.held_out)
    print(f"perplexity {floats:.1f} as floats, {converted:.1f} converted to 4 bits a weight, {tuned:.1f} after tuning")

    model.save_pretrained(options.out / "model")
    loaded = LlamaForCausalLM.from_pretrained(options.out / "model")
    ids = torch.from_numpy(corpus.held_out[:CONTEXT]).long()[None]
    with torch.no_grad():
        same = torch.equal(model.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
    print(f"saved, and loaded with {'the same' if same else 'DIFFERENT'} logits")
    if not same:
        msg = "the loaded model is another one"
        raise RuntimeError(msg)
    export(loaded.get_input_embeddings().weight.detach(), options.out)


if __name__ == "__main__":
    main()
