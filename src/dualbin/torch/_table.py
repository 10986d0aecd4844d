"""The packed table as a tensor subclass, so that it can be an nn.Parameter."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualbin._checks import MAX_ROWS, check_bool, check_dim, check_fewer, check_int, check_padding_idx, check_planes
from dualbin._schema import packed_width
from dualbin.torch import _native_call
from dualbin.torch._dispatch import PackedTensor, hide_from_dynamo
from dualbin.torch._refusals import refusal
from dualbin.torch._row_grad import RowGrad
from dualbin.torch._table_checks import check_arrays, check_dtype, check_float_table

#: rows are packed in pieces of about this many weights where a copy is needed
_PACK_CHUNK = 1 << 24

_TENSOR_DATA: Any = torch.Tensor.data  # the descriptor
_TENSOR_GRAD: Any = torch.Tensor.grad


class _Dim(int):
    """D. Code that takes the table for a tensor may call it, as `Tensor.dim()`: a table has 2 dimensions."""

    __slots__ = ()

    def __call__(self) -> int:
        return 2


class BinaryTable(PackedTensor):
    """A table of V rows of D weights, kept as one bit a weight, +scale or -scale of the row, or as `planes` bits.

    A weight of k planes is `scale * s * (2m + 1) / 2**(k-1)`: s, +1 or -1, is plane 0, the other planes are the integer m.

    To PyTorch it is a float tensor of shape (V, D) that can be an nn.Parameter, but only its packed form exists. Look rows up with
    :func:`lookup` (or `F.embedding`, or :class:`BinaryEmbedding`) and train it with :class:`XOR`; its gradient is a :class:`RowGrad`.
    An operation that would need the dense table raises NotImplementedError.

    Args:
        bits: uint8 `[V, planes * ceil(dim/8)]`, contiguous; in a plane, bit `d % 8` of byte `d // 8` is weight d, in plane 0 1 for +1;
            the planes of m follow, most significant first. Bits beyond `dim` are 0.
        scale: float32 `[V, 1]`, contiguous, on the same device. 0 marks a padding row: it looks up as zeros and is never updated.
        dim: D, the number of weights in a row.
        dtype: dtype of looked-up rows by default: float32, float16 or bfloat16. The scale stays float32.
        planes: 1 to 8, bits of a weight.
        first_row: of a shard, a range of the rows of a larger table, the row where it starts there; None for a whole table. :class:`XOR`
            gives the rows of a shard the random numbers that they have in the whole table.

    Attributes:
        bits, scale, planes, first_row: as above; the table keeps the tensors, without a copy.
        frozen: bool `[V]`, the rows that :func:`freeze_rows` froze, or None.
        dim: D as an int (calling it, as `Tensor.dim()`, gives 2).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or contents; the message names it.
    """

    _handlers: ClassVar[dict[Any, Any]] = {}
    _functions: ClassVar[dict[Any, Any]] = {}
    #: not in `__dict__`, which some libraries pass to the constructor together with the table itself: see `_again`
    __slots__ = ("bits", "first_row", "frozen", "scale")

    bits: Tensor
    scale: Tensor
    first_row: int | None
    frozen: Tensor | None

    @staticmethod
    def __new__(
        cls,
        bits: Tensor,
        scale: Tensor | None = None,
        dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        planes: int = 1,
        first_row: int | None = None,
        **attributes: Any,
    ) -> BinaryTable:
        if isinstance(bits, BinaryTable):
            return bits._again(attributes)
        if attributes:
            msg = f"BinaryTable got an unexpected argument {next(iter(attributes))!r}"
            raise TypeError(msg)
        dim = check_dim("dim", dim)
        check_dtype("dtype", dtype)
        bits, scale = check_arrays(bits, scale, dim, planes)
        if first_row is not None:
            first_row = check_int("first_row", first_row, low=0, high=MAX_ROWS - bits.shape[0])
        return cls._wrap(bits.detach(), scale.detach(), dim, dtype, first_row)

    @classmethod
    def _wrap(cls, bits: Tensor, scale: Tensor, dim: int, dtype: torch.dtype, first_row: int | None = None) -> BinaryTable:
        """A table without checks; its planes follow from the width of bits."""
        self = torch.Tensor._make_wrapper_subclass(cls, (bits.shape[0], dim), dtype=dtype, device=bits.device)
        self.bits, self.scale, self.first_row, self.frozen = bits, scale, first_row, None
        return self

    def _again(self, attributes: dict[str, Any]) -> BinaryTable:
        """The same memory as a new leaf. accelerate makes parameters anew as `type(p)(p, requires_grad=..., **p.__dict__)`."""
        table: BinaryTable = self.detach()  # type: ignore[assignment]
        requires_grad = attributes.pop("requires_grad", False)
        table.__dict__.update(attributes)
        return table.requires_grad_(requires_grad)

    @classmethod
    def from_float(cls, w: Tensor, padding_idx: int | None = None, planes: int = 1) -> BinaryTable:
        """Pack a float table: signs and nearest levels, with the scale that :func:`dualbin.row_scale` gives a row.

        That is the mean magnitude for one plane, and the scale of least squared error for more (1e-4 for a row of zeros).

        Args:
            w: float32, float16 or bfloat16 `[V, D]`; the table takes its dtype and device (of a meta tensor only these).
            padding_idx: a row that becomes a padding row (scale 0); negative counts from the end.
            planes: 1 to 8, bits of a weight.

        Raises:
            TypeError: w is no tensor of these dtypes, or is a BinaryTable.
            ValueError: w has another shape, or holds a NaN or infinity; padding_idx is out of range.
        """
        check_float_table(w, BinaryTable)
        rows, dim = w.shape
        padding_idx = check_padding_idx(padding_idx, rows)
        bits = _native_call.fresh((rows, check_planes(planes) * packed_width(dim)), torch.uint8, w.device)
        scale = _native_call.fresh((rows, 1), torch.float32, w.device)
        if w.is_meta:
            return cls._wrap(bits, scale, dim, w.dtype)
        w = w.detach()
        step = rows if w.is_contiguous() and w.device.type == "cpu" else max(1, _PACK_CHUNK // dim)
        for start in range(0, rows, step):
            piece = w[start : start + step].contiguous()
            if w.device.type != "cpu" and not piece.isfinite().all():  # a GPU cannot raise: see docs/design.md
                msg = "w must be finite, got a NaN or infinity"
                raise ValueError(msg)
            _native_call.run("pack", piece, bits[start : start + step], scale[start : start + step])
        if padding_idx is not None:
            scale[padding_idx] = 0
        return cls._wrap(bits, scale, dim, w.dtype)

    @property
    def dim(self) -> int:  # type: ignore[override]
        """D, the number of weights in a row."""
        return _Dim(self.shape[1])

    @property
    def planes(self) -> int:
        """Bits of a weight."""
        return self.bits.shape[1] // packed_width(self.shape[1])

    def with_planes(self, planes: int, *, rescale: bool = True) -> BinaryTable:
        """A new table of the top planes of this one: what is left of a trained table where fewer bits are served.

        Args:
            planes: 1 to the planes of this table.
            rescale: give every row the scale of least squared error against this table's values; else it keeps its scale, and the call is
                one strided copy.

        Raises:
            TypeError: planes is no integer, or rescale no bool.
            ValueError: planes is out of range.
        """
        check_fewer(planes, self.planes)
        check_bool("rescale", rescale)
        width, scale = planes * packed_width(self.shape[1]), self.scale.detach()
        if self.bits.is_meta or not rescale or planes == self.planes:
            bits, scale = self.bits.detach()[:, :width].clone(memory_format=torch.contiguous_format), scale.clone()
        else:
            bits, old, scale = self.bits.new_empty(self.shape[0], width), scale, torch.empty_like(scale)
            _native_call.run("fewer_planes", self.bits.detach(), old, self.shape[1], bits, scale)
        table = self._wrap(bits, scale, self.shape[1], self.dtype, self.first_row)
        table.frozen = self.frozen
        return table

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table as a dense float tensor `[V, D]`: 32 / planes times the memory, meant for tests and exports.

        Args:
            dtype: float32, float16 or bfloat16; None takes the table's.
        """
        dtype = self.dtype if dtype is None else check_dtype("dtype", dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        ids = torch.arange(self.shape[0], device=self.device)
        _native_call.lookup(self.bits, self.scale, self.shape[1], ids, out)
        return out

    @property
    def grad(self) -> Any:
        """As Tensor.grad, a :class:`RowGrad` or None; without the way through `__torch_function__`, which small lookups notice."""
        with torch._C.DisableTorchFunctionSubclass():
            return _TENSOR_GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None and not isinstance(value, RowGrad):
            msg = (
                f"grad must be a RowGrad or None, got a {type(value).__name__}: RowGrad(ids, rows, shape) holds the rows that are not zero"
            )
            raise TypeError(msg)
        with torch._C.DisableTorchFunctionSubclass():
            _TENSOR_GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            _TENSOR_GRAD.__delete__(self)

    @property
    def data(self) -> BinaryTable:
        """The table without its place in the graph, in the same memory; another table can be put there, of any shape, dtype and device."""
        return _TENSOR_DATA.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, BinaryTable):
            msg = f"data must be a BinaryTable, got a {type(new).__name__}: pack a float table with BinaryTable.from_float"
            raise TypeError(msg)
        _TENSOR_DATA.__set__(self, new)
        self.bits, self.scale, self.first_row = new.bits, new.scale, new.first_row
        if new.frozen is not None or self.frozen is None or self.frozen.shape[0] != new.shape[0]:
            self.frozen = new.frozen
        elif not new.is_meta:
            self.frozen = self.frozen.to(new.device)
        if self.frozen is not None and self.is_leaf:
            self.zero_frozen_gradients()

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of bits and scale."""
        return self.bits.nbytes + self.scale.nbytes

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes of a weight, a fraction: what computes the size of a model as `p.numel() * p.element_size()` gets its bytes."""
        return self.nbytes / self.numel()

    def numpy(self, *_: Any, **__: Any) -> Any:
        msg = "a BinaryTable has no dense values for NumPy: call .dequantize().numpy() for a float copy, or take .bits and .scale"
        raise TypeError(msg)

    __array__ = numpy

    def tolist(self) -> Any:
        msg = "a BinaryTable has no dense values for a list: call .dequantize().tolist() for a float copy"
        raise TypeError(msg)

    @property
    def _parameters(self) -> Any:
        """What accelerate looks for where it takes `weight` of the checkpoint's `weight.bits` for a module."""
        msg = (
            "a BinaryTable is no module. accelerate loads a checkpoint tensor by tensor, and bits and scale are one parameter: load it in "
        )
        msg += "a block `with dualbin.torch.hf.loading(model):`"
        raise AttributeError(msg)

    def requires_grad_(self, requires_grad: bool = True) -> BinaryTable:
        """As Tensor.requires_grad_; the gradient may have another float dtype than the table, and is not cast."""
        super().requires_grad_(requires_grad)
        return accept_any_grad_dtype(self)

    def zero_frozen_gradients(self) -> None:
        """From now on, a gradient that reaches this leaf has zeros in the rows that are frozen now."""
        with torch._C.DisableTorchFunctionSubclass():
            hooks = {key: hook for key, hook in (self._backward_hooks or {}).items() if not isinstance(hook, _ZeroFrozenRows)}
            self._backward_hooks = OrderedDict(hooks) if hooks else None
            if self.frozen is None:
                return
            requires_grad = self.requires_grad
            torch.Tensor.requires_grad_(self, True)  # only then torch takes a hook; it keeps it afterwards
            self.register_hook(_ZeroFrozenRows(self.frozen))
            torch.Tensor.requires_grad_(self, requires_grad)

    def share_memory_(self) -> BinaryTable:
        """Move bits and scale to shared memory."""
        self.bits.share_memory_()
        self.scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether bits and scale are in shared memory."""
        return self.bits.is_shared() and self.scale.is_shared()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        rows, dim = self.shape
        planes = "" if self.planes == 1 else f", planes={self.planes}"
        return f"BinaryTable(rows={rows}, dim={dim}{planes}, dtype={self.dtype}, device={self.device}, requires_grad={self.requires_grad})"

    __str__ = __repr__

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, int | None]]:
        return ["bits", "scale"], (self.dtype, self.first_row)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[torch.dtype, int | None], size: Sequence[int], _stride: Sequence[int]
    ) -> BinaryTable:
        return cls._wrap(inner["bits"], inner["scale"], size[1], *context)

    def _stable_hash_for_caching(self) -> str:
        """Key of this tensor in the caches of torch.compile: everything that compiled code may depend on."""
        facts = (
            type(self).__qualname__,
            tuple(map(str, self.shape)),
            self.planes,
            self.dtype,
            self.device,
            self.requires_grad,
            self.first_row,
        )
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        handler = cls._functions.get(func)
        if handler is not None:
            return handler(func, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @staticmethod
    def _dense(func: object, case: str = "") -> NotImplementedError:
        return refusal(func, case)


def accept_any_grad_dtype(table: BinaryTable) -> BinaryTable:
    """Let a leaf's gradient keep its dtype; else the engine casts row gradients of half precision to the table's dtype.

    A leaf that has not been here is new, perhaps a copy: frozen rows get their hook again.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if table.requires_grad and table.is_leaf and table.grad_dtype is not None:
            table.grad_dtype = None
            if table.frozen is not None:
                table.zero_frozen_gradients()
    return table


class _ZeroFrozenRows:
    """The hook of a table that has frozen rows. It knows the rows but not the table: `module.to` swaps tensors, hooks included."""

    __torch_unserializable__ = True  # tells pickle not to warn: copies make their own

    def __init__(self, frozen: Tensor) -> None:
        self._frozen = frozen

    def __call__(self, grad: Any) -> RowGrad | None:
        if not isinstance(grad, RowGrad):
            return None
        frozen = self._frozen.to(grad.device)[grad.ids.clamp(0, grad.shape[0] - 1).long()]
        return RowGrad._wrap(grad.ids, grad.rows.masked_fill(frozen.unsqueeze(1), 0), grad.shape)


hide_from_dynamo(_ZeroFrozenRows.__call__)
