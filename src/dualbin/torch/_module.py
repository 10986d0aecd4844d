"""The module that stands where nn.Embedding stood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualbin._checks import check_bool, check_dim, check_projection
from dualbin.torch._ops import lookup_rows
from dualbin.torch._table import BinaryTable
from dualbin.torch._table_checks import check_float_table, check_generator
from dualbin.torch._table_module import TableModule, pack_weight, planes_option

#: options of nn.Embedding that a packed table cannot have, in its order: the value that means "not used", and what to do instead
_UNSUPPORTED: Mapping[str, tuple[Any, str]] = {
    "max_norm": (None, "the norm of a row follows from its bits and its scale"),
    "norm_type": (2.0, "it belongs to max_norm"),
    "scale_grad_by_freq": (False, "the update rules divide by the size of a row's gradients"),
    "sparse": (False, "gradients are always rows (RowGrad)"),
    "_weight": (None, "use BinaryEmbedding.from_float"),
    "_freeze": (False, "use .requires_grad_(False)"),
}


class BinaryEmbedding(TableModule, nn.Embedding):
    """nn.Embedding with one bit a weight, or as many as `planes` says.

    The weight is a :class:`BinaryTable` and its gradient a :class:`RowGrad`; train it with :class:`XOR`. A new table has random bits.
    The state_dict has two entries, `weight.bits` and `weight.scale`, and with a projection a third, `projection`.

    All entries of a 1-bit row have the same magnitude. A projection, a matrix that every row is multiplied by, lets a model give
    more room to some directions than to others; it makes up for a fifth to two thirds of what one bit lost a language model
    (docs/quality.md). It may change the width, too: long rows of one bit, and a narrow output.

    Args:
        num_embeddings: V, the number of rows.
        embedding_dim: D, the number of weights in a row.
        padding_idx: a row that gets no gradient; negative counts from the end. In a new table it is zero (its scale is 0).
        positional: the options that nn.Embedding has next, max_norm first: they have to have its defaults.
        device: where the table is.
        dtype: dtype of the output: float32, float16 or bfloat16; None takes torch's default dtype.
        generator: source of the random bits, and of a random projection after them, on `device`; None takes torch's own.
        scale: scale of every row but the padding row, at least 1e-4.
        spread: probability, rounded to 256ths, with which a bit differs at first from a pattern that all rows have in common; 0.5: rows are
            independent. With 0.1 a language model lost less to fp32 with few bits, above all with a projection (docs/quality.md).
        projection: multiply rows by the parameter `projection` [D, P]: an output width P of at least 1, or True for D. It starts as the
            identity where P = D, else normal with standard deviation 1/sqrt(D), and belongs to the dense optimizer, as :class:`XOR`
            takes tables only.
        planes: 1 to 8, bits of a weight; see :class:`BinaryTable`.

    Shape:
        ids int32 or int64 of any shape; output `ids.shape + (D,)`, with a projection `ids.shape + (P,)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or is an option of nn.Embedding that a packed table cannot have.
    """

    weight: BinaryTable
    projection: nn.Parameter
    _projects = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *positional: Any,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        scale: float = 0.3,
        spread: float = 0.5,
        projection: bool | int = False,
        planes: int = 1,
        **unsupported: Any,
    ) -> None:
        check_options("BinaryEmbedding", named(positional, unsupported))
        width = check_projection(projection, check_dim("embedding_dim", embedding_dim))
        self._make(num_embeddings, embedding_dim, padding_idx, device, dtype, generator, scale, spread, planes)
        self._add_projection(width, generator)

    @classmethod
    def from_float(
        cls,
        embedding: nn.Embedding | Tensor,
        padding_idx: int | None = None,
        *,
        projection: bool | int = False,
        generator: torch.Generator | None = None,
        planes: int = 1,
    ) -> BinaryEmbedding:
        """Pack the weight of an nn.Embedding, or a float tensor `[V, D]` (see :meth:`BinaryTable.from_float`).

        Args:
            embedding: the module or tensor; the result takes its dtype, device, and of a module `requires_grad` and train/eval mode.
            padding_idx: the padding row, which gets no gradient; None takes the module's. If it holds values they are packed like those of
                other rows; a row of zeros stays zeros (its scale is 0).
            projection, generator, planes: as in the constructor; the bits are not random here.

        Raises:
            TypeError, ValueError: the weight cannot be packed, or the module uses max_norm or scale_grad_by_freq; projection has the wrong
                type or is below 1.
        """
        weight: Any = embedding
        if isinstance(embedding, nn.Embedding):
            check_options("BinaryEmbedding", {name: getattr(embedding, name) for name in ("max_norm", "scale_grad_by_freq")})
            weight = embedding.weight
            padding_idx = embedding.padding_idx if padding_idx is None else padding_idx
        table, padding_idx = pack_weight(weight, padding_idx, planes, name="embedding")
        width = check_projection(projection, table.shape[1])
        self = cls.__new__(cls)
        self._setup(table, padding_idx, 0.3)
        if isinstance(embedding, nn.Embedding):
            self.weight.requires_grad_(weight.requires_grad)
            self.train(embedding.training)
        self._add_projection(width, generator)
        return self

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        *positional: Any,
        projection: bool | int = False,
        generator: torch.Generator | None = None,
        planes: int = 1,
        **unsupported: Any,
    ) -> BinaryEmbedding:
        """As nn.Embedding.from_pretrained: :meth:`from_float` of a tensor, its table frozen unless `freeze` is False."""
        check_options("BinaryEmbedding", named(positional, unsupported))
        check_float_table(embeddings, BinaryTable, "embeddings")
        check_bool("freeze", freeze)
        self = cls.from_float(embeddings, padding_idx, projection=projection, generator=generator, planes=planes)
        self.weight.requires_grad_(not freeze)
        return self

    def forward(self, input: Tensor) -> Tensor:
        rows = lookup_rows(self.weight, input, None, -1 if self.padding_idx is None else self.padding_idx)
        return rows @ self.projection if self._projects else rows

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self._projects:
            self._reset_projection(generator)

    def extra_repr(self) -> str:
        options = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        if self._projects:
            width = self.projection.shape[1]
            options += f", projection={True if width == self.embedding_dim else width}"
        options += planes_option(self.weight)
        return f"{self.num_embeddings}, {self.embedding_dim}{options}, dtype={self.weight.dtype}"

    def _add_projection(self, width: int | None, generator: torch.Generator | None) -> None:
        if width is None:
            return
        weight = self.weight
        self.projection = nn.Parameter(torch.empty(self.embedding_dim, width, dtype=weight.dtype, device=weight.device))
        self._projects = True  # not `projection is None`: looking for a parameter costs as much as a tenth of a small lookup
        self._reset_projection(generator)

    def _reset_projection(self, generator: torch.Generator | None) -> None:
        dim, width = self.projection.shape
        check_generator(generator, self.projection.device)
        if width == dim:
            nn.init.eye_(self.projection)
        else:
            nn.init.normal_(self.projection, std=dim**-0.5, generator=generator)


def named(positional: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of nn.Embedding after padding_idx by name, where they were given by position."""
    if len(positional) > len(_UNSUPPORTED):
        msg = f"options after {', '.join(_UNSUPPORTED)} must be given by name, got {positional[len(_UNSUPPORTED) :]!r}"
        raise TypeError(msg)
    given = dict(zip(_UNSUPPORTED, positional, strict=False))
    if twice := sorted(given.keys() & options.keys()):
        msg = f"BinaryEmbedding got {', '.join(twice)} by position and by name"
        raise TypeError(msg)
    return given | dict(options)


def check_options(module: str, options: Mapping[str, Any]) -> None:
    """Raise for options of nn.Embedding and nn.EmbeddingBag that a packed table cannot have, unless they have the value "not used"."""
    for name, value in options.items():
        if name not in _UNSUPPORTED:
            msg = f"{module} got an unexpected argument {name!r}"
            raise TypeError(msg)
        unused, reason = _UNSUPPORTED[name]
        if isinstance(value, Tensor) or value != unused:
            given = name if isinstance(value, Tensor) else f"{name}={value!r}"
            msg = f"{given} of nn.{module.removeprefix('Binary')} cannot be used with a packed table, leave it out: {reason}"
            raise ValueError(msg)
