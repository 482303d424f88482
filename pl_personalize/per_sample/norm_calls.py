"""Interception of normalization calls: other batch-norm statistics, and correct gradients on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from pl_personalize.functional.batches import batch_tensors
from pl_personalize.functional.moments import MEAN, VARIANCE

Function = Callable[..., Any]
_ARGUMENTS: dict[Function, tuple[str, ...]] = {
    F.batch_norm: ("input", MEAN, VARIANCE, "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", MEAN, VARIANCE, "training", "momentum", "eps", "cudnn_enabled"),
}
_INSTANCE_NORMS: tuple[Function, ...] = (F.instance_norm, torch.instance_norm)


class FunctionCalls(TorchFunctionMode):
    """Context in which ``handler(function, args, kwargs)`` replaces calls of some functions, except in TorchScript."""

    def __init__(self, functions: Collection[Function], handler: Callable[[Function, Any, Any], Any]) -> None:
        super().__init__()
        self._functions, self._handler = functions, handler

    @override
    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._handler(func, args, kwargs) if func in self._functions else func(*args, **kwargs)


@contextmanager
def statistics_replaced(
    layers: Mapping[str, _BatchNorm], handle: Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Iterator[None]:
    r"""Let ``handle`` choose the statistics by which batch-norm layers in eval mode normalize; buffers do not change.

    Each call of ``F.batch_norm`` in a layer's forward is intercepted if it gets the layer's running mean, or a copy of
    it such as one in another precision. A layer may transpose, flatten or mask its input first; one that does not call
    ``F.batch_norm`` is an error. ``handle`` is ``(name, x, mean, variance) -> (mean, variance)``, with x of (N, C) or
    (N, C, \*), and keeps the types of the statistics.
    """
    running: list[str] = []
    seen: set[str] = set()

    def run(name: str, layer: _BatchNorm, forward: Function, *args: Any, **kwargs: Any) -> Any:
        seen.discard(name)
        running.append(name)
        try:
            with FunctionCalls(_ARGUMENTS, partial(on_call, name, layer.running_mean)):
                output = forward(*args, **kwargs)
        finally:
            running.pop()
        if name not in seen and any(tensor.numel() for tensor in batch_tensors(output)):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise ValueError(
                f"The batch-norm layer {name!r} ({kind}) cannot be adapted: its forward does not pass its running_mean "
                "to torch.nn.functional.batch_norm. Call that function or super().forward in it, or adapt only other "
                "layers with module=."
            )
        return output

    def on_call(name: str, own: Tensor | None, func: Function, args: Any, kwargs: Any) -> Any:
        call = dict(zip(_ARGUMENTS[func], args, strict=False)) | dict(kwargs)
        x: Tensor = call["input"]
        mean: Any = call.get(MEAN)
        if running[-1] == name and _is_copy(mean, own):  # calls of a layer inside this one come here, too
            seen.add(name)
            if x.dim() > 1 and x.shape[1] == len(mean):  # otherwise PyTorch refuses it
                call[MEAN], call[VARIANCE] = handle(name, x, mean, call[VARIANCE])
        return func(**call)

    before = {layer: vars(layer).get("forward") for layer in layers.values()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = partial(run, name, layer, layer.forward)
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward


def _is_copy(mean: Tensor | None, own: Tensor | None) -> bool:
    if mean is None or own is None:
        return False
    return mean is own or (mean.shape == own.shape and torch.allclose(mean, own.to(mean), 0, 0, equal_nan=True))


def right_norm_gradients() -> FunctionCalls:
    """A context in which the gradient of a norm's output gets the memory layout of the norm's input.

    On a CPU, the backward pass of PyTorch's batch norm picks a wrong kernel if the two layouts differ and a dimension
    has size 1: the samples, or a position (inside an instance norm, always the first dimension). All its gradients are
    then wrong, without an error.
    """
    return FunctionCalls({*_ARGUMENTS, *_INSTANCE_NORMS}, _call_norm)


def _call_norm(func: Function, args: Any, kwargs: Any) -> Any:
    output = func(*args, **kwargs)
    if isinstance(output, Tensor) and output.requires_grad:
        x: Tensor = args[0] if args else kwargs["input"]
        if x.dim() > 2 and x.device.type == "cpu":
            x = x.detach().contiguous() if func in _INSTANCE_NORMS else x.detach()  # as inside the function
            output.register_hook(partial(_laid_out_as, torch.empty_like(x, device="meta")))  # type: ignore[no-untyped-call]
    return output


def _laid_out_as(layout: Tensor, gradient: Tensor | None) -> Tensor | None:
    # Second derivatives may have no gradient.
    if gradient is None or gradient.stride() == layout.stride():
        return gradient
    return torch.empty_like(layout, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
