"""Correct gradients of batch and instance norms on CPUs, whatever the memory layout of the layer that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pl_personalize.per_sample.function_calls import FunctionCalls

_INSTANCE_NORMS = (F.instance_norm, torch.instance_norm)
_NORMS: frozenset[Callable[..., Any]] = frozenset((F.batch_norm, torch.batch_norm, *_INSTANCE_NORMS))


def right_norm_gradients() -> FunctionCalls:
    """A context in which the gradient of a norm's output gets the memory layout of the norm's input.

    On a CPU, the backward pass of PyTorch's batch norm picks a wrong kernel if the two layouts differ and a dimension
    has size 1: the samples, or a position (inside an instance norm, always the first dimension). All its gradients are
    then wrong, without an error.
    """
    return FunctionCalls(_NORMS, _call_norm)


def _call_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
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
