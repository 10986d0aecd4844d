"""Bags of rows: the module that stands where nn.EmbeddingBag stood, and its operators.

The rows of a bag are combined while they are unpacked, so the forward allocates nothing of N x D. The gradient is a RowGrad of N rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualbin._checks import check_bool, check_planes
from dualbin._schema import BAG_MODES
from dualbin.torch import _native_call
from dualbin.torch._dispatch import describes, hide_from_dynamo
from dualbin.torch._ids import check_ids
from dualbin.torch._module import check_options
from dualbin.torch._refusals import check_not_transformed
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table import BinaryTable, accept_any_grad_dtype
from dualbin.torch._table_checks import check_float_table, check_operator_arrays
from dualbin.torch._table_module import TableModule, pack_weight, planes_option

_library = torch.library.Library("dualbin", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("lookup_bag(Tensor table, Tensor ids, Tensor offsets, Tensor? weights, str mode, int padding_idx=-1) -> Tensor", tags=_TAGS)
_library.define(
    "lookup_bag_packed(Tensor bits, Tensor scale, Tensor ids, Tensor offsets, Tensor? weights, SymInt dim, str mode, ScalarType dtype,"
    " int padding_idx=-1) -> Tensor",
    tags=_TAGS,
)
_library.define("bag_counts(Tensor table, Tensor ids, Tensor offsets, int padding_idx=-1) -> Tensor", tags=_TAGS)
_library.define("bag_counts_packed(Tensor scale, Tensor ids, Tensor offsets, int padding_idx=-1) -> Tensor", tags=_TAGS)
_library.define(
    "bag_gradient(Tensor ids, Tensor offsets, Tensor dy, str mode, Tensor? counts, Tensor? weights, int padding_idx=-1) -> Tensor",
    tags=_TAGS,
)
_library.define("bag_weight_gradient(Tensor table, Tensor ids, Tensor offsets, Tensor dy, int padding_idx=-1) -> Tensor", tags=_TAGS)
_library.define(
    "bag_weight_gradient_packed(Tensor bits, Tensor scale, Tensor ids, Tensor offsets, Tensor dy, int padding_idx=-1) -> Tensor", tags=_TAGS
)


class BinaryEmbeddingBag(TableModule, nn.EmbeddingBag):  # type: ignore[misc]
    """nn.EmbeddingBag with one bit a weight, or as many as `planes` says: rows combined bag by bag.

    Its weight, gradient, state_dict and training are those of :class:`BinaryEmbedding`. A gradient holds a row for every id of the batch.

    Args:
        num_embeddings: V, the number of rows.
        embedding_dim: D, the number of weights in a row.
        mode: "sum"; "mean"; or "majority": +1 or -1 by the majority of the rows' bits, whatever their scales, a tie counting as +1. The
            gradient of "majority" is that of "sum" (straight through the comparison); its scales mean nothing, so use `XOR(scale_lr=0)`.
        include_last_offset: `offsets` has one more element, the number of ids.
        padding_idx: a row that is left out of every bag and never changes; negative counts from the end.
        device, dtype, generator, scale, spread, planes: as in :class:`BinaryEmbedding`; mode "majority" is for one plane.

    Shape:
        ids int32 or int64 `[G, L]`, bags of one length; or `[N]` with int32 or int64 `offsets` `[G]`, the places where bags start, the
        first 0. `per_sample_weights`: factors of the rows, a float tensor of the shape of ids, with mode "sum"; gets a gradient. Output
        `[G, D]`; bags without rows are zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value, or is an option of nn.EmbeddingBag that a packed table cannot have.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: torch.Generator | None = None,
        scale: float = 0.3,
        spread: float = 0.5,
        planes: int = 1,
        **unsupported: Any,
    ) -> None:
        check_options("BinaryEmbeddingBag", unsupported)
        check_mode(mode, planes)
        self._make(num_embeddings, embedding_dim, padding_idx, device, dtype, generator, scale, spread, planes)
        self.mode, self.include_last_offset = mode, check_bool("include_last_offset", include_last_offset)

    @classmethod
    def from_float(
        cls, bag: nn.EmbeddingBag | Tensor, mode: str | None = None, padding_idx: int | None = None, *, planes: int = 1
    ) -> BinaryEmbeddingBag:
        """Pack the weight of an nn.EmbeddingBag, or a float tensor `[V, D]` (see :meth:`BinaryTable.from_float`).

        Args:
            bag: the module or tensor; the result takes its dtype, device, and of a module `requires_grad`, `include_last_offset` and mode.
            mode: None takes the module's, or "mean" for a tensor.
            padding_idx: a row that is left out of every bag; None takes the module's. Its values, if it has any, are kept.
            planes: 1 to 8, bits of a weight.

        Raises:
            TypeError, ValueError: the weight cannot be packed, or the module uses max_norm, scale_grad_by_freq or mode "max".
        """
        weight: Any = bag
        if isinstance(bag, nn.EmbeddingBag):
            check_options("BinaryEmbeddingBag", {name: getattr(bag, name) for name in ("max_norm", "scale_grad_by_freq")})
            weight, mode = bag.weight, bag.mode if mode is None else mode
            padding_idx = bag.padding_idx if padding_idx is None else padding_idx
        mode = "mean" if mode is None else mode
        check_mode(mode, planes)
        table, padding_idx = pack_weight(weight, padding_idx, planes, name="bag")
        self = cls.__new__(cls)
        self._setup(table, padding_idx, 0.3)
        self.mode, self.include_last_offset = mode, False
        if isinstance(bag, nn.EmbeddingBag):
            self.include_last_offset = bag.include_last_offset
            self.weight.requires_grad_(weight.requires_grad)
            self.train(bag.training)
        return self

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        planes: int = 1,
        **unsupported: Any,
    ) -> BinaryEmbeddingBag:
        """As nn.EmbeddingBag.from_pretrained: :meth:`from_float` of a tensor `[V, D]`, frozen unless `freeze` is False."""
        check_options("BinaryEmbeddingBag", unsupported)
        check_float_table(embeddings, BinaryTable, "embeddings")
        check_bool("freeze", freeze)
        check_bool("include_last_offset", include_last_offset)
        self = cls.from_float(embeddings, mode, padding_idx, planes=planes)
        self.include_last_offset = include_last_offset
        self.weight.requires_grad_(not freeze)
        return self

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        table: Any = self.weight
        check_not_transformed(table)
        check_ids(input, table.device)
        if input.ndim not in {1, 2}:
            msg = f"ids must have shape [N] or [G, L], got {list(input.shape)}"
            raise ValueError(msg)
        if per_sample_weights is not None:
            check_weights(self.mode, per_sample_weights, input)
            per_sample_weights = per_sample_weights.reshape(-1).float()
        bounds = bag_bounds(input, offsets, self.include_last_offset)
        if not torch.compiler.is_compiling():
            accept_any_grad_dtype(table)
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        return torch.ops.dualbin.lookup_bag(table, input.reshape(-1), bounds, per_sample_weights, self.mode, padding_idx)

    def extra_repr(self) -> str:
        options = f", mode={self.mode!r}" + (", include_last_offset=True" if self.include_last_offset else "")
        options += "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        options += planes_option(self.weight)
        return f"{self.num_embeddings}, {self.embedding_dim}{options}, dtype={self.weight.dtype}"


