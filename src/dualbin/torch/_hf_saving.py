"""What a table does when it becomes part of a model of transformers, and when `save_pretrained` saves it.

`from_pretrained` makes modules from the configuration alone and never asks one of ours; so a table that the configuration does not name
would come back as random floats, of which only a report of transformers' own tells. A table is named when it is put into a model; where the
model cannot be found then, the last place where this is noticed is the saving.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

from torch import nn


def name_table(parent: nn.Module, name: str, table: Any) -> None:
    """Name the module `table`, which is about to become `parent.name`, in the configuration of the model of transformers that it is in."""
    if (pretrained_model := _pretrained_model()) is None:
        return
    model = _self_of("set_input_embeddings", pretrained_model) or parent
    place = next((path for path, module in model.named_modules() if module is parent), None)
    if place is None or not isinstance(model, pretrained_model):
        return
    _hf().name_table(model, f"{place}.{name}" if place else name, parent._modules.get(name), table)


def check_is_named() -> None:
    """Do nothing, unless called from within `save_pretrained` of a model of transformers that has a table its configuration does not name.

    Raises:
        ValueError: it is so, or it has ties that the configuration does not name. A model that is quantised in another way cannot name
            its tables: there it is a warning.
    """
    pretrained_model = _pretrained_model()
    model = None if pretrained_model is None else _self_of("save_pretrained", pretrained_model)
    if model is None or getattr(model, "_hf_peft_config_loaded", False):  # of a model with adapters only these are saved
        return
    hf = _hf()
    if not (unnamed := hf.unnamed_tables(model)):
        _check_ties(hf, model)
        return
    msg = f"the configuration of this {type(model).__name__} does not say that {unnamed} have tables, or of how many planes, and "
    msg += "from_pretrained would not make these again"
    if getattr(model.config, "quantization_config", None) is None or hf.is_ours(model.config):
        msg += ": call dualbin.torch.hf.prepare(model) before save_pretrained (dualbin.torch.convert(model) and "
        msg += "dualbin.torch.hf.pack_input_embeddings(model) do it), and import dualbin.torch.hf before from_pretrained"
        raise ValueError(msg)
    msg += ", since the model is quantised in another way: load with dualbin.torch.convert(model) and load_state_dict"
    warnings.warn(msg, stacklevel=2)


def _check_ties(hf: Any, model: Any) -> None:
    if hf.is_ours(model.config) and (unnamed := hf.unnamed_ties(model)):
        msg = f"the configuration of this {type(model).__name__} does not say that {unnamed} are tied, and from_pretrained would make new "
        msg += "ones: call dualbin.torch.hf.prepare(model) before save_pretrained"
        raise ValueError(msg)


def _hf() -> Any:
    """The module, which imports transformers and all modules that have tables; it registers what `from_pretrained` needs, too."""
    return importlib.import_module("dualbin.torch.hf")


def _pretrained_model() -> Any:
    """The class, if this process has imported it."""
    return getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)


def _self_of(method: str, cls: type) -> Any:
    """The outermost object of class `cls` whose `method` is running, or None. Modules are not told of the model that they are in."""
    found, frame = None, sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == method and isinstance(model := frame.f_locals.get("self"), cls):
            found = model
        frame = frame.f_back  # type: ignore[assignment]
    return found
