"""Tables in models of transformers, accelerate and peft. A process that loads one with `from_pretrained` imports this module first.

transformers and accelerate load a checkpoint tensor by tensor, each by the name of its parameter; a table is one parameter, but two tensors
of a checkpoint. `dualbin.torch.convert`, :func:`pack_input_embeddings` and :func:`prepare` write into a model's configuration which modules
have tables, as for quantised models, and `from_pretrained` makes them anew. :func:`loading` and :func:`offload_map` are for accelerate.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dualbin.torch._bag import BinaryEmbeddingBag
from dualbin.torch._module import BinaryEmbedding
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_module import TableModule
from dualbin.torch._unfolded import fold, unfold

QUANT_METHOD = "dualbin"


def pack_input_embeddings(model: Any, *, projection: bool | int = False, planes: int = 1) -> BinaryEmbedding:
    """Pack the input embeddings of a PreTrainedModel. An output layer that shares their weight keeps its floats, untied for good.

    `tie_word_embeddings` of the configuration becomes False, so that `tie_weights()` and `from_pretrained` do not tie the output layer to
    the table, which it could not multiply by.

    Args:
        model: the model; the table is a new parameter, so make the optimizers afterwards.
        projection: put a matrix behind the table (see :class:`BinaryEmbedding`); the model goes on with its output.
        planes: 1 to 8, bits of a weight.

    Returns:
        The new input embeddings.

    Raises:
        TypeError: model is no PreTrainedModel, or its input embeddings are no nn.Embedding.
        ValueError: planes or projection is out of range.
    """
    _check_model("pack_input_embeddings", model)
    old = model.get_input_embeddings()
    if type(old) is not nn.Embedding:
        msg = f"the input embeddings of model must be an nn.Embedding, got a {type(old).__name__}"
        raise TypeError(msg)
    new = BinaryEmbedding.from_float(old, projection=projection, planes=planes)
    model.set_input_embeddings(new)
    prepare(model)
    return new


def prepare(model: Any) -> None:
    """Write into `model.config` which modules of a PreTrainedModel have tables, so that `save_pretrained` and `from_pretrained` keep them.

    `dualbin.torch.convert` and :func:`pack_input_embeddings` call it. Call it at the end of `__init__` of a model class that has tables of
    its own, and after you put a table into a model with `set_input_embeddings`; it unties an output layer from the table, as
    :func:`pack_input_embeddings` does.

    Raises:
        TypeError: model is no PreTrainedModel.
        ValueError: the model is quantised in another way already.
    """
    _check_model("prepare", model)
    other = getattr(model.config, "quantization_config", None)
    if other is not None and not is_ours(model.config):
        msg = f"model.config.quantization_config must be None or of dualbin, got {_method(other)!r}: a model is quantised in one way"
        raise ValueError(msg)
    modules = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, TableModule)}
    if modules:
        tables, first = {name: _description(part) for name, part in modules.items()}, dict[int, str]()
        for name, part in modules.items():
            if (source := first.setdefault(id(part._parameters.get("weight", part)), name)) != name:
                tables[name]["tied_to"] = source
        if isinstance(embeddings := _input_embeddings(model), TableModule):
            _untie(model, embeddings.weight)
        model.config.quantization_config = DualbinConfig(tables, own_ties(model))


def name_table(model: Any, place: str, old: nn.Module | None, new: TableModule) -> None:
    """What :func:`prepare` does, for one module `new` that is about to take the place of `old`; nothing if it cannot be done."""
    config = model.config
    if getattr(config, "quantization_config", None) is not None and not is_ours(config):
        return
    description = _description(new)
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, TableModule) and name != place and part._parameters.get("weight", part) is new._parameters.get("weight"):
            description["tied_to"] = name
            break
    if old is not None and old is _input_embeddings(model):
        _untie(model, old.weight)
    config.quantization_config = DualbinConfig(_tables(config) | {place: description}, _ties(config) | own_ties(model))


def unnamed_tables(model: Any) -> list[str]:
    """The modules of a PreTrainedModel that have tables of which its configuration says nothing, or another number of planes."""
    places = {place: description.get("planes", 1) for place, description in _tables(model.config).items()}
    modules = [(name, _planes(module)) for name, module in model.named_modules() if isinstance(module, TableModule)]
    return [name for name, planes in modules if not any(_is_place(name, place) and of == planes for place, of in places.items())]


def own_ties(model: Any) -> dict[str, str]:
    """The ties that a PreTrainedModel has, but its class does not make now that `tie_word_embeddings` is False.

    Returns:
        Name of a parameter -> name of the one that it is the same as; those of BertForMaskedLM are its two biases of the output layer.
    """
    if (ties := getattr(model, "all_tied_weights_keys", None)) is None:  # not yet: the model's class is making it
        return {}
    return _kept(model, ties, model.get_expanded_tied_weights_keys(all_submodels=True))


def unnamed_ties(model: Any) -> list[str]:
    """The targets of :func:`own_ties` of which the configuration says nothing."""
    named = _ties(model.config)
    return [target for target in own_ties(model) if not any(_is_place(target, place) for place in named)]


def is_ours(config: Any) -> bool:
    """Whether the configuration of a model of transformers says which modules have tables."""
    quantization = getattr(config, "quantization_config", None)
    return quantization is not None and _method(quantization) == QUANT_METHOD


@contextlib.contextmanager
def loading(model: nn.Module) -> Iterator[nn.Module]:
    """A `with` block in which accelerate can load a checkpoint into a model that has tables.

    ::

        with accelerate.init_empty_weights():
            model = Model()
        with dbt.hf.loading(model):
            accelerate.load_checkpoint_and_dispatch(model, path, device_map="auto")

    Raises:
        TypeError, ValueError: at the end, if the tensors of a table do not fit its module, were not in the checkpoint, or were offloaded.
    """
    unfold(model)
    try:
        yield model
    finally:
        not_loaded = fold(model, lambda tensor: not tensor.is_meta)
    if not_loaded:
        msg = "the checkpoint must hold bits and scale of every table, and the device map keep them on a device (they are small), "
        msg += f"got none for {not_loaded}"
        raise ValueError(msg)


def offload_map(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, on the CPU, by the names of its parameters and buffers.

    For `cpu_offload(model, state_dict=offload_map(model))` of accelerate, and calls like it. Its own map is the state_dict, in which a
    table is two tensors; it finds them there, so that `state_dict=` may as well be left out.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().to("cpu") for name, tensor in named}


def _tables(config: Any) -> dict[str, dict[str, Any]]:
    if not is_ours(config):
        return {}
    ours = config.quantization_config
    return dict(ours["tables"] if isinstance(ours, dict) else ours.tables)


def _ties(config: Any) -> dict[str, str]:
    if not is_ours(config):
        return {}
    ours = config.quantization_config
    return dict((ours.get("ties") if isinstance(ours, dict) else ours.ties) or {})


def _kept(model: Any, ties: dict[str, str], made: dict[str, str], embeddings: Any = None) -> dict[str, str]:
    """Those of `ties` that the model has and its class does not make (`made`), without those of tables and of `embeddings`, a weight."""

    def is_kept(target: str, source: str) -> bool:
        try:
            tensor = model.get_parameter_or_buffer(target)
            same = tensor is model.get_parameter_or_buffer(source)
        except AttributeError:
            return False
        return same and tensor is not embeddings and not isinstance(tensor, BinaryTable)

    return {target: source for target, source in ties.items() if target not in made and is_kept(target, source)}


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # a class of one's own need not say
        return None


def _untie(model: Any, embeddings: Any) -> None:
    """Let nothing tie an output layer of floats to input embeddings that have a table; `embeddings` is their weight as it is now.

    `tie_word_embeddings` stands for all ties of a model's class: those of other parameters are kept.
    """
    configs = (model.config, model.config.get_text_config())
    if not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return
    for config in configs:
        config.tie_word_embeddings = False
    for part in model.modules():
        if isinstance(part, _pretrained_model()):
            made = part.get_expanded_tied_weights_keys(all_submodels=True)
            part.all_tied_weights_keys = made | _kept(part, getattr(part, "all_tied_weights_keys", {}), made, embeddings)


def _description(module: Any) -> dict[str, Any]:
    """What the model's class does not say of a module; sizes may change, and are its own."""
    description: dict[str, Any] = {"module": type(module).__name__}
    if getattr(module, "_projects", False):
        description["projection"] = module.projection.shape[1]
    if (planes := _planes(module)) > 1:
        description["planes"] = planes
    return description