def bag_bounds(ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor:
    """[G + 1]: where bags start, and where the last one ends."""
    if ids.ndim == 2:
        if offsets is not None:
            msg = "offsets must be None where ids have shape [G, L]: every row of ids is a bag"
            raise ValueError(msg)
        return torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]
    if offsets is None:
        msg = "offsets must be a tensor of int32 or int64 where ids have shape [N]: the places where bags start; got None"
        raise TypeError(msg)
    check_ids(offsets, ids.device, name="offsets", owner="ids")
    if offsets.ndim != 1 or (include_last_offset and offsets.shape[0] == 0):
        shape = "[G + 1] with include_last_offset" if include_last_offset else "[G]"
        msg = f"offsets must have shape {shape}, got {list(offsets.shape)}"
        raise ValueError(msg)
    if not offsets.shape[0] and ids.shape[0]:
        msg = f"offsets must begin with 0, where the first bag does; got none for {ids.shape[0]} ids"
        raise ValueError(msg)
    return offsets if include_last_offset else torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])


def check_mode(mode: object, planes: int) -> None:
    if not isinstance(mode, str) or mode not in BAG_MODES:
        msg = f"mode must be one of {', '.join(map(repr, BAG_MODES))}, got {mode!r}"
        if not isinstance(mode, str):  # given by position
            msg += " (where nn.EmbeddingBag has max_norm, which cannot be used with a packed table, BinaryEmbeddingBag has mode)"
        raise ValueError(msg)
    if mode == "majority" and check_planes(planes) > 1:
        msg = f"mode 'majority' is defined for tables of one plane, got planes={planes}: use 'sum' or 'mean'"
        raise ValueError(msg)


