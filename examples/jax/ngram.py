"""The n-gram memory of a language model in flax nnx: the perplexity of a small transformer with and without it.

The text, the batches, the sizes of the transformer and the rows of every n-gram are those of examples/torch/ngram.py.

python examples/jax/ngram.py [--steps N] [--rows V] [--planes K] [--text FILE]
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dualbin.jax as dbj
from dualbin.rules import Counter

sys.path.insert(0, str(Path(__file__).parents[1]))
from _setup import Settings, batches, held_out_batches
from _text import END, Corpus, file_documents, make_corpus, python_documents

TOKEN_LR = 0.5  # AdamW, of the token embeddings: their rows are rarely met, as in the demo


class LanguageModel(nnx.Module):
    """The demo's causal transformer block; the memory is added to the embeddings of the tokens."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs, **memory):
        d = settings.width
        self.tokens = nnx.Embed(settings.vocabulary, d, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (settings.context, d)))
        self.norm1, self.norm2, self.norm3 = (nnx.LayerNorm(d, epsilon=1e-5, rngs=rngs) for _ in range(3))
        self.attention = nnx.MultiHeadAttention(settings.heads, d, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(d, 2 * d, rngs=rngs), nnx.Linear(2 * d, d, rngs=rngs)
        self.narrow, self.out = nnx.Linear(d, d // 2, rngs=rngs), nnx.Linear(d // 2, settings.vocabulary, rngs=rngs)
        self.memory = dbj.NGramEmbed(**memory, projection=d, rngs=rngs) if memory else None

    def __call__(self, ids):
        x = self.tokens(ids) + self.position
        if self.memory is not None:
            x = x + self.memory(ids)
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(ids))
        x = x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))
        return self.out(self.narrow(self.norm3(x)))


def loss_of(model: LanguageModel, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def make_optimizer(model: LanguageModel, settings: Settings) -> nnx.Optimizer:
    """AdamW for everything but the rows of the memory, xor for these."""
    factors = jnp.array([settings.rate(step) for step in range(settings.steps)])

    def adamw(lr):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: lr * factors[step], b1=0.9, b2=0.99, weight_decay=0.01))

    def labels(params):
        return jax.tree.map_with_path(lambda path, label: "tokens" if path[0].key == "tokens" else label, dbj.param_labels(params))

    xor = dbj.xor(lambda step: settings.table_lr * factors[step], rule=Counter(8, norm=settings.norm), scale_lr=settings.scale_lr)
    tx = optax.partition({"dense": adamw(settings.lr), "tokens": adamw(TOKEN_LR), "table": xor}, labels)
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


@partial(nnx.jit, donate_argnums=(0, 1))  # donated: the table changes in place
def step_of(model: LanguageModel, optimizer: nnx.Optimizer, tokens):
    graphdef, params = nnx.split(model, nnx.Param)
    memory = model.memory
    loss, grads = dbj.value_and_grad(
        lambda params, tokens: loss_of(nnx.merge(graphdef, params), tokens),
        ids=lambda params, tokens: {"memory.embed.table": dbj.ngram_rows(tokens[:, :-1], memory.ngrams)} if memory else {},
    )(params, tokens)
    optimizer.update(model, grads)
    return loss


def train(corpus: Corpus, settings: Settings, **memory) -> tuple[LanguageModel, float]:
    """The trained model and its perplexity on held-out text."""
    model = LanguageModel(settings, nnx.Rngs(0), **memory)
    optimizer = make_optimizer(model, settings)
    for tokens in batches(corpus, settings):
        loss = step_of(model, optimizer, tokens)
    held_out_loss = nnx.jit(loss_of)
    losses = [float(held_out_loss(model, tokens)) for tokens in held_out_batches(corpus, settings, limit=1000)]
    perplexity = math.exp(np.mean(losses))
    name = f"{memory['num_embeddings']:,} rows of {memory['planes']} x {memory['features']} bits" if memory else "no memory"
    print(f"{name}: loss of the last step {float(loss):.3f}, perplexity {perplexity:.1f} on held-out text", flush=True)
    return model, perplexity


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=1 << 17, help="of the memory (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="weights in a row (default: %(default)s)")
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--words", type=int, default=10_000, help="the most words in the vocabulary (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to train on (default: Python's documentation)")
    options = parser.parse_args(arguments)
    corpus = make_corpus(python_documents() if options.text is None else file_documents(options.text), max_words=options.words)
    settings = Settings(vocabulary=len(corpus.words), steps=options.steps)
    memory = {"num_embeddings": options.rows, "features": options.dim, "planes": options.planes, "boundary": corpus.words.index(END)}
    _, without = train(corpus, settings)
    model, perplexity = train(corpus, settings, **memory)
    print(f"with the memory perplexity is {perplexity / without:.3f} of that without")
    return model, perplexity / without


if __name__ == "__main__":
    main()
