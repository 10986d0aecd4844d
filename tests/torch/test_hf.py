"""Models of transformers with tables: saved and loaded, tied and resized, and model classes that have tables of their own."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import dualbin.torch as dbt

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("dualbin.torch.hf")

V = 300
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.disable_progress_bar()


def llama(tied=False):
    config = transformers.LlamaConfig(vocab_size=V, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def packed(tied=False, projection=False):
    model = llama(tied)
    if tied or projection:
        hf.pack_input_embeddings(model, projection=projection)
    else:
        dbt.convert(model, min_rows=V)
    return model


def saved_and_loaded(model, folder, cls=None, **options):
    model.save_pretrained(folder, max_shard_size=options.pop("max_shard_size", "1GB"))
    again, report = (cls or type(model)).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return again


@pytest.mark.parametrize(
    ("tied", "projection", "options"),
    [
        (False, False, {}),
        (False, False, {"cls": transformers.AutoModelForCausalLM, "max_shard_size": "5KB"}),
        (True, False, {"device_map": {"": "cpu"}}),
        (True, True, {}),
    ],
)
def test_a_model_is_the_same_after_save_and_from_pretrained(tmp_path, tied, projection, options):
    model = packed(tied, projection)
    if projection:
        nn.init.normal_(model.get_input_embeddings().projection)
    again = saved_and_loaded(model, tmp_path / "first", **options)
    assert type(again.get_input_embeddings()) is dbt.BinaryEmbedding
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert again.get_input_embeddings().weight.requires_grad
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    twice = saved_and_loaded(again, tmp_path / "second")
    assert torch.equal(twice(IDS).logits, model(IDS).logits)


def test_fewer_planes_are_saved_once_the_configuration_says_so(tmp_path):
    model = llama()
    table = hf.pack_input_embeddings(model, planes=4)
    table.weight = nn.Parameter(table.weight.with_planes(2))
    with pytest.raises(ValueError, match=r"embed_tokens'\] have tables, or of how many planes.*call dualbin.torch.hf.prepare"):
        model.save_pretrained(tmp_path)
    hf.prepare(model)
    again = saved_and_loaded(model, tmp_path).get_input_embeddings()
    assert again.weight.planes == 2
    assert torch.equal(again.weight, table.weight)


@pytest.mark.parametrize("how", ["convert", "pack", "by hand"])
def test_planes_after_save_and_from_pretrained(tmp_path, how):
    model = llama(tied=how == "pack")
    if how == "convert":
        dbt.convert(model, min_rows=V, planes=2)
    elif how == "pack":
        hf.pack_input_embeddings(model, projection=32, planes=2)
    else:
        model.set_input_embeddings(dbt.BinaryEmbedding.from_float(model.get_input_embeddings(), planes=2))
    (description,) = model.config.quantization_config.tables.values()
    assert description == {"module": "BinaryEmbedding", "planes": 2} | ({"projection": 32} if how == "pack" else {})
    again = saved_and_loaded(model, tmp_path)
    assert again.get_input_embeddings().weight.planes == 2
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "planes" not in str(packed().config.quantization_config)
    with pytest.raises(ValueError, match="planes must be between 1 and 8, got 9"):
        hf.pack_input_embeddings(llama(), planes=9)


def test_a_padding_row_in_use_and_another_dtype(tmp_path):
    model = llama()
    model.config.pad_token_id = model.model.embed_tokens.padding_idx = 2
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = torch.randn(32)
    dbt.convert(model, min_rows=V)
    again = saved_and_loaded(model, tmp_path, dtype=torch.bfloat16)
    table = again.get_input_embeddings().weight
    assert again.get_input_embeddings().padding_idx == 2
    assert torch.equal(table, model.get_input_embeddings().weight)
    assert (table.dtype, table.scale.dtype, again(IDS).logits.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_the_base_model_and_the_model_around_it_load_from_each_other(tmp_path):
    model = packed()
    model.save_pretrained(tmp_path / "head")
    base, report = transformers.LlamaModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert report["unexpected_keys"] == {"lm_head.weight"}
    assert torch.equal(base(IDS)[0], model.model(IDS)[0])
    base.save_pretrained(tmp_path / "base")
    around, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(around.model(IDS)[0], model.model(IDS)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_tie_weights_leaves_an_untied_head_alone(recompute):
    model = llama(tied=True)
    weight = model.get_output_embeddings().weight
    module = hf.pack_input_embeddings(model)
    model.tie_weights(recompute_mapping=recompute)
    assert model.get_output_embeddings().weight is weight
    assert model.get_input_embeddings() is module
    model(IDS, labels=IDS).loss.backward()
    assert module.weight.grad.ids.tolist() == IDS.flatten().tolist()


def bert(tied):
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=V, tie_word_embeddings=tied, **SIZES)).eval()


@pytest.mark.parametrize(("make", "tied"), [(llama, False), (llama, True), (bert, False)])
@pytest.mark.parametrize("options", [False, True])
def test_a_table_put_in_by_hand(tmp_path, make, tied, options):
    model = make(tied)
    head = model.get_output_embeddings().weight
    model.set_input_embeddings(dbt.BinaryEmbedding.from_float(model.get_input_embeddings()))
    model.tie_weights()
    assert model.get_output_embeddings().weight is head
    model.save_pretrained(tmp_path, **({"state_dict": model.state_dict()} if options else {}))
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(IDS).logits, model(IDS).logits)


BIAS = "cls.predictions.decoder.bias"


@pytest.mark.parametrize("how", ["pack", "put in", "assigned"])
def test_parameters_other_than_the_table_stay_tied(tmp_path, how):
    model = bert(tied=True)
    embeddings = model.get_input_embeddings()
    if how == "pack":
        hf.pack_input_embeddings(model)
    elif how == "put in":
        model.set_input_embeddings(dbt.BinaryEmbedding.from_float(embeddings))
    else:
        model.bert.embeddings.word_embeddings = dbt.BinaryEmbedding.from_float(embeddings)
        hf.prepare(model)
    assert model.config.quantization_config.ties == {BIAS: "cls.predictions.bias"}
    model.tie_weights()
    nn.init.normal_(model.get_parameter(BIAS))
    again = saved_and_loaded(model, tmp_path / "first")
    for loaded in (again, saved_and_loaded(again, tmp_path / "second")):
        assert loaded.get_parameter(BIAS) is loaded.cls.predictions.bias
        assert torch.equal(loaded.get_parameter(BIAS), model.get_parameter(BIAS))
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    base, report = transformers.BertModel.from_pretrained(tmp_path / "first", add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(base(IDS)[0], model.bert(IDS)[0])


def test_ties_that_the_configuration_does_not_name_are_not_saved(tmp_path):
    model = bert(tied=True)
    model.bert.set_input_embeddings(dbt.BinaryEmbedding.from_float(model.get_input_embeddings()))  # which knows nothing of the head
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*decoder\.bias'\] are tied.*dualbin\.torch\.hf\.prepare\(model\)"):
        model.save_pretrained(tmp_path)
    hf.prepare(model)
    nn.init.normal_(model.get_parameter(BIAS))
    assert torch.equal(saved_and_loaded(model, tmp_path)(IDS).logits, model(IDS).logits)


def test_a_table_assigned_by_hand(tmp_path):
    model = llama(tied=True)
    model.model.embed_tokens = dbt.BinaryEmbedding.from_float(model.model.embed_tokens)
    assert torch.equal(saved_and_loaded(model, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_encoder_and_a_decoder_that_share_a_table(tmp_path, by_hand):
    config = transformers.T5Config(vocab_size=V, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if by_hand:
        model.set_input_embeddings(dbt.BinaryEmbedding.from_float(model.get_input_embeddings()))
    else:
        hf.pack_input_embeddings(model)
    again = saved_and_loaded(model, tmp_path)
    assert again.shared.weight is again.encoder.embed_tokens.weight is again.decoder.embed_tokens.weight
    assert torch.equal(again(IDS, decoder_input_ids=IDS).logits, model(IDS, decoder_input_ids=IDS).logits)


@pytest.mark.parametrize("given", [False, True])
def test_a_table_that_the_configuration_does_not_name_is_not_saved(tmp_path, given):
    model = bert(tied=False)
    embeddings = model.bert.embeddings
    embeddings.word_embeddings = dbt.BinaryEmbedding.from_float(embeddings.word_embeddings)  # which knows nothing of the model
    options = {"state_dict": model.state_dict()} if given else {}
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*\['bert\.embeddings\.word_embeddings'\].*dualbin\.torch\.hf\.prepare\(model\)"):
        model.save_pretrained(tmp_path, **options)
    hf.prepare(model)
    assert torch.equal(saved_and_loaded(model, tmp_path)(IDS).logits, model(IDS).logits)


def test_a_model_quantised_in_another_way_warns_when_it_is_saved(tmp_path):
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    model.set_input_embeddings(dbt.BinaryEmbedding.from_float(model.get_input_embeddings()))
    with pytest.warns(UserWarning, match="quantised in another way"):
        model.save_pretrained(tmp_path)


def test_a_head_made_of_a_table_says_what_to_call():
    model = llama()
    model.lm_head.weight = dbt.BinaryEmbedding.from_float(model.get_input_embeddings()).weight
    with pytest.raises(NotImplementedError, match=r"Untie.*dualbin\.torch\.hf\.pack_input_embeddings"):
        model(IDS)


def test_growing_the_vocabulary_in_training(tmp_path):
    model = packed(tied=True)
    module = model.get_input_embeddings()
    optimizer = dbt.XOR([module.weight])

    def step(ids):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(IDS)
    before, counts = module.weight.detach().clone(), optimizer.state[module.weight]["record"].clone()
    dbt.grow(module, V + 10, optimizer=optimizer)
    assert model.resize_token_embeddings(V + 10, mean_resizing=False) is module
    assert torch.equal(module.weight[:V], before)
    assert torch.equal(optimizer.state[module.weight]["record"][:V], counts)
    assert (model.config.vocab_size, tuple(model.get_output_embeddings().weight.shape)) == (V + 10, (V + 10, 32))
    step(IDS + 10)
    again = saved_and_loaded(model.eval(), tmp_path)
    assert torch.equal(again(IDS + 10).logits, model(IDS + 10).logits)


class Own(transformers.PreTrainedModel):
    """A model class with tables of its own."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = dbt.BinaryEmbedding(V, 16, projection=24, padding_idx=0)
        self.parts = dbt.BinaryEmbeddingBag(50, 24, mode="sum", planes=2)
        self.head = nn.Linear(24, 4)
        self.post_init()
        hf.prepare(self)

    def forward(self, ids):
        return self.head(self.words(ids) + self.parts(ids % 50).unsqueeze(1))


