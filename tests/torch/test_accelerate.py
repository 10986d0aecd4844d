"""accelerate and peft on models with tables."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dualbin.torch as dbt

accelerate = pytest.importorskip("accelerate")
hf = pytest.importorskip("dualbin.torch.hf")

IDS = torch.tensor([[1, 2, 19], [0, 2, 2]])


def make():
    return nn.Sequential(dbt.BinaryEmbedding(20, 8, projection=True), nn.Linear(8, 2))


def test_a_model_made_empty_and_loaded(tmp_path):
    model = make()
    nn.init.normal_(model[0].projection)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    for device_map in ("auto", {"": "cpu"}, {"0": "cpu", "1": "cpu"}, {"0": "cpu", "1": "disk"}):
        with accelerate.init_empty_weights():
            empty = make()
        assert all(p.is_meta for p in empty.parameters())
        with hf.loading(empty):
            accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map, offload_folder=tmp_path)
        assert isinstance(empty[0].weight, dbt.BinaryTable)
        assert empty[0].weight.requires_grad
        assert torch.equal(empty(IDS), model(IDS))


@pytest.mark.parametrize("lacks", [["0.weight.bits", "0.weight.scale"], ["0.weight.scale"]])
def test_a_table_that_is_not_in_the_checkpoint_is_noticed(tmp_path, lacks):
    state = {name: tensor for name, tensor in make().state_dict().items() if name not in lacks}
    with accelerate.init_empty_weights():
        empty = make()

    def load():
        with hf.loading(empty):
            for name, tensor in state.items():
                accelerate.utils.set_module_tensor_to_device(empty, name, "cpu", value=tensor)

    with pytest.raises(ValueError, match=r"none for \['0\.weight'\]"):
        load()
    assert isinstance(empty[0].weight, dbt.BinaryTable)


def test_a_checkpoint_of_another_size_is_refused():
    model = make()
    before = model[0].weight

    def load():
        with hf.loading(model):
            model[0].weight.bits = torch.zeros(21, 1, dtype=torch.uint8)
            model[0].weight.scale = torch.ones(21, 1)

    with pytest.raises(ValueError, match=r"0\.weight: bits must have the 20 rows of the module, got 21"):
        load()
    assert model[0].weight is before


def test_modules_that_share_a_table_share_it_after_loading():
    model = nn.Sequential(dbt.BinaryEmbedding(20, 8), dbt.BinaryEmbeddingBag(20, 8))
    model[1].weight = model[0].weight
    with hf.loading(model):
        model[0].weight.bits = torch.zeros(20, 1, dtype=torch.uint8)
    assert model[0].weight is model[1].weight
    assert not model[0].weight.bits.any()


class Sharing(nn.Module):
    """Two modules that share a table, and two with tables of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = dbt.BinaryEmbedding(20, 8), dbt.BinaryEmbedding(20, 8), dbt.BinaryEmbedding(20, 8)
        self.d, self.bag = nn.Linear(8, 2), dbt.BinaryEmbeddingBag(20, 8)
        self.b.weight = self.a.weight

    def forward(self, ids):
        return self.d(self.a(ids) + 2 * self.b(ids) + 3 * self.c(ids) + 4 * self.bag(ids).unsqueeze(1))


@pytest.fixture(params=[make, Sharing])
def model(request):
    return request.param()


CPU = torch.device("cpu")


@pytest.mark.parametrize("how", ["cpu", "cpu with a map", "disk"])
def test_offloading(tmp_path, model, how):
    expected = model(IDS)
    tables = [module for module in model.modules() if isinstance(getattr(module, "weight", None), dbt.BinaryTable)]
    if how == "disk":
        accelerate.disk_offload(model, tmp_path, CPU)
    else:
        accelerate.cpu_offload(model, CPU, state_dict=None if how == "cpu" else hf.offload_map(model))
    for _ in range(2):
        assert all(module.weight.is_meta for module in tables)
        assert torch.equal(model(IDS), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(module.weight.is_meta for module in tables)
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("how", ["cpu", "cpu with a map", "disk"])
def test_offloading_a_module_with_all_that_is_in_it(tmp_path, model, how):
    expected = model(IDS)
    classes = {"preload_module_classes": [type(model).__name__]}
    if how == "disk":
        accelerate.disk_offload(model, tmp_path, CPU, **classes)
    else:
        accelerate.cpu_offload(model, CPU, state_dict=None if how == "cpu" else hf.offload_map(model), **classes)
    for _ in range(2):
        assert next(model.parameters()).is_meta
        assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("offloaded", range(5))
def test_dispatching(tmp_path, model, place, offloaded):
    expected = model(IDS)
    names = [name for name, _ in model.named_children()]
    places = dict.fromkeys(names, "cpu") | {names[offloaded % len(names)]: place}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert torch.equal(model(IDS), expected)


def test_an_offloaded_table_that_is_not_in_the_map_says_what_to_call():
    model = make()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("0.weight")}
    accelerate.cpu_offload(model, CPU, state_dict=state)
    with pytest.raises(KeyError, match=r"state_dict=dualbin\.torch\.hf\.offload_map\(model\)"):
        model(IDS)


def test_loading_outside_the_block_says_what_to_call(tmp_path):
    save_file(make().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with accelerate.init_empty_weights():
        empty = make()
    with pytest.raises(AttributeError, match=r"with dualbin\.torch\.hf\.loading\(model\)"):
        accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), "auto")


def test_tables_have_addresses_of_their_own():
    a, b = dbt.BinaryEmbedding(20, 8).weight, dbt.BinaryEmbedding(20, 8).weight
    assert a.data_ptr() == a.bits.data_ptr() == a.detach().data_ptr() != b.data_ptr()


def test_the_sizes_that_accelerate_computes_are_upper_bounds():
    assert accelerate.infer_auto_device_map(make(), max_memory={"cpu": 10**6}) == {"": "cpu"}
    assert accelerate.utils.compute_module_sizes(make())[""] >= sum(p.numel() * p.element_size() for p in make().parameters())


# ---- peft --------------------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first, self.head = dbt.BinaryEmbedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.first(self.words(ids)).tanh())


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["words"]}])
def test_lora_beside_a_table(tmp_path, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["first"], **options))
    trained = [p for p in model.parameters() if p.requires_grad]
    tables = [p for p in trained if isinstance(p, dbt.BinaryTable)]
    assert len(tables) == len(options)
    optimizers = [torch.optim.AdamW([p for p in trained if not isinstance(p, dbt.BinaryTable)], lr=0.1)]
    optimizers += [dbt.XOR(tables)] if tables else []
    for _ in range(10):
        model(IDS).sub(1).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    kept = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "words" in name]
    assert sorted(kept) == [f"base_model.model.words.weight.{array}" for array in ("bits", "scale")] * len(options)
    fresh = Model()
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert not torch.equal(model(IDS), Model()(IDS))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS), again(IDS))
    assert isinstance(merged.words.weight, dbt.BinaryTable)


def test_lora_on_a_table_trains_and_says_that_it_cannot_be_merged():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["words"]))
    model(IDS).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_embedding" in name)
    with pytest.raises(NotImplementedError, match=r"a packed weight is \+1 or -1.*dequantize"):
        model.merge_adapter()