def check_weights(mode: str, weights: Any, ids: Tensor) -> None:
    if mode != "sum":
        msg = f"per_sample_weights must be None with mode {mode!r}: only mode 'sum' is weighted"
        raise ValueError(msg)
    if not isinstance(weights, Tensor) or weights.dtype not in _native_call.FLOAT_TYPES or weights.layout != torch.strided:
        got = f"{weights.dtype}, {weights.layout}" if isinstance(weights, Tensor) else type(weights).__name__
        msg = f"per_sample_weights must be a dense tensor of float32, float16 or bfloat16, got {got}"
        raise TypeError(msg)
    if weights.shape != ids.shape or weights.device != ids.device:
        msg = f"per_sample_weights must have the shape and device of ids, {list(ids.shape)} on {ids.device}, "
        msg += f"got {list(weights.shape)} on {weights.device}"
        raise ValueError(msg)


# ---- operators ---------------------------------------------------------------------------------------------------------------------------


@BinaryTable.handles(torch.ops.dualbin.lookup_bag.default)
def _bags_of_table(
    _func: Any, table: BinaryTable, ids: Tensor, offsets: Tensor, weights: Tensor | None, mode: str, padding_idx: int = -1
) -> Tensor:
    dim, dtype = table.shape[1], table.dtype
    return torch.ops.dualbin.lookup_bag_packed(table.bits, table.scale, ids, offsets, weights, dim, mode, dtype, padding_idx)


@BinaryTable.handles(torch.ops.dualbin.bag_counts.default)
def _counts_of_table(_func: Any, table: BinaryTable, ids: Tensor, offsets: Tensor, padding_idx: int = -1) -> Tensor:
    return torch.ops.dualbin.bag_counts_packed(table.scale, ids, offsets, padding_idx)


@BinaryTable.handles(torch.ops.dualbin.bag_weight_gradient.default)
def _weights_of_table(_func: Any, table: BinaryTable, ids: Tensor, offsets: Tensor, dy: Tensor, padding_idx: int = -1) -> Tensor:
    return torch.ops.dualbin.bag_weight_gradient_packed(table.bits, table.scale, ids, offsets, dy, padding_idx)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  (the signature that torch calls)
    table, ids, offsets, weights, mode, padding_idx = inputs
    counts = torch.ops.dualbin.bag_counts(table, ids, offsets, padding_idx) if mode == "mean" else None
    rows_needed = table if weights is not None and ctx.needs_input_grad[3] else None
    ctx.save_for_backward(ids, offsets, weights, counts, rows_needed)
    ctx.shape, ctx.mode, ctx.padding_idx = table.shape, mode, padding_idx


def _backward(ctx: Any, dy: Tensor) -> tuple[RowGrad | None, None, None, Tensor | None, None, None]:
    ids, offsets, weights, counts, table = ctx.saved_tensors
    grad = weight_grad = None
    if table is not None:
        weight_grad = torch.ops.dualbin.bag_weight_gradient(table, ids, offsets, dy, ctx.padding_idx)
    if ctx.needs_input_grad[0]:
        rows = torch.ops.dualbin.bag_gradient(ids, offsets, dy, ctx.mode, counts, weights, ctx.padding_idx)
        grad = RowGrad._wrap(ids.clone(), rows, ctx.shape)
    return grad, None, None, weight_grad, None, None


hide_from_dynamo(_backward)
torch.library.register_autograd("dualbin::lookup_bag", _backward, setup_context=_setup_context, lib=_library)


