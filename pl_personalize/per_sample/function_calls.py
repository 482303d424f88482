"""Interception of calls of torch functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode
from typing_extensions import override

Handler = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]


class FunctionCalls(TorchFunctionMode):
    """Context in which ``handler(function, args, kwargs)`` replaces calls of some functions, except in TorchScript."""

    def __init__(self, functions: Collection[Callable[..., Any]], handler: Handler) -> None:
        super().__init__()
        self._functions, self._handler = functions, handler

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return self._handler(func, args, kwargs) if func in self._functions else func(*args, **kwargs)
