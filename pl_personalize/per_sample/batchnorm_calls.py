"""Seeing what batch-norm layers normalise, and saying by which statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from pl_personalize.functional.batches import batch_tensors
from pl_personalize.functional.moments import MEAN, VARIANCE

Handle = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_ARGUMENTS = {
    F.batch_norm: ("input", MEAN, VARIANCE, "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", MEAN, VARIANCE, "training", "momentum", "eps", "cudnn_enabled"),
}
_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNormCalls:
    r"""A context in which a function says by which statistics batch-norm layers in eval mode normalise.

    PyTorch's own layers normalise what they are given. A subclass with a forward of its own may transpose, flatten or
    mask that first; there what counts is the input of the call of ``F.batch_norm`` in its forward, by its running mean
    or a copy of that, such as one in another precision. Buffers stay as they are.

    Args:
        layers: By name.
        handle: ``(name, x, mean, variance)``, x of (N, C) or (N, C, \*), to the mean and the variance to normalise by,
            each of the types of those that it was given.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], handle: Handle) -> None:
        self._layers, self._handle = layers, handle
        self._running: list[str] = []
        self._seen: set[str] = set()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Layers normalise by what the function says.

        Raises:
            ValueError: Inside, if a layer does not normalise by ``F.batch_norm``.
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
        with _Calls(partial(self._on_call, name, layer.running_mean)), self._inside(name):
            output = forward(*args, **kwargs)
        if name not in self._seen and any(tensor.numel() for tensor in batch_tensors(output)):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise ValueError(
                f"The batch-norm layer {name!r} ({kind}) normalises in a way of its own, which cannot be adapted: its "
                "running_mean does not reach torch.nn.functional.batch_norm. Let its forward call that function, or "
                "super().forward; or adapt other layers alone, module=."
            )
        return output

    def _on_call(self, name: str, own: Tensor | None, call: dict[str, Any]) -> None:
        mean = call.get(MEAN)
        if self._running[-1] != name or mean is None or own is None:
            return
        if mean is own or (mean.shape == own.shape and torch.allclose(mean, own.to(mean), 0, 0, equal_nan=True)):
            self._seen.add(name)
            self._replace(name, call)

    def _replace(self, name: str, call: dict[str, Any]) -> None:
        x, mean = call["input"], call[MEAN]
        if x.dim() > 1 and x.shape[1] == len(mean):  # else PyTorch refuses it
            call[MEAN], call[VARIANCE] = self._handle(name, x, mean, call[VARIANCE])

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()


class _Calls(TorchFunctionMode):
    def __init__(self, handle: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._handle = handle

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm and func is not torch.batch_norm:
            return func(*args, **(kwargs or {}))
        call = dict(zip(_ARGUMENTS[func], args, strict=False)) | dict(kwargs or {})
        self._handle(call)
        return func(**call)
