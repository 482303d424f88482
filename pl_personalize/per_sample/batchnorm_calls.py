"""Replacement of the statistics by which batch-norm layers normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pl_personalize.functional.batches import batch_tensors
from pl_personalize.functional.moments import MEAN, VARIANCE
from pl_personalize.per_sample.function_calls import FunctionCalls

Handle = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", MEAN, VARIANCE, "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", MEAN, VARIANCE, "training", "momentum", "eps", "cudnn_enabled"),
}
_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNormCalls:
    r"""Context in which a function chooses the statistics by which batch-norm layers in eval mode normalize.

    PyTorch's own layers normalize their input. A subclass with its own forward may transpose, flatten or mask it first;
    there, the input of the call of ``F.batch_norm`` with the layer's running mean, or a copy of it such as one in
    another precision, is used. Buffers do not change.

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
                plain = before[layer] is None and type(layer).forward in _PLAIN
                vars(layer)["forward"] = partial(self._plain if plain else self._own, name, layer, layer.forward)
            yield
        finally:
            for layer, forward in before.items():
                vars(layer).pop("forward", None)
                if forward is not None:
                    vars(layer)["forward"] = forward

    def _plain(self, name: str, layer: _BatchNorm, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        buffers = {what: layer._buffers[what] for what in (MEAN, VARIANCE)}
        call = {"input": args[0] if args else kwargs["input"]} | buffers
        self._replace(name, call)
        layer._buffers.update({what: call[what] for what in buffers})
        try:
            with self._inside(name):
                return forward(*args, **kwargs)
        finally:
            layer._buffers.update(buffers)

    def _own(self, name: str, layer: _BatchNorm, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._seen.discard(name)
        with FunctionCalls(_ARGUMENTS, partial(self._on_call, name, layer.running_mean)), self._inside(name):
            output = forward(*args, **kwargs)
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
        mean = call.get(MEAN)
        if self._running[-1] == name and mean is not None and own is not None and _is_copy(mean, own):
            self._seen.add(name)
            self._replace(name, call)
        return func(**call)

    def _replace(self, name: str, call: dict[str, Any]) -> None:
        x, mean = call["input"], call[MEAN]
        if x.dim() > 1 and x.shape[1] == len(mean):  # otherwise PyTorch refuses it
            call[MEAN], call[VARIANCE] = self._handle(name, x, mean, call[VARIANCE])

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()


def _is_copy(mean: Tensor, own: Tensor) -> bool:
    return mean is own or (mean.shape == own.shape and torch.allclose(mean, own.to(mean), 0, 0, equal_nan=True))
