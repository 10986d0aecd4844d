"""What the modules that own a table share: initial values, and the two entries of the state_dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualbin._checks import (
    INDEPENDENT,
    check_dim,
    check_initial_scale,
    check_padding_bits,
    check_padding_idx,
    check_planes,
    check_rows,
    check_spread,
)
from dualbin._schema import packed_width
from dualbin.torch._hf_saving import check_is_named, name_table
from dualbin.torch._native_call import fresh
from dualbin.torch._offload import give_tables
from dualbin.torch._state_bits import StateBits, plain
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_checks import check_dtype, check_float_table, check_generator, clear_padding_bits

#: rows that are filled at a time where a copy is needed
_FILL_ROWS = 1 << 16


class TableModule(nn.Module):
    """A module whose parameter `weight` is a BinaryTable, saved as `weight.bits` and `weight.scale`."""

    weight: BinaryTable
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    _initial_scale: float
    _spread: int = INDEPENDENT
    #: for transformers, whose initialisation of a new model leaves marked modules alone: a new table is random already
    _is_hf_initialized = True

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New random bits; every scale and the spread of the signs as given to the constructor (0.3 and 0.5 after `from_float`), the
        padding row's scale 0. Magnitudes of several planes are uniform below half of their range.
        """
        table: Any = self.weight
        check_generator(generator, table.device)
        with torch.no_grad():
            signs = table.bits[:, : packed_width(self.embedding_dim)]
            pattern = None if self._spread == INDEPENDENT else torch.empty_like(signs[:1]).random_(0, 256, generator=generator)
            fill_random(signs, pattern, self._spread, generator)
            fill_magnitudes(table.bits, self.embedding_dim, generator)
            clear_padding_bits(table.bits, self.embedding_dim)
            table.scale.fill_(self._initial_scale)
            if self.padding_idx is not None:
                table.scale[self.padding_idx] = 0

    def _make(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
        scale: float,
        spread: float,
        planes: int = 1,
    ) -> None:
        """Check the constructor's arguments and make a table of random bits."""
        self._allocate((num_embeddings, embedding_dim), padding_idx, device, dtype, scale, spread, planes)
        self.reset_parameters(generator)

    def _allocate(
        self,
        shape: tuple[int, int],
        padding_idx: int | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        scale: float,
        spread: float,
        planes: int,
        part: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        """Check what all constructors have in common and make a table that nobody has filled.

        `part(V)` tells which rows of a table of several ranks are here, the first and the end; without it all are.
        """
        num_embeddings, embedding_dim = shape
        dim = check_dim("embedding_dim", embedding_dim)
        rows = check_rows("num_embeddings", num_embeddings, dim)
        dtype = check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        padding_idx = check_padding_idx(padding_idx, rows)
        scale = check_initial_scale(scale)
        different = check_spread(spread)
        first, end = (0, rows) if part is None else part(rows)
        bits = fresh((end - first, check_planes(planes) * packed_width(dim)), torch.uint8, device)
        scales = fresh((end - first, 1), torch.float32, bits.device)
        self._setup(BinaryTable._wrap(bits, scales, dim, dtype, None if part is None else first), padding_idx, scale, different)
        self.num_embeddings = rows

    def _setup(self, table: BinaryTable, padding_idx: int | None, scale: float, spread: int = INDEPENDENT) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's or nn.EmbeddingBag's, which make a float table
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._initial_scale, self._spread = scale, spread
        self.weight = nn.Parameter(table)  # type: ignore[assignment]  # which is a BinaryTable that says that it is a Parameter

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook" and isinstance(table := self._parameters.get("weight"), BinaryTable):  # accelerate adds it to every module
            give_tables(value, table)
        super().__setattr__(name, value)

    # ---- state_dict: two plain tensors -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if "weight" not in self._parameters:  # a parametrization has it, and saves the table itself
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        check_is_named()
        weight = self._parameters["weight"]
        self._parameters["weight"] = None
        try:  # whatever else a subclass holds
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters["weight"] = weight
        destination[prefix + "weight.bits"] = StateBits.of(weight.bits)  # type: ignore[union-attr]
        destination[prefix + "weight.scale"] = weight.scale  # type: ignore[union-attr]
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and prefix[:-1] in metadata:  # the bytes of a row do not tell its dim; torch.save keeps this, too
            metadata[prefix[:-1]] |= {"dim": self.embedding_dim, "planes": weight.planes}  # type: ignore[union-attr]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if "weight" not in self._parameters:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        keys = (prefix + "weight.bits", prefix + "weight.scale")
        weight, unexpected = self._parameters["weight"], list[str]()
        self._parameters["weight"] = None
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        finally:
            self._parameters["weight"] = weight
        unexpected_keys.extend(key for key in unexpected if key not in keys)
        present = [key for key in keys if key in state_dict]
        if len(present) == len(keys):
            for name, mine in (("dim", self.embedding_dim), ("planes", weight.planes)):  # type: ignore[union-attr]
                if (saved := local_metadata.get(name, mine)) != mine:
                    error_msgs.append(
                        f"{name} mismatch for {prefix}weight: this table has {name} {mine}, the state_dict's has {name} {saved}."
                    )
                    return
            self._load_table(keys, state_dict, bool(local_metadata.get("assign_to_params_buffers", False)), error_msgs)
            return
        if strict:
            missing_keys.extend(key for key in keys if key not in present)
        if present:
            error_msgs.append(f"{keys[0]} and {keys[1]} belong together, got only {present[0]}: neither is loaded.")

    def _load_table(self, keys: tuple[str, str], state_dict: Mapping[str, Any], assign: bool, error_msgs: list[str]) -> None:
        table: Any = self.weight
        new = [plain(state_dict[key]) for key in keys]
        problems = [_mismatch(key, array, old) for key, array, old in zip(keys, new, (table.bits, table.scale), strict=True)]
        if not assign and table.bits.is_meta:
            problems.append(f"{keys[0]}: the table is on the meta device; load with assign=True or call .to_empty() first.")
        problems = [problem for problem in problems if problem]
        if not problems and not new[0].is_meta:
            try:
                check_padding_bits(keys[0], new[0], self.embedding_dim)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            error_msgs.extend(problems)
        elif assign:
            bits, scale = (array.detach().contiguous() for array in new)
            new_table = BinaryTable(bits, scale, self.embedding_dim, table.dtype, table.planes, table.first_row)
            new_table.frozen = None if table.frozen is None else table.frozen.to(bits.device)
            self.weight = nn.Parameter(new_table, requires_grad=table.requires_grad)  # type: ignore[assignment]
        else:
            with torch.no_grad():
                table.bits.copy_(new[0])
                table.scale.copy_(new[1])


def _registered(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(module, TableModule):
        name_table(parent, name, module)


nn.modules.module.register_module_module_registration_hook(_registered)  # the only word that a module gets of where it is put


def pack_weight(weight: Tensor, padding_idx: int | None, planes: int = 1, *, name: str = "weight") -> tuple[BinaryTable, int | None]:
    """A module's float weight as a table, and its padding row counted from the start.

    A padding row of zeros gets the scale 0. One that holds values keeps them, as in nn.Embedding, where "padding" says that it is not
    trained: models whose padding token is another token, too, have such a row.
    """
    check_float_table(weight, BinaryTable, name)
    table = BinaryTable.from_float(weight, planes=planes)
    padding_idx = check_padding_idx(padding_idx, table.shape[0])
    if padding_idx is not None and not weight.is_meta and not weight.detach()[padding_idx].any():
        table.scale[padding_idx] = 0
    return table, padding_idx


def fill_random(bits: Tensor, pattern: Tensor | None, spread: int, generator: torch.Generator | None) -> None:
    """Fill uint8 `[rows, bytes]` with random bits.

    Args:
        pattern: `[1, bytes]`, from which every bit differs with probability `spread` / 256; None for independent bits.
    """
    if pattern is None:
        bits.random_(0, 256, generator=generator)
        return
    # One binary digit of the probability after the other, the last first: with a fair bit, "or" takes p to (1 + p) / 2, "and" to p / 2.
    for part in bits.split(_FILL_ROWS):  # in pieces: a table need not fit twice
        fair = torch.empty_like(part)
        part.zero_()
        for digit in range(8):
            fair.random_(0, 256, generator=generator)
            combine = part.bitwise_or_ if spread >> digit & 1 else part.bitwise_and_
            combine(fair)
        part.bitwise_xor_(pattern)


def planes_option(table: Any) -> str:
    """What `extra_repr` says of the planes."""
    return "" if table.planes == 1 else f", planes={table.planes}"


def fill_magnitudes(bits: Tensor, dim: int, generator: torch.Generator | None) -> None:
    """Fill the planes below the sign of uint8 `[rows, planes * B]`: uniform below half of the range, so that rows can grow and shrink."""
    width = packed_width(dim)
    if bits.shape[1] == width:
        return
    bits[:, width : 2 * width] = 0
    bits[:, 2 * width :].random_(0, 256, generator=generator)


def _mismatch(key: str, array: Any, old: Tensor) -> str:
    if not isinstance(array, Tensor):
        return f"{key} must be a tensor, got a {type(array).__name__}."
    if array.shape == old.shape and array.dtype == old.dtype:
        return ""
    return f"size mismatch for {key}: expected {old.dtype} of shape {list(old.shape)}, got {array.dtype} of shape {list(array.shape)}."