def test_a_model_class_with_tables(tmp_path):
    torch.manual_seed(0)
    model = Own(transformers.LlamaConfig())
    assert model.words.weight.scale.flatten()[:3].tolist() == pytest.approx([0, 0.3, 0.3])
    assert torch.equal(saved_and_loaded(model, tmp_path)(IDS), model(IDS))


def test_what_a_checkpoint_lacks_is_as_in_a_new_model(tmp_path):
    model = Own(transformers.LlamaConfig())
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if not k.startswith("words")})
    again, report = Own.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"words.weight.bits", "words.weight.scale", "words.projection"}
    assert again.words.weight.scale.flatten()[:3].tolist() == pytest.approx([0, 0.3, 0.3])
    assert 0.4 < (again.words.weight.dequantize()[1:] > 0).float().mean() < 0.6
    assert 0.1 < again.words.projection.std() < 0.5
    assert torch.equal(again.parts.weight, model.parts.weight)


def test_a_process_that_imports_hf_loads_it(tmp_path):
    model = packed()
    model.save_pretrained(tmp_path)
    code = f"""
import torch, dualbin.torch.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(type(model.get_input_embeddings()).__name__, model(torch.tensor({IDS.tolist()})).logits.double().sum().item())
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "BinaryEmbedding"
    assert float(out[1]) == pytest.approx(model(IDS).logits.double().sum().item(), rel=1e-4, abs=1e-3)


def test_sizes_and_configuration():
    model = llama()
    before = model.get_memory_footprint()
    report = dbt.convert(model, min_rows=V)
    assert model.get_memory_footprint() == before - report.bytes_saved
    assert model.num_parameters() == llama().num_parameters()
    assert json.loads(model.config.to_json_string())["quantization_config"] == {
        "quant_method": "dualbin",
        "tables": {"model.embed_tokens": {"module": "BinaryEmbedding"}},
        "ties": {},
    }


def test_arguments_that_are_refused():
    with pytest.raises(TypeError, match=r"model of prepare must be a transformers\.PreTrainedModel, got a Linear"):
        hf.prepare(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"the input embeddings of model must be an nn\.Embedding, got a BinaryEmbedding"):
        hf.pack_input_embeddings(packed())
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.warns(UserWarning, match="save_pretrained will not keep the tables.*got 'gptq'"):
        dbt.convert(model, min_rows=V)
    assert type(model.get_input_embeddings()) is dbt.BinaryEmbedding
