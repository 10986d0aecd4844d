"""The module that stands where nn.Embedding stood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualbin._checks import check_float, check_int, packed_width
from dualbin.torch._ops import lookup_rows
from dualbin.torch._table import BinaryTable, check_dtype, check_padding_bits, check_padding_idx, clear_padding_bits

#: options of nn.Embedding that a packed table cannot have: the value that means "not used", and what to do instead
_UNSUPPORTED: Mapping[str, tuple[Any, str]] = {
    "max_norm": (None, "the norm of a row is its scale times sqrt(D)"),
    "norm_type": (2.0, "it belongs to max_norm"),
    "scale_grad_by_freq": (False, "the update rules do not depend on the size of a row's gradient"),
    "sparse": (False, "gradients are always rows (RowGrad)"),
    "_weight": (None, "use BinaryEmbedding.from_float"),
    "_freeze": (False, "use .requires_grad_(False)"),
}


class BinaryEmbedding(nn.Embedding):
    """nn.Embedding with one bit a weight.

    The weight is a :class:`BinaryTable` and its gradient a :class:`RowGrad`; train it with :class:`XOR`. A new table has random bits.
    The state_dict has two entries, `weight.bits` and `weight.scale`.

    Args:
        num_embeddings: V, the number of rows.
        embedding_dim: D, the number of weights in a row.
        padding_idx: a row that is zero and stays so (its scale is 0); negative counts from the end.
        device: where the table is.
        dtype: dtype of the output: float32, float16 or bfloat16; None takes torch's default dtype.
        generator: source of the random bits, on `device`; None takes torch's own.
        scale: scale of every row but the padding row, at least 1e-4.

    Shape:
        ids int32 or int64 of any shape; output `ids.shape + (D,)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or is an option of nn.Embedding that a packed table cannot have.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
        scale: float = 0.3,
        **unsupported: Any,
    ) -> None:
        _check_options(unsupported)
        rows = check_int("num_embeddings", num_embeddings, low=1)
        dim = check_int("embedding_dim", embedding_dim, low=1)
        dtype = check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        padding_idx = check_padding_idx(padding_idx, rows)
        scale = check_float("scale", scale, low=1e-4)
        bits = torch.empty(rows, packed_width(dim), dtype=torch.uint8, device=device)
        scales = torch.empty(rows, 1, dtype=torch.float32, device=bits.device)
        self._setup(BinaryTable._wrap(bits, scales, dim, dtype), padding_idx, scale)
        self.reset_parameters(generator)

    @classmethod
    def from_float(cls, embedding: nn.Embedding | Tensor, padding_idx: int | None = None) -> BinaryEmbedding:
        """Pack the weight of an nn.Embedding, or a float tensor `[V, D]` (see :meth:`BinaryTable.from_float`).

        Args:
            embedding: the module or tensor; the result takes its dtype, device, and of a module `requires_grad` and train/eval mode.
            padding_idx: the padding row; None takes the module's.

        Raises:
            TypeError, ValueError: the weight cannot be packed, or the module uses max_norm or scale_grad_by_freq.
        """
        weight: Any = embedding
        if isinstance(embedding, nn.Embedding):
            _check_options({name: getattr(embedding, name) for name in ("max_norm", "scale_grad_by_freq")})
            weight = embedding.weight
            padding_idx = embedding.padding_idx if padding_idx is None else padding_idx
        table = BinaryTable.from_float(weight, padding_idx)
        self = cls.__new__(cls)
        self._setup(table, check_padding_idx(padding_idx, table.shape[0]), 0.3)
        if isinstance(embedding, nn.Embedding):
            self.weight.requires_grad_(weight.requires_grad)
            self.train(embedding.training)
        return self

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, embeddings: Tensor, freeze: bool = True, padding_idx: int | None = None, **unsupported: Any
    ) -> BinaryEmbedding:
        """As nn.Embedding.from_pretrained: :meth:`from_float` of a tensor, frozen unless `freeze` is False."""
        _check_options(unsupported)
        self = cls.from_float(embeddings, padding_idx)
        self.weight.requires_grad_(not freeze)
        return self

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """New random bits; every scale as given to the constructor (0.3 after `from_float`), the padding row's 0."""
        table: Any = self.weight
        with torch.no_grad():
            table.bits.random_(0, 256, generator=generator)
            clear_padding_bits(table.bits, self.embedding_dim)
            table.scale.fill_(self._initial_scale)
            if self.padding_idx is not None:
                table.scale[self.padding_idx] = 0

    def forward(self, input: Tensor) -> Tensor:
        return lookup_rows(self.weight, input, None, -1 if self.padding_idx is None else self.padding_idx)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.weight.dtype}"

    def _setup(self, table: BinaryTable, padding_idx: int | None, scale: float) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's, which makes a float table
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._initial_scale = scale
        self.weight = nn.Parameter(table)

    # ---- state_dict: two plain tensors -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self._parameters["weight"]
        self._parameters["weight"] = None
        try:  # whatever else a subclass holds
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters["weight"] = weight
        destination[prefix + "weight.bits"] = weight.bits  # type: ignore[union-attr]
        destination[prefix + "weight.scale"] = weight.scale  # type: ignore[union-attr]

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
            self._load_table(keys, state_dict, bool(local_metadata.get("assign_to_params_buffers", False)), error_msgs)
            return
        if strict:
            missing_keys.extend(key for key in keys if key not in present)
        if present:
            error_msgs.append(f"{keys[0]} and {keys[1]} belong together, got only {present[0]}: neither is loaded.")

    def _load_table(self, keys: tuple[str, str], state_dict: Mapping[str, Any], assign: bool, error_msgs: list[str]) -> None:
        table: Any = self.weight
        new = [state_dict[key] for key in keys]
        problems = [_mismatch(key, array, old) for key, array, old in zip(keys, new, (table.bits, table.scale), strict=True)]
        if not assign and table.bits.is_meta:
            problems.append(f"{keys[0]}: the table is on the meta device; load with assign=True or call .to_empty() first.")
        problems = [problem for problem in problems if problem]
        if not problems:
            try:
                check_padding_bits(keys[0], new[0], self.embedding_dim)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            error_msgs.extend(problems)
        elif assign:
            bits, scale = (array.detach().contiguous() for array in new)
            self.weight = nn.Parameter(BinaryTable(bits, scale, self.embedding_dim, table.dtype), requires_grad=table.requires_grad)
        else:
            with torch.no_grad():
                table.bits.copy_(new[0])
                table.scale.copy_(new[1])


def _mismatch(key: str, array: Any, old: Tensor) -> str:
    if not isinstance(array, Tensor):
        return f"{key} must be a tensor, got a {type(array).__name__}."
    if array.shape == old.shape and array.dtype == old.dtype:
        return ""
    return f"size mismatch for {key}: expected {old.dtype} of shape {list(old.shape)}, got {array.dtype} of shape {list(array.shape)}."


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _UNSUPPORTED:
            msg = f"BinaryEmbedding got an unexpected argument {name!r}"
            raise TypeError(msg)
        unused, reason = _UNSUPPORTED[name]
        if value != unused:
            msg = f"{name}={value!r} of nn.Embedding cannot be used with a packed table, leave it out: {reason}"
            raise ValueError(msg)
