"""Features: the inputs of a network's last layer, read batch by batch in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pl_personalize.artifacts import tensor_checksum
from pl_personalize.functional.batches import Forward, as_logits, call_model
from pl_personalize.functional.discriminant import Linear
from pl_personalize.models.splitting import find_head
from pl_personalize.per_sample.batchnorm_pass import Batches
from pl_personalize.per_sample.module_state import evaluating, isolated, model_kept

Gather = Callable[[Tensor], Tensor]
"""Concatenates the rows of a tensor over processes, which may hold different numbers of them."""
T = TypeVar("T")


def read_everywhere(read: Callable[[], T], gather: Gather | None) -> T:
    """What ``read`` returns on this process.

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
        weight, bias = self.layer.weight.detach().cpu().double().flatten(1), self.layer.bias
        assert bias is not None
        return Linear(weight.clone(), bias.detach().cpu().double().clone())

    @property
    def body_fingerprint(self) -> str:
        """Checksum of the parameters of all other modules that the forward pass called, in the order of the calls."""
        modules = [module for module in dict.fromkeys(self._called) if module is not self.layer]
        parameters = dict.fromkeys(p for module in modules for p in module.parameters(recurse=False))
        return tensor_checksum({str(number): p.detach().cpu() for number, p in enumerate(parameters)})

    def write(self, head: Linear) -> None:
        """Copy a weight and a bias into the layer; raises as :meth:`fitting` does, and the layer is then unchanged."""
        weight, bias = self.fitting(head)
        assert self.layer.bias is not None
        with torch.no_grad():
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
        calls: list[tuple[str, Tensor, Any]] = []
        with ExitStack() as contexts:
            for context in (isolated(device), torch.no_grad(), model_kept(model), evaluating(model)):
                contexts.enter_context(context)
            layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
            if self.name is not None:
                layers = {self.name: self.layer}
            handles = {
                name: layer.register_forward_hook(
                    lambda _, inputs, output, name=name: calls.append((name, inputs[0], output))
                )
                for name, layer in layers.items()
            }
            for handle in handles.values():
                contexts.callback(handle.remove)
            watches = [m.register_forward_pre_hook(lambda m, _: self._called.append(m)) for m in model.modules()]
            for watch in watches:
                contexts.callback(watch.remove)
            checked = False
            for batch in Batches(batches, device, title="Features" if progress else None):
                calls.clear()
                logits = as_logits(self._forward(model, batch))
                if not calls:
                    raise ValueError(f"{type(model).__name__} calls no linear layer or 1×1 convolution as its head.")
                name, inputs, output = calls[-1]
                if not checked:
                    if self.name is None:
                        self._layer, self.name = _layer(model, name), name
                    for other in (*watches, *(handles[other] for other in handles.keys() - {name})):
                        other.remove()
                    checked = True
                elif len(calls) != 1:
                    raise ValueError(
                        f"The head {name!r} must be called once in a forward pass; got {len(calls)} calls."
                    )
                _check_linear(model, name, inputs, output, logits)
                features = (inputs.mean((2, 3)) if inputs.dim() == 4 else inputs).double().cpu()
                calls.clear()
                if not torch.isfinite(features).all():
                    raise ValueError(f"Features of the head {self.name!r} are NaN or infinite for some samples.")
                yield batch, features


def _layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer of that name, if it can be a head that is written to."""
    layer = find_head(model, name)
    if layer.bias is None:
        raise ValueError(
            f"The head {name!r} has no bias, which class priors are folded into; create it with bias=True."
        )
    return layer


def _check_linear(model: nn.Module, name: str, inputs: Tensor, output: Any, logits: Tensor) -> None:
    """Check that the logits are the output of the layer, or its mean over positions."""
    expected = output
    if isinstance(output, Tensor) and output.dim() == 4:
        expected = output.mean((2, 3))
    fits = isinstance(expected, Tensor) and expected.dim() == 2 and inputs.dim() in (2, 4)
    if (
        not fits
        or expected.shape != logits.shape
        or not torch.allclose(expected, logits, rtol=1e-3, atol=1e-4, equal_nan=True)
    ):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The logits {tuple(logits.shape)} of {type(model).__name__} are not linear in the input of its last layer "
            f"{name!r} (output {found}): another operation follows it (a softmax, a scale, a ReLU?), or the logits are "
            "not (samples, classes). Pass head= to name another layer, or remove what follows."
        )
