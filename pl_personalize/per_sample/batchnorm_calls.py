"""Replacement of the statistics by which batch-norm layers normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pl_personalize.functional.batches import batch_tensors
from pl_personalize.functional.moments import MEAN, VARIANCE
from pl_personalize.per_sample.function_calls import FunctionCalls

Handle = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", MEAN, VARIANCE, "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", MEAN, VARIANCE, "training", "momentum", "eps", "cudnn_enabled"),
}


class BatchNormCalls:
    r"""Context in which a function chooses the statistics by which batch-norm layers in eval mode normalize.

    It intercepts the call of ``F.batch_norm`` in a layer's forward with the layer's running mean, or a copy of it such
    as one in another precision. A layer may transpose, flatten or mask its input first. Buffers do not change.

    Args:
        layers: The layers, by name.
        handle: ``(name, x, mean, variance) -> (mean, variance)``, with x of (N, C) or (N, C, \*). The returned
            statistics have the types of the given ones.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], handle: Handle) -> None:
        self._layers, self._handle = layers, handle
        self._running: list[str] = []
        self._seen: set[str] = set()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the statistics inside.

        Raises:
            ValueError: Inside, if a layer does not normalize by ``F.batch_norm``.
        """
        before = {layer: vars(layer).get("forward") for layer in self._layers.values()}
        try:
            for name, layer in self._layers.items():
                vars(layer)["forward"] = partial(self._forward, name, layer, layer.forward)
            yield
        finally:
            for layer, forward in before.items():
                vars(layer).pop("forward", None)
                if forward is not None:
                    vars(layer)["forward"] = forward

    def _forward(self, name: str, layer: _BatchNorm, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._seen.discard(name)
        self._running.append(name)
        try:
            with FunctionCalls(_ARGUMENTS, partial(self._on_call, name, layer.running_mean)):
                output = forward(*args, **kwargs)
        finally:
            self._running.pop()
        if name not in self._seen and any(tensor.numel() for tensor in batch_tensors(output)):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise ValueError(
                f"The batch-norm layer {name!r} ({kind}) cannot be adapted: its forward does not pass its running_mean "
                "to torch.nn.functional.batch_norm. Call that function or super().forward in it, or adapt only other "
                "layers with module=."
            )
        return output

    def _on_call(
        self, name: str, own: Tensor | None, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        call = dict(zip(_ARGUMENTS[func], args, strict=False)) | dict(kwargs)
        x, mean = call["input"], call.get(MEAN)
        if self._running[-1] == name and mean is not None and own is not None and _is_copy(mean, own):
            self._seen.add(name)
            if x.dim() > 1 and x.shape[1] == len(mean):  # otherwise PyTorch refuses it
                call[MEAN], call[VARIANCE] = self._handle(name, x, mean, call[VARIANCE])
        return func(**call)


def _is_copy(mean: Tensor, own: Tensor) -> bool:
    return mean is own or (mean.shape == own.shape and torch.allclose(mean, own.to(mean), 0, 0, equal_nan=True))