def _planes(module: Any) -> int:
    """Of its table, also where a parametrization has it, or while it is unfolded."""
    weight = module.weight
    return int(getattr(weight, "table", [weight])[0].planes)


def _method(config: Any) -> str:
    return str(config.get("quant_method") if isinstance(config, dict) else config.quant_method)


def _pretrained_model() -> Any:
    from transformers import PreTrainedModel  # noqa: PLC0415  (slow to import)

    return PreTrainedModel


def _check_model(function: str, model: object) -> None:
    if importlib.util.find_spec("transformers") is None:
        msg = f"dualbin.torch.hf.{function} needs transformers: pip install transformers"
        raise ImportError(msg)
    if not isinstance(model, _pretrained_model()):
        msg = f"model of {function} must be a transformers.PreTrainedModel, got a {type(model).__name__}"
        raise TypeError(msg)


# ---- what from_pretrained calls ----------------------------------------------------------------------------------------------------------

if importlib.util.find_spec("transformers") is not None:
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(QUANT_METHOD)
    class DualbinConfig(QuantizationConfigMixin):
        """Which modules of a model have tables; :func:`prepare` makes it.

        Args:
            tables: name of a module -> what it is.
            ties: name of a parameter -> name of the one that it is the same as, for ties that `tie_word_embeddings` does not make.
        """

        def __init__(self, tables: dict[str, dict[str, Any]], ties: dict[str, str] | None = None, **_: Any) -> None:
            self.quant_method = QUANT_METHOD  # type: ignore[assignment]
            self.tables = tables
            self.ties = ties or {}

    @register_quantizer(QUANT_METHOD)
    class DualbinQuantizer(HfQuantizer):
        """Gives a model its tables while `from_pretrained` loads it."""

        def validate_environment(self, *_: Any, **__: Any) -> None:
            if not self.pre_quantized:
                msg = "quantization_config must be left out for a float model: load it, and call dualbin.torch.convert(model)"
                raise ValueError(msg)

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            config: Any = self.quantization_config
            made: dict[str, Any] = {}
            self._tied: dict[str, str] = {}
            for place, description in config.tables.items():
                for name, module in [*model.named_modules(remove_duplicate=False)]:
                    if not _is_place(name, place):
                        continue
                    if not isinstance(module, TableModule):
                        parent, _, child = name.rpartition(".")
                        setattr(model.get_submodule(parent), child, _empty(place, module, description))
                    made[place] = name
            self._tied = {made[place]: made[entry["tied_to"]] for place, entry in config.tables.items() if entry.get("tied_to") in made}
            for name in self._tied:  # a checkpoint has one table for them: only that is loaded
                del model.get_submodule(name).weight
            model.all_tied_weights_keys.update(_ties_in(model, config.ties))
            unfold(model)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            not_loaded = fold(model, lambda tensor: getattr(tensor, "_is_hf_initialized", False))
            for name in not_loaded:  # the report that transformers prints names them as missing
                module = model.get_submodule(name.removesuffix(".weight"))
                module.to_empty(device=_device_of(model))
                module.reset_parameters()
            for name, source in self._tied.items():
                model.get_submodule(name).weight = model.get_submodule(source).weight
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True


def _is_place(name: str, place: str) -> bool:
    """Whether a module's name is that of the configuration, which may be that of a model around this one, or inside."""
    return name == place or name.endswith("." + place) or (bool(name) and place.endswith("." + name))


def _ties_in(model: Any, ties: dict[str, str]) -> dict[str, str]:
    """Ties of the configuration, by the names that the model has for both of their parameters."""
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]]
    here = {place: name for place in {*ties, *ties.values()} for name in names if _is_place(name, place)}
    return {here[target]: here[source] for target, source in ties.items() if target in here and source in here}


def _empty(place: str, module: Any, description: dict[str, Any]) -> Any:
    """A module on the meta device in the place of `module`, which the model's class made."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        msg = f"{place} must be an nn.Embedding or nn.EmbeddingBag of the model's class to become a table, got a {type(module).__name__}"
        raise TypeError(msg)
    planes = description.get("planes", 1)
    with torch.device("meta"):
        if isinstance(module, nn.EmbeddingBag):
            return BinaryEmbeddingBag.from_float(module.to("meta"), planes=planes)
        return BinaryEmbedding.from_float(module.to("meta"), projection=description.get("projection", False), planes=planes)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
