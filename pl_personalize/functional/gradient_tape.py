"""Records what the layers of a network see in one pass, and sums powers of their per-sample gradients from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils.hooks import RemovableHandle

from pl_personalize.functional.attention import split_attention
from pl_personalize.functional.layer_rules import LayerRule, find_layer_rule, raise_to


class TapeError(ValueError):
    """A layer was used in a way for which its rule does not hold.

    Attributes:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module, message: str) -> None:
        super().__init__(message)
        self.layer = layer


class LayerUse:
    """One call of a layer: what went in, and later the gradient of what came out."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer = layer
        self.x: Tensor | None = x.detach()
        self.version = x._version
        self.grad: Tensor | None = None


def _vjp_per_sample(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The rule for a layer without closed form: a vectorised vector-Jacobian product of the layer alone."""
    parameters = {name: p.detach() for name, p in layer._parameters.items() if p is not None}

    def one_sample(x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        pull_back = vjp(lambda p: functional_call(layer, p, (x.unsqueeze(0),)), parameters)[1]
        gradients: dict[str, Tensor] = pull_back(grad.unsqueeze(0))[0]
        return gradients

    gradients: dict[str, Tensor] = vmap(one_sample)(x, grad)
    return gradients


VJP_RULE = LayerRule(_vjp_per_sample)


class _GraphRoot(torch.autograd.Function):
    """Makes a tensor part of the graph in place, so that gradients reach it although no parameter needs one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        ctx.anchor = anchor
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, torch.zeros_like(ctx.anchor)


class GradientTape:
    r"""Sums :math:`\sum_i |\partial \langle c_i, f(x_i) \rangle / \partial \theta|^p` over samples, layer by layer.

    The layers' inputs are kept in the forward pass; each layer's sum is formed as soon as the backward pass has brought
    the gradient of its output. No parameter needs a gradient of its own, so autograd computes none. Where a layer is
    called several times, or layers share a parameter, the per-sample gradients are summed over the uses *before* the
    power is taken.

    Args:
        parameters: The parameters, by name. Shared ones appear once.
        layers: Layers that own at least one of them.
        power: 1 (absolute values) or 2 (squares).
        max_scratch_bytes: Per-sample gradients are held for as many samples at a time as fit.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layers: Iterable[nn.Module], power: int, max_scratch_bytes: int
    ) -> None:
        self.power = power
        self.sums = {
            name: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
            for name, p in parameters.items()
        }
        layers = list(layers)
        self._attentions = {layer: split for layer in layers if (split := split_attention(layer)) is not None}
        parts = [part for split in self._attentions.values() for part in split.projections]
        seen = [layer for layer in layers if layer not in self._attentions]
        self.rules: dict[nn.Module, LayerRule] = {
            layer: find_layer_rule(layer) or VJP_RULE for layer in [*seen, *parts]
        }
        self.names: dict[int, str] = {id(p): name for name, p in parameters.items()}
        self.broadcast = self._broadcast_parameters()
        self._max_scratch_bytes = max_scratch_bytes
        self._handles: list[RemovableHandle] = []
        self._num_samples: int | None = None
        self._uses: list[LayerUse] = []
        self._use_counts: dict[int, int] = {}
        self._anchor: Tensor | None = None
        self._is_last_backward = True

    def attach(self) -> None:
        """Register the forward hooks. They do nothing outside of :meth:`recording`."""
        for layer in self.rules:
            self._handles.append(layer.register_forward_hook(self._on_forward, with_kwargs=True))
        for split in self._attentions.values():
            split.attach(lambda: self._num_samples is not None)

    def detach(self) -> None:
        """Remove the hooks and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for split in self._attentions.values():
            split.detach()
        self.stop()
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded; the sums stay."""
        self._num_samples, self._anchor = None, None
        self._uses.clear()
        self._use_counts.clear()

    def owned(self, layer: nn.Module) -> dict[str, tuple[int, str]]:
        """The layer's own parameters that the tape sums: local name -> (id, full name)."""
        return {
            local: (id(p), self.names[id(p)])
            for local, p in layer._parameters.items()
            if p is not None and id(p) in self.names and (layer, local) not in self.broadcast
        }

    def _broadcast_parameters(self) -> dict[tuple[nn.Module, str], str]:
        """Parameters that a module without closed form repeats for each sample, such as class tokens: their names.

        Their first dimension is 1, where the batch is. While a pass is recorded, each sample gets a copy of its own,
        and the gradient of the copies is the per-sample gradient.
        """
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for layer in self.rules:
            for local, p in layer._parameters.items():
                if p is not None and id(p) in self.names:
                    owners.setdefault(id(p), []).append((layer, local))
        return {
            places[0]: self.names[key]
            for key, places in owners.items()
            if len(places) == 1 and self.rules[places[0][0]] is VJP_RULE and _is_broadcast(*places[0])
        }

    def start(self, num_samples: int, device: torch.device) -> None:
        """Record the uses from here on, of a batch of ``num_samples``."""
        self.clear()
        self._num_samples = num_samples
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        for (layer, local), name in self.broadcast.items():
            parameter = layer._parameters[local]
            assert parameter is not None
            copies = parameter.detach().expand(num_samples, *parameter.shape[1:]).clone()
            copies = _GraphRoot.apply(copies, self._anchor)
            copies.register_hook(lambda grad, name=name: self._on_copies(name, grad))
            vars(layer)[local] = copies  # found before the parameter

    def stop(self) -> None:
        """Record no further uses; the recorded ones wait for :meth:`backward`."""
        self._num_samples = None
        for layer, local in self.broadcast:
            vars(layer).pop(local, None)

    def _on_copies(self, name: str, grad: Tensor) -> None:
        self.sums[name].add_(raise_to(grad, self.power).sum(0, keepdim=True))

    def backward(self, logits: Tensor, cotangent: Tensor, *, last: bool) -> None:
        """Add the sums for the recorded pass and one cotangent.

        Args:
            logits: The network's output in the recorded pass, (n, *).
            cotangent: Gradient of the objective with respect to it, of the same shape.
            last: Whether this is the last cotangent for this pass; the recorded tensors are then released on the way.
        """
        if self._anchor is None or not logits.requires_grad:  # no recorded layer has a part in the output
            return
        self._is_last_backward = last
        torch.autograd.grad(logits, self._anchor, cotangent, retain_graph=not last, allow_unused=True)
        for group in self._groups_by_shared_parameters():
            self._accumulate(group)
        for use in self._uses:
            use.grad = None

    def _on_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._num_samples is None or not self.owned(layer):
            return None
        inputs = [*args, *kwargs.values()]
        tensors = [*inputs, output]
        if len(inputs) != 1 or not all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors):
            raise TapeError(layer, "it does not map one tensor to one tensor")
        if any(t.shape[0] != self._num_samples for t in tensors):
            raise TapeError(layer, f"its first dimension is not the batch: {[tuple(t.shape) for t in tensors]}")
        if not output.requires_grad and torch.is_grad_enabled():
            output = _GraphRoot.apply(output.clone() if output._is_view() else output, self._anchor)
        if not output.requires_grad:  # inside torch.no_grad(): autograd, too, has no gradient for it
            return None
        use = LayerUse(layer, inputs[0])
        self._uses.append(use)
        for key, _ in self.owned(layer).values():
            self._use_counts[key] = self._use_counts.get(key, 0) + 1
        output.register_hook(lambda grad: self._on_gradient(use, grad))
        return output

    def _on_gradient(self, use: LayerUse, grad: Tensor) -> None:
        if use.x is not None and use.x._version != use.version:
            raise TapeError(use.layer, "its input was modified in place after it was used")
        use.grad = grad
        # Rules that call autograd themselves wait for the end of this backward pass.
        alone = all(self._use_counts[key] == 1 for key, _ in self.owned(use.layer).values())
        if alone and self.rules[use.layer] is not VJP_RULE:
            self._accumulate([use])
            use.grad = None
            if self._is_last_backward:
                use.x = None

    def _groups_by_shared_parameters(self) -> list[list[LayerUse]]:
        """The uses that still wait, in groups that have no parameter in common with each other."""
        groups: list[tuple[set[int], list[LayerUse]]] = []
        for use in self._uses:
            if use.grad is None:
                continue
            keys, members = {key for key, _ in self.owned(use.layer).values()}, [use]
            for group in [group for group in groups if group[0] & keys]:
                groups.remove(group)
                keys |= group[0]
                members = group[1] + members
            groups.append((keys, members))
        return [members for _, members in groups]

    def _accumulate(self, uses: list[LayerUse]) -> None:
        for use in uses:
            assert use.x is not None
            assert use.grad is not None
        first, rule = uses[0], self.rules[uses[0].layer]
        if len(uses) == 1 and rule.power_sum is not None:
            sums = self._apply(rule.power_sum, first.layer, first.x, first.grad, self.power)
            if sums is not None:
                for local, (_, name) in self.owned(first.layer).items():
                    self.sums[name].add_(sums[local])
                return
        elements = sum(
            {
                key: p.numel() for u in uses for p in u.layer._parameters.values() if p is not None for key in [id(p)]
            }.values()
        )
        num_samples = first.x.shape[0]  # type: ignore[union-attr]
        chunk = max(1, self._max_scratch_bytes // max(1, elements * first.grad.element_size()))  # type: ignore[union-attr]
        for start in range(0, num_samples, chunk):
            part = slice(start, start + chunk)
            totals: dict[str, Tensor] = {}
            for use in uses:
                gradients = self._apply(self.rules[use.layer].per_sample, use.layer, use.x[part], use.grad[part])  # type: ignore[index]
                for local, (_, name) in self.owned(use.layer).items():
                    totals[name] = totals[name] + gradients[local] if name in totals else gradients[local]
            for name, total in totals.items():
                self.sums[name].add_(raise_to(total, self.power).sum(0))

    def _apply(self, rule: Any, layer: nn.Module, *args: Any) -> Any:
        try:
            gradients = rule(layer, *args)
        except Exception as error:
            raise TapeError(layer, f"its per-sample gradients could not be formed ({error})") from error
        if gradients is not None and (missing := self.owned(layer).keys() - gradients.keys()):
            raise TapeError(layer, f"its rule says nothing of {sorted(missing)}")
        return gradients


def _is_broadcast(layer: nn.Module, local: str) -> bool:
    parameter = layer._parameters[local]
    return parameter is not None and parameter.dim() > 1 and parameter.shape[0] == 1 and local not in vars(layer)
