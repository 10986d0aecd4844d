"""Language models of `transformers`, small and with random weights, on a binary input table."""

import pytest
import torch
from torch import nn

import dualbin.torch as dbt

transformers = pytest.importorskip("transformers")

V = 300
SMALL = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(tied):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=tied, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def llama(tied):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=tied, **sizes, **SMALL))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generates_and_trains_with_a_binary_input_table(make):
    model = make(tied=True)
    head = model.get_output_embeddings().weight
    model.set_input_embeddings(dbt.BinaryEmbedding.from_float(model.get_input_embeddings()))
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is head  # the output layer keeps its float weight
    ids = torch.randint(3, V, (2, 12))
    model.eval()
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    assert generated.shape[1] > 12
    assert int(generated.max()) < V

    model.train()
    dense = [parameter for parameter in model.parameters() if parameter is not table]
    optimizers = [torch.optim.AdamW(dense, lr=1e-3), dbt.XOR([table])]
    before, dense_before = table.detach().clone(), head.detach().clone()
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = (table.bits != before.bits).any(1)
    assert changed.any()
    assert set(changed.nonzero().flatten().tolist()) <= set(ids.flatten().tolist())
    assert not torch.equal(head, dense_before)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_convert_replaces_the_input_table(make):
    model = make(tied=False)
    dense = model.get_input_embeddings().weight.detach().clone()
    report = dbt.convert(model, min_rows=V)
    assert [(entry.rows, entry.dim) for entry in report.replaced] == [(V, 32)]
    assert report.bytes_saved == V * 32 * 4 - V * (4 + 4)
    assert type(model.get_input_embeddings()) is dbt.BinaryEmbedding
    table = model.get_input_embeddings().weight
    assert torch.equal(table, dbt.BinaryTable.from_float(dense, padding_idx=model.get_input_embeddings().padding_idx))
    ids = torch.randint(3, V, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert table.grad.ids.tolist() == ids.flatten().tolist()


def test_convert_keeps_a_tied_table_and_says_so():
    model = gpt2(tied=True)
    report = dbt.convert(model, min_rows=V)
    assert report.replaced == []
    assert [entry.reason for entry in report.kept if entry.rows == V] == ["shares its weight with lm_head.weight"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_saved_model_loads_again(tmp_path):
    model, other = llama(tied=False), llama(tied=False)
    for each in (model, other):
        dbt.convert(each, min_rows=V)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    ids = torch.randint(3, V, (2, 5))
    assert torch.equal(model(ids).logits, other(ids).logits)
