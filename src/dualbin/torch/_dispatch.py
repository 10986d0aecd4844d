"""What the operations of PyTorch do with tensors that have no dense values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

Handler = Callable[..., Any]


class NoStorage(torch.UntypedStorage):
    """The storage of such a tensor: it has a size and no memory. Most calls of PyTorch see that and raise; these would end the process."""

    def _no_memory(self, *_: Any, **__: Any) -> Any:
        msg = (
            "this storage has no memory: the tensor has no dense values. Call share_memory_() of the table itself, or take the storages of "
            "its .bits and .scale (of a RowGrad: its .ids and .rows)"
        )
        raise NotImplementedError(msg)

    share_memory_ = _share_fd_cpu_ = _share_filename_cpu_ = _to = _no_memory


class PackedTensor(torch.Tensor):
    """A tensor subclass that has its dense shape and dtype, but none of its dense values.

    A subclass says with :meth:`handles` what operations do with it. Any other operation would need the dense values, and raises what
    `_dense` of the subclass returns.
    """

    #: operations of the dispatcher, below autograd
    _handlers: ClassVar[dict[Any, Handler]]
    #: functions of PyTorch, above it: apart, because operators that are called from Python pass here too
    _functions: ClassVar[dict[Any, Handler]]

    @classmethod
    def handles(cls, *operations: Any) -> Callable[[Handler], Handler]:
        """Register what the given operators or functions of PyTorch do; the handler gets the operation and then its arguments."""

        def register(handler: Handler) -> Handler:
            for operation in operations:
                (cls._handlers if isinstance(operation, torch._ops.OpOverload) else cls._functions)[operation] = handler
            return handler

        return register

    @staticmethod
    def _dense(func: object, case: str = "") -> NotImplementedError:
        """What to raise where `func` (in the given case) would need the dense values."""
        raise NotImplementedError

    # These read memory without asking the dispatcher, and there is none.

    def untyped_storage(self) -> torch.UntypedStorage:
        """As Tensor.untyped_storage: libraries compare the storages of parameters; what would read the memory raises."""
        storage = super().untyped_storage()
        storage.__class__ = NoStorage
        return storage

    def __dlpack__(self, **_: Any) -> Any:
        func = "__dlpack__"
        raise self._dense(func)

    def apply_(self, *_: Any) -> Any:
        """Refused: there are no values that Python could change one by one."""
        func = "apply_"
        raise self._dense(func)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = cls._handlers.get(func)
        if handler is None:
            raise cls._dense(func)
        return handler(func, *args, **kwargs) if kwargs else handler(func, *args)


def hide_from_dynamo(function: Any) -> None:
    """Let the compiler run the function and what it calls as it is where a compiled function calls backward() or a tensor's method.

    As torch._disable_dynamo, without its cost in every call.
    """
    frames: Any = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):  # private, so it may go; then only such compiled functions fail
        return
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(getattr(function, "__func__", function).__code__, frames._FrameExecStrategy(skip, skip))


def describes(operator: str, library: torch.library.Library) -> Callable[[Handler], Handler]:
    """Register what the result of an operator looks like where there are no values: for the compiler, and for meta tensors.

    One meta operand among others leads here too. The result would then be memory that nobody wrote, so all have to be on one device.
    """

    def register(describe: Handler) -> Handler:
        @functools.wraps(describe)
        def checked(*operands: Any) -> Any:
            devices = {str(x.device) for x in operands if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                msg = f"operands of {operator} must be on one device, got {' and '.join(sorted(devices))}"
                raise ValueError(msg)
            return describe(*operands)

        torch.library.register_fake(operator, checked, lib=library)
        return checked

    return register
