"""Replacing the large nn.Embedding and nn.EmbeddingBag modules of a model."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dualbin._checks import check_int, check_planes
from dualbin._schema import BAG_MODES
from dualbin.torch import _native_call
from dualbin.torch._bag import BinaryEmbeddingBag
from dualbin.torch._module import BinaryEmbedding
from dualbin.torch._table_module import TableModule

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Converted:
    """One module that :func:`convert` looked at.

    Attributes:
        name: where it is in the model; the first place, if it is in several.
        rows, dim: V and D.
        before: bytes of its float weight.
        after: bytes of the packed table; `before` where the module was kept.
        reason: why it was kept; empty if it was replaced.
        note: what to know about the replacement; mostly empty.
    """

    name: str
    rows: int
    dim: int
    before: int
    after: int
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert` did; `print` it.

    Attributes:
        replaced, kept: the modules, in the order of the model. Of modules that share a weight, the first counts its bytes.
        bytes_saved: bytes of parameters that the model has less than before.
    """

    replaced: list[Converted] = field(default_factory=list)
    kept: list[Converted] = field(default_factory=list)

    @property
    def bytes_saved(self) -> int:
        return sum(entry.before - entry.after for entry in self.replaced)

    def __str__(self) -> str:
        lines = [
            f"replaced {entry.name}: {entry.rows} x {entry.dim}, {_mib(entry.before)} -> {_mib(entry.after)} MiB"
            + (f"; {entry.note}" if entry.note else "")
            for entry in self.replaced
        ]
        lines += [f"kept {entry.name}: {entry.rows} x {entry.dim}, {entry.reason}" for entry in self.kept]
        return "\n".join([*lines, f"{len(self.replaced)} replaced, {len(self.kept)} kept, {_mib(self.bytes_saved)} MiB saved"])


def convert(model: nn.Module, min_rows: int = 10_000, *, planes: int = 1) -> ConvertReport:
    """Replace every nn.Embedding and nn.EmbeddingBag of at least `min_rows` rows, in place.

    Values become signs times the mean magnitude of their row, or the nearest of 2**planes levels (:meth:`BinaryTable.from_float`). Modules
    that share a weight share a table.
    A padding row that holds values keeps them and is not trained, as in nn.Embedding, and the report says so. On the meta device only
    shapes change: load a state_dict with `assign=True` afterwards. Make the optimizers afterwards, too: the tables are new parameters, for
    :class:`XOR`.

    A module is kept, and the report says why, if it has fewer rows, is a subclass with code of its own, uses options that a packed table
    cannot have, has hooks or more than its weight, or shares its weight with another kind of module (an output layer, say: untie them
    first).

    Args:
        model: any module that has such modules as submodules.
        min_rows: at least 1.
        planes: 1 to 8, bits of a weight; a bag of mode "majority" is kept if it is above 1.

    Returns:
        What was replaced, what was kept and why, and the bytes saved.

    Raises:
        TypeError, ValueError: model is no module or is itself an embedding; min_rows is below 1; a weight holds a NaN or infinity. The
            model has not changed then.
    """
    min_rows = check_int("min_rows", min_rows, low=1)
    check_planes(planes)
    if not isinstance(model, nn.Module):
        msg = f"model must be an nn.Module, got a {type(model).__name__}"
        raise TypeError(msg)
    if isinstance(model, (nn.Embedding, nn.EmbeddingBag)):
        msg = f"model must be a module that has embeddings in it, got a {type(model).__name__} itself: use BinaryEmbedding.from_float"
        raise TypeError(msg)
    places = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _is_embedding(module)]
    names: dict[Any, str] = {}
    for name, module in places:
        names.setdefault(module, name)
    reasons = {module: _reason(module, min_rows, planes) for module in names}
    users = _users(model)
    report, replacements = ConvertReport(), dict[nn.Module, nn.Module]()
    for module, name in names.items():
        sharing = users.get(id(module.weight), {})  # none has it where a parametrization computes it
        rows, dim = module.weight.shape
        before = module.weight.numel() * module.weight.element_size()
        if reason := reasons[module] or _tie_reason(module, sharing, reasons):
            report.kept.append(Converted(name, rows, dim, before, before, reason))
            continue
        new = replacements[module] = _packed(module, planes)
        first = next((replacements[other] for other in sharing if other in replacements and other is not module), None)
        if first is not None:
            new.weight = first.weight
            before = 0
        after = 0 if first is not None else new.weight.bits.nbytes + new.weight.scale.nbytes
        report.replaced.append(Converted(name, rows, dim, before, after, note=_padding_note(new)))
    for name, module in places:  # nothing has changed until here
        if module in replacements:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[module])
    _tell_transformers(model)
    return report


def _tell_transformers(model: nn.Module) -> None:
    """Let `save_pretrained` of a model of transformers, or of those in `model`, write which modules have tables."""
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    from dualbin.torch import hf  # noqa: PLC0415  (only a program that uses transformers needs it)

    outermost: list[str] = []
    for name, part in model.named_modules():
        if isinstance(part, modeling.PreTrainedModel) and not any(name.startswith(other) for other in outermost):
            outermost.append(name + "." if name else "")
            try:
                hf.prepare(part)
            except ValueError as error:  # the model works all the same
                warnings.warn(f"save_pretrained will not keep the tables of this model: {error}", stacklevel=3)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not isinstance(module, TableModule)


def _packed(module: Any, planes: int) -> Any:
    kind: Any = BinaryEmbeddingBag if isinstance(module, nn.EmbeddingBag) else BinaryEmbedding
    return kind.from_float(module, planes=planes)


def _padding_note(module: Any) -> str:
    if module.padding_idx is None or module.weight.is_meta or float(module.weight.scale[module.padding_idx]) == 0:
        return ""
    return f"padding row {module.padding_idx} holds values: it keeps them and is not trained"


def _users(model: nn.Module) -> dict[int, dict[nn.Module, str]]:
    """Identity of a parameter -> the modules that hold it, with the name that it has there."""
    users: dict[int, dict[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            users.setdefault(id(parameter), {})[module] = name
    return users


def _reason(module: Any, min_rows: int, planes: int) -> str:
    """Why a module has to be kept, looking at nothing but itself; empty if it need not."""
    checks = {
        f"fewer than {min_rows} rows": module.weight.shape[0] < min_rows,
        f"a {type(module).__name__}, a subclass with code of its own": type(module) not in {nn.Embedding, nn.EmbeddingBag},
        f"its dtype is {module.weight.dtype}": module.weight.dtype not in _native_call.FLOAT_TYPES,
        "uses max_norm or scale_grad_by_freq": module.max_norm is not None or module.scale_grad_by_freq,
        f"mode {getattr(module, 'mode', None)!r}": isinstance(module, nn.EmbeddingBag) and module.mode not in BAG_MODES,
        f"mode 'majority', which {planes} planes do not have": planes > 1 and getattr(module, "mode", None) == "majority",
        "has parameters, buffers or modules of its own": [*module._parameters, *module._buffers, *module._modules] != ["weight"],
        "has hooks": any(getattr(module, hooks) for hooks in _HOOKS),
    }
    return next((reason for reason, holds in checks.items() if holds), "")


def _tie_reason(module: Any, sharing: dict[nn.Module, str], reasons: dict[nn.Module, str]) -> str:
    for other, name in sharing.items():
        if reasons.get(other, "no embedding") or other.padding_idx != module.padding_idx:
            return f"shares its weight with {name}"
    return ""


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