def _keep_bags(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ids, offsets, dy, _, counts, weights, padding_idx = inputs
    ctx.save_for_backward(ids, offsets, dy, counts, weights)
    ctx.padding_idx = padding_idx


def _backward_of_rows(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None, None, Tensor | None, None]:
    """Second derivatives: what dy and the weights of a bag get of the gradient of its rows."""
    ids, offsets, dy, counts, weights = ctx.saved_tensors
    bags = dy.shape[0]
    bag = torch.bucketize(torch.arange(ids.shape[0], device=ids.device), offsets.long(), right=True) - 1
    grad = torch.where((ids == ctx.padding_idx).unsqueeze(1), 0, grad.float())
    weight_grad = None if weights is None else (grad * dy.float()[bag.clamp(0, bags - 1)]).sum(1)
    if weights is not None:
        grad = grad * weights.unsqueeze(1)
    sums = grad.new_zeros(bags + 1, dy.shape[1]).index_add(0, torch.where(bag < 0, bags, bag), grad)[:bags]
    if counts is not None:
        sums = sums / counts.clamp(min=1).unsqueeze(1)
    return None, None, sums.to(dy.dtype), None, None, weight_grad, None


torch.library.register_autograd("dualbin::bag_gradient", _backward_of_rows, setup_context=_keep_bags, lib=_library)


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    table, ids, offsets, dy, padding_idx = inputs
    ctx.save_for_backward(table, ids, offsets, dy)
    ctx.padding_idx = padding_idx


def _backward_of_slopes(ctx: Any, grad: Tensor) -> tuple[RowGrad | None, None, None, Tensor, None]:
    """Second derivatives: the slopes are linear in the rows and in dy, as a weighted bag is in rows and weights."""
    table, ids, offsets, dy = ctx.saved_tensors
    row_grad = None
    if ctx.needs_input_grad[0]:
        rows = torch.ops.dualbin.bag_gradient(ids, offsets, dy, "sum", None, grad, ctx.padding_idx)
        row_grad = RowGrad._wrap(ids.clone(), rows, table.shape)
    sums = torch.ops.dualbin.lookup_bag(table, ids, offsets, grad, "sum", ctx.padding_idx)
    return row_grad, None, None, sums.to(dy.dtype), None


torch.library.register_autograd("dualbin::bag_weight_gradient", _backward_of_slopes, setup_context=_keep_slopes, lib=_library)


def _lookup_bag_packed(
    bits: Tensor,
    scale: Tensor,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    dim: int,
    mode: str,
    dtype: torch.dtype,
    padding_idx: int = -1,
) -> Tensor:
    check_operator_arrays(bits, scale, dim)
    if ids.is_cpu and (int(offsets[0]) != 0 or int(offsets[-1]) != ids.shape[0]):
        msg = f"offsets must start at 0 and end at the number of ids, {ids.shape[0]}, got {int(offsets[0])} and {int(offsets[-1])}"
        raise ValueError(msg)
    out = torch.empty(offsets.shape[0] - 1, dim, dtype=dtype, device=ids.device)
    _native_call.lookup_bag(bits, scale, dim, ids.contiguous(), offsets.contiguous(), mode, _contiguous(weights), out, padding_idx)
    return out


def _bag_counts_packed(scale: Tensor, ids: Tensor, offsets: Tensor, padding_idx: int = -1) -> Tensor:
    return _native_call.bag_counts(scale, ids.contiguous(), offsets.contiguous(), padding_idx)


def _bag_gradient(
    ids: Tensor, offsets: Tensor, dy: Tensor, mode: str, counts: Tensor | None, weights: Tensor | None, padding_idx: int = -1
) -> Tensor:
    operands = (ids.contiguous(), offsets.contiguous(), dy.contiguous(), mode, counts, _contiguous(weights))
    return _native_call.bag_gradient(*operands, padding_idx)


def _bag_weight_gradient_packed(bits: Tensor, scale: Tensor, ids: Tensor, offsets: Tensor, dy: Tensor, padding_idx: int = -1) -> Tensor:
    return _native_call.bag_weight_gradient(bits, scale, ids.contiguous(), offsets.contiguous(), dy.contiguous(), padding_idx)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


for _device in ("CPU", "CUDA"):
    _library.impl("lookup_bag_packed", _lookup_bag_packed, _device)
    _library.impl("bag_counts_packed", _bag_counts_packed, _device)
    _library.impl("bag_gradient", _bag_gradient, _device)
    _library.impl("bag_weight_gradient_packed", _bag_weight_gradient_packed, _device)


@describes("dualbin::lookup_bag_packed", _library)
def _lookup_bag_packed_fake(
    bits: Tensor,
    _scale: Tensor,
    _ids: Tensor,
    offsets: Tensor,
    _weights: Tensor | None,
    dim: int,
    _mode: str,
    dtype: torch.dtype,
    _padding_idx: int = -1,
) -> Tensor:
    return bits.new_empty((offsets.shape[0] - 1, dim), dtype=dtype)


@describes("dualbin::bag_counts_packed", _library)
def _bag_counts_packed_fake(scale: Tensor, _ids: Tensor, offsets: Tensor, _padding_idx: int = -1) -> Tensor:
    return scale.new_empty(offsets.shape[0] - 1, dtype=torch.int32)


@describes("dualbin::bag_gradient", _library)
def _bag_gradient_fake(ids: Tensor, _offsets: Tensor, dy: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(ids.shape[0], dy.shape[1])


@describes("dualbin::bag_weight_gradient_packed", _library)
def _bag_weight_gradient_packed_fake(
    bits: Tensor, _scale: Tensor, ids: Tensor, _offsets: Tensor, _dy: Tensor, _padding_idx: int = -1
) -> Tensor:
    return bits.new_empty(ids.shape[0], dtype=torch.float32)
