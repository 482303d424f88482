"""Batch and instance norms whose gradients are right on CPUs, whatever the memory layout of what follows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BATCH_NORMS = frozenset((F.batch_norm, torch.batch_norm))
_INSTANCE_NORMS = frozenset((F.instance_norm, torch.instance_norm))
_NORMS = _BATCH_NORMS | _INSTANCE_NORMS


class RightNormGradients(TorchFunctionMode):
    """A context in which the gradient that reaches a norm's output has the memory layout of the norm's input.

    On a CPU, PyTorch's batch norm takes a wrong kernel in its backward pass where the two layouts differ and a
    dimension has size 1: that of the samples, or one of the positions (inside an instance norm, the first always has).
    Everything that it returns is wrong then, without an error. Which function a module calls, and from where, does not
    matter; TorchScript is out of reach.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function; if it is a norm of maps, see to the gradient of its output."""
        output = func(*args, **kwargs) if kwargs else func(*args)
        if func in _NORMS and isinstance(output, Tensor) and output.requires_grad:
            x: Tensor = args[0] if args else (kwargs or {})["input"]
            if x.dim() > 2 and x.device.type == "cpu":
                x = x.detach().contiguous() if func in _INSTANCE_NORMS else x.detach()  # as it does inside
                output.register_hook(partial(_laid_out_as, torch.empty_like(x, device="meta")))  # type: ignore[no-untyped-call]
        return output


def _laid_out_as(layout: Tensor, gradient: Tensor | None) -> Tensor | None:
    if (
        gradient is None or gradient.stride() == layout.stride()
    ):  # where second derivatives are taken, there may be none
        return gradient
    return torch.empty_like(layout, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
