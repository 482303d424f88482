"""Features: the inputs of a network's last layer, read batch by batch in one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from pl_personalize.artifacts import tensor_checksum
from pl_personalize.functional.batches import Forward, as_logits, call_model
from pl_personalize.functional.discriminant import Linear
from pl_personalize.models.splitting import find_head
from pl_personalize.per_sample.batchnorm_pass import Batches
from pl_personalize.per_sample.interrupts import InterruptsHeld
from pl_personalize.per_sample.module_state import evaluating, isolated, model_kept

Gather = Callable[[Tensor], Tensor]
"""Concatenates the rows of a tensor over processes, which may hold different numbers of them."""
T = TypeVar("T")


def read_everywhere(read: Callable[[], T], gather: Gather | None) -> T:
    """The result of ``read`` on this process.

    Raises:
        ValueError: On every process, if another one failed; that one raises its own error.
    """
    if gather is None:
        return read()
    failed: Exception | None = None
    try:
        found = read()
    except Exception as error:  # the others wait for this process
        failed = error
    failures = gather(torch.tensor([int(failed is not None)]))
    if failed is not None:
        raise failed
    if failures.any():
        count = int(failures.sum())
        raise ValueError(f"{count} of {len(failures)} processes could not read their data; see their errors.")
    return found


class HeadOf:
    """The last layer of a network, in whose input the logits are linear.

    Features are that input, (n, d); those of a 1×1 convolution are averaged over positions, as its outputs are.

    Args:
        model: Any module that returns logits (n, K).
        name: Name of the layer; by default the last linear layer or convolution that a forward pass calls.
        forward: ``(model, batch) -> logits``, if calling the model on the input is not enough.

    Raises:
        ValueError: If ``name`` is no such layer, or it shares parameters with others.
    """

    def __init__(self, model: nn.Module, name: str | None = None, forward: Forward | None = None) -> None:
        model = model._orig_mod if isinstance(model, OptimizedModule) else model  # whose layers have plain names
        self.model, self.name, self._forward = model, name, forward or call_model
        self._layer = None if name is None else _layer(model, name)
        self._called: list[nn.Module] = []

    @property
    def layer(self) -> nn.Linear | nn.Conv2d:
        """The layer; without a name, it is known once a batch was read."""
        assert self._layer is not None
        return self._layer

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.layer.weight)

    @property
    def linear(self) -> Linear:
        """Weight (K, d) and bias (K,), copied to the CPU in float64."""
        return _linear(self.layer)

    @property
    def body_fingerprint(self) -> str:
        """Checksum of the parameters of all other modules that the forward pass used, in the order of the calls.

        A module that calls none of its submodules may use their parameters itself, as attention does.
        """
        modules = dict.fromkeys(module for module in self._called if module is not self.layer)
        called = {*modules, self.layer}
        alone = {module: called.isdisjoint(list(module.modules())[1:]) for module in modules}
        parameters = dict.fromkeys(p for module in modules for p in module.parameters(recurse=alone[module]))
        return tensor_checksum({str(number): p.detach().cpu() for number, p in enumerate(parameters)})

    def write(self, head: Linear) -> None:
        """Copy a weight and a bias into the layer; raises as :meth:`fitting` does, and the layer is then unchanged."""
        weight, bias = self.fitting(head)
        assert self.layer.bias is not None
        with torch.no_grad(), InterruptsHeld():
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(bias)

    def fitting(self, head: Linear) -> Linear:
        """A weight and a bias in the shape and precision of the layer.

        Raises:
            ValueError: If an entry is too large for the precision.
        """
        bias = self.layer.bias
        assert bias is not None
        weight, shift = head.weight.to(self.layer.weight).view_as(self.layer.weight), head.bias.to(bias)
        if not (torch.isfinite(weight).all() and torch.isfinite(shift).all()):
            raise ValueError(f"The new weight of the head {self.name!r} is not finite in {weight.dtype}.")
        return Linear(weight, shift)

    def read(self, batches: Iterable[Any], *, progress: bool = False) -> Iterator[tuple[Any, Tensor]]:
        """Yield each batch with its features (n, d), in float64 on the CPU, from one forward pass in eval mode.

        Raises:
            ValueError: If the network has no head, is not linear in its features, or a feature is not finite.
        """
        if isinstance(batches, Tensor):
            raise ValueError(f"Pass an iterable of batches, such as [x], not a tensor of shape {tuple(batches.shape)}.")
        model = self.model
        device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        with ExitStack() as contexts:
            for context in (isolated(device), torch.no_grad(), model_kept(model), evaluating(model)):
                contexts.enter_context(context)
            layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
            if self.name is not None:
                layers = {self.name: self.layer}
            calls = _Calls()
            handles = {name: calls.watch(name, layer) for name, layer in layers.items()}
            for handle in handles.values():
                contexts.callback(handle.remove)
            watches = [m.register_forward_pre_hook(lambda m, _: self._called.append(m)) for m in model.modules()]
            for watch in watches:
                contexts.callback(watch.remove)
            checked = False
            for batch in Batches(batches, device, title="Features" if progress else None):
                logits = calls.of(self._forward, model, batch)
                name = calls.last
                if not checked:
                    if self.name is None:
                        self._layer, self.name = _layer(model, name), name
                    for other in (*watches, *(handles[other] for other in handles.keys() - {name})):
                        other.remove()
                features = calls.features(model, name, self.layer, logits)
                if not checked and not _tells(self.layer, features):
                    with _random_parameters(self.layer):
                        calls.features(model, name, self.layer, calls.of(self._forward, model, batch))
                checked = True
                if not torch.isfinite(features).all():
                    raise ValueError(f"Features of the head {self.name!r} are NaN or infinite for some samples.")
                yield batch, features


@contextmanager
def written(heads: Sequence[tuple[HeadOf, Linear]]) -> Iterator[None]:
    """Write heads into their layers, all or none, and put the old ones back after an error or an interruption.

    Raises:
        ValueError: As :meth:`HeadOf.fitting` does, before anything changes.
    """
    for layer, head in heads:
        layer.fitting(head)
    parameters = [p for layer, _ in heads for p in layer.layer.parameters()]
    before = [p.detach().clone() for p in parameters]
    try:
        with InterruptsHeld():
            for layer, head in heads:
                layer.write(head)
        yield
    except BaseException:
        with InterruptsHeld(), torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
        raise


class _Calls:
    """Calls of layers in one forward pass: the input of the last one, before anything can change it in place."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._input: Tensor | None = None
        self.last = ""

    def watch(self, name: str, layer: nn.Module) -> Any:
        """Note the calls of a layer; returns the handle of its hook."""

        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("input")
            self._input, self.last = None, name
            if isinstance(given, Tensor):
                self._input = given.detach().mean((2, 3)) if given.dim() == 4 else given.detach().clone()
            self._counts[name] += 1

        return layer.register_forward_pre_hook(called, with_kwargs=True)

    def of(self, forward: Forward, model: nn.Module, batch: Any) -> Tensor:
        """The logits of a batch, whose forward pass is noted.

        Raises:
            ValueError: If no layer was called.
        """
        self._counts.clear()
        logits = as_logits(forward(model, batch))
        if not self._counts:
            raise ValueError(f"{type(model).__name__} calls no linear layer or 1×1 convolution as its head.")
        return logits

    def features(self, model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d, logits: Tensor) -> Tensor:
        """The input of the head, (n, d), in float64 on the CPU.

        Raises:
            ValueError: If the head was called several times, or the logits are not linear in its input.
        """
        if (count := self._counts[name]) != 1 or self.last != name:
            raise ValueError(
                f"The head {name!r} must be called once in a forward pass, as the last layer; got {count} calls."
            )
        inputs, shape = self._input, tuple(logits.shape)
        self._input = None
        if inputs is not None and inputs.dim() == 2 and shape == (len(inputs), len(layer.weight)):
            features = inputs.cpu().double()
            head = _linear(layer)
            expected, found = head(features), logits.detach().cpu().double()
            if not expected.isfinite().all():
                return features  # refused by name later
            tolerance = 1e-3 if layer.weight.dtype in (torch.float32, torch.float64) else 0.05
            size = (features.abs() @ head.weight.abs().T).amax() + head.bias.abs().amax()
            overflows = expected.abs() > torch.finfo(logits.dtype).max
            if (((expected - found).abs() <= tolerance * (expected.abs() + 0.1 * size)) | overflows).all():
                return features
        raise ValueError(
            f"The logits {shape} of {type(model).__name__} are not linear in the input of its last layer {name!r}, "
            f"{tuple(layer.weight.shape)}: another operation follows it (a softmax, a scale, a ReLU?), or the logits "
            "are not (samples, classes). Pass head= to name another layer, or remove what follows."
        )


def _linear(layer: nn.Linear | nn.Conv2d) -> Linear:
    """Weight (K, d) and bias (K,) of a layer, copied to the CPU in float64."""
    assert layer.bias is not None
    weight, bias = (p.detach().cpu().to(torch.float64, copy=True) for p in (layer.weight, layer.bias))
    return Linear(weight.flatten(1), bias)


def _tells(layer: nn.Linear | nn.Conv2d, features: Tensor) -> bool:
    """Whether the logits differ so much that another operation on them cannot hide, such as a ReLU."""
    logits = _linear(layer)(features)
    return bool(logits.amin() < -1e-3 and logits.amax() > 1e-3)


@contextmanager
def _random_parameters(layer: nn.Linear | nn.Conv2d) -> Iterator[None]:
    """Random weight and bias, for a while."""
    generator = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with InterruptsHeld():
        try:
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            yield
        finally:
            for name, parameter in layer.named_parameters():
                parameter.copy_(before[name])


def _layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer of that name, if it can be a head that is written to."""
    layer = find_head(model, name)
    if layer.bias is None:
        raise ValueError(
            f"The head {name!r} has no bias, which class priors are folded into; create it with bias=True."
        )
    return layer
