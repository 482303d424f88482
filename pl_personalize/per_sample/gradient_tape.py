"""A tape of layer inputs and output gradients, from which powers of per-sample gradients are summed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils.hooks import RemovableHandle

from pl_personalize.per_sample.attention import split_attention
from pl_personalize.per_sample.comparison import rounding_of_sums
from pl_personalize.per_sample.interrupts import InterruptsHeld
from pl_personalize.per_sample.layer_rules import LayerRule, add_power_sums_, find_layer_rule
from pl_personalize.per_sample.module_state import ForwardState
from pl_personalize.per_sample.sample_copies import Place, SampleCopies

NO_GRADIENT = "The model's output has no gradient with respect to any of the selected parameters."


class TapeError(ValueError):
    """Error of a ``layer`` that is used in a way that its rule does not cover."""

    def __init__(self, layer: nn.Module, message: str) -> None:
        super().__init__(message)
        self.layer = layer


class LayerUse:
    """One call of a layer: its input, and later the gradient of its output, both with the samples first."""

    def __init__(self, layer: nn.Module, x: Tensor, batch_dim: int) -> None:
        self.layer, self.batch_dim = layer, batch_dim
        self.x: Any = x.detach().movedim(batch_dim, 0)
        self.version = x._version
        self.grad: Any = None


def sum_type(parameter: Tensor) -> torch.dtype:
    """The type in which powers of a parameter's gradient are summed: real, and at least float32."""
    dtype = parameter.dtype.to_real() if parameter.is_complex() else parameter.dtype
    return torch.promote_types(dtype, torch.float32)


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a layer by local name, including those from which a parametrization computes them."""
    found = {name: p for name, p in layer._parameters.items() if p is not None}
    if is_parametrized(layer):
        parts = layer.parametrizations.named_parameters()  # type: ignore[union-attr]
        found |= {f"parametrizations.{name}": p for name, p in parts}
    return found


def layers_with(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
    """Modules of a model that own at least one of the parameters, except in TorchScript, where hooks do not work."""
    wanted = {id(p) for p in parameters}
    inside = {m for part in model.modules() if isinstance(part, ParametrizationList) for m in part.modules()}
    layers = [m for m in model.modules() if m not in inside and not isinstance(m, torch.jit.ScriptModule)]
    return [layer for layer in layers if any(id(p) in wanted for p in own_parameters(layer).values())]


def _vjp_per_sample(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Rule for a layer without a closed form: a vectorized vector-Jacobian product of the layer alone."""
    parameters = {name: p.detach() for name, p in own_parameters(layer).items()}

    def one_sample(x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        pull_back = vjp(lambda p: functional_call(layer, p, (x.unsqueeze(0),)), parameters)[1]
        gradients: dict[str, Tensor] = pull_back(grad.unsqueeze(0))[0]
        return gradients

    with InterruptsHeld(), ForwardState(layer):  # swapped parameters do not survive an interruption
        gradients: dict[str, Tensor] = vmap(one_sample)(x, grad)
    return gradients


VJP_RULE = LayerRule(_vjp_per_sample)


class _GraphRoot(torch.autograd.Function):
    """Makes a tensor part of the graph in place, so that gradients reach it although no parameter requires one."""

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

    The forward pass keeps the layers' inputs; a layer's sum is formed as soon as the backward pass reaches its output.
    Gradients of several uses of a layer or parameter are summed *before* the power is taken. Per-sample gradients are
    held for as many samples at a time as fit into ``max_scratch_bytes``.

    ``bias_rounding`` adds up the rounding errors of biases' gradients, by name, while the tape is learning; ``reached``
    collects names of parameters that a gradient has reached, while it is not.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layers: Iterable[nn.Module], power: int, max_scratch_bytes: int
    ) -> None:
        self.power = power
        self._shapes = {name: (p.shape, sum_type(p), p.device) for name, p in parameters.items()}
        self.sums: dict[str, Tensor] = {}
        self.reset()
        layers = list(layers)
        self._attentions = {layer: split for layer in layers if (split := split_attention(layer)) is not None}
        parts = [part for split in self._attentions.values() for part in split.projections]
        seen = [layer for layer in layers if layer not in self._attentions]
        self._own = {layer: own_parameters(layer) for layer in [*seen, *parts]}
        self.rules: dict[nn.Module, LayerRule] = {
            layer: VJP_RULE if is_parametrized(layer) else find_layer_rule(layer) or VJP_RULE for layer in self._own
        }
        recorded = {id(p) for own in self._own.values() for p in own.values() if not p.is_complex()}
        self.names: dict[int, str] = {id(p): name for name, p in parameters.items() if id(p) in recorded}
        self.copies = SampleCopies(self._sole_uses())
        self.is_learning = False
        self.reached: set[str] = set()
        self._known: set[nn.Module] = set()
        self._batch_dims: dict[nn.Module, int] = {}
        self._max_scratch_bytes = max_scratch_bytes
        self._handles: list[RemovableHandle] = []
        self._num_samples: int | None = None
        self._uses: list[LayerUse] = []
        self._use_counts: dict[int, int] = {}
        self._anchor: Tensor | None = None
        self._is_last_backward, self._in_backward = True, False

    def reset(self) -> None:
        """Set all sums to 0."""
        self.bias_rounding: dict[str, float] = {}
        self.sums.clear()  # frees their memory first
        for name, (shape, dtype, device) in self._shapes.items():
            self.sums[name] = torch.zeros(shape, dtype=dtype, device=device)

    def attach(self) -> None:
        """Register the forward hooks, which do nothing outside of :meth:`start` and :meth:`stop`."""
        for layer in self.rules:
            self._handles.append(layer.register_forward_hook(self._on_forward, with_kwargs=True))
        for split in self._attentions.values():
            split.attach(self._is_recording, self._refuse_other_use)

    def detach(self) -> None:
        """Remove the hooks and discard the recorded uses."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for split in self._attentions.values():
            split.detach()
        self.stop()
        self.clear()

    def clear(self) -> None:
        """Discard the recorded uses, but not the sums."""
        self._num_samples, self._anchor = None, None
        self._uses.clear()
        self._use_counts.clear()

    def forget(self, layer: nn.Module) -> None:
        """Stop summing for the parameters of a layer; their sums stay."""
        for key, _ in self.owned(layer).values():
            del self.names[key]

    def owned(self, layer: nn.Module) -> dict[str, tuple[int, str]]:
        """Parameters of a layer that the tape sums: local name -> (id, full name)."""
        return {
            local: (id(p), self.names[id(p)])
            for local, p in self._own.get(layer, {}).items()
            if id(p) in self.names and (layer, local) not in self.copies
        }

    def _sole_uses(self) -> dict[Place, str]:
        """Parameters of a single module, if it has no closed form, and their full names."""
        owners: dict[int, list[Place]] = {}
        for layer, own in self._own.items():
            for local, p in own.items():
                if id(p) in self.names:
                    owners.setdefault(id(p), []).append((layer, local))
        return {
            places[0]: self.names[key]
            for key, places in owners.items()
            if len(places) == 1
            and self.rules[layer := places[0][0]] is VJP_RULE
            and (local := places[0][1]) in layer._parameters.keys() - vars(layer).keys()
        }

    def start(self, num_samples: int, device: torch.device, only: Iterable[Place] | None = None) -> None:
        """Start recording the uses by a batch of ``num_samples``; with ``only``, put copies there without recording."""
        self.clear()
        self._num_samples = num_samples if only is None else None
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self.copies.start(num_samples, self._make_root, self._on_copies if only is None else None, only)

    def stop(self) -> None:
        """Stop recording; the recorded uses wait for :meth:`backward`."""
        self._num_samples = None
        self.copies.stop()

    def _make_root(self, tensor: Tensor) -> Tensor:
        root: Tensor = _GraphRoot.apply(tensor, self._anchor)
        return root

    def _on_copies(self, name: str, dim: int, grad: Tensor) -> None:
        self.reached.add(name)
        total = self.sums[name]
        add_power_sums_(total.view(grad.movedim(dim, 0).shape[1:]), grad.movedim(dim, 0), self.power)

    def backward(self, logits: Tensor, cotangent: Tensor, *, last: bool) -> None:
        """Add the sums for the recorded pass and one cotangent, both with the shape (n, *) of the logits.

        The ``last`` cotangent for a pass frees recorded tensors on the way.
        """
        if self._anchor is None or not logits.requires_grad:  # the output depends on no recorded layer
            return
        self._is_last_backward, self._in_backward = last, True
        try:
            torch.autograd.grad(logits, self._anchor, cotangent, retain_graph=not last, allow_unused=True)
        finally:
            self._in_backward = False
        for group in self._groups_by_shared_parameters():
            self._accumulate(group)
        for use in self._uses:
            use.grad = None
        if last:
            self._uses.clear()

    def _on_forward(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._in_backward and isinstance(output, Tensor) and not output.requires_grad and torch.is_grad_enabled():
            return self._make_root(output)  # activation checkpointing recomputes what was recorded
        if self._num_samples is None or not self.owned(layer):
            return None
        inputs = [*args, *kwargs.values()]
        tensors = [*inputs, output]
        if len(inputs) != 1 or not all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors):
            raise TapeError(layer, "it does not map one tensor to one tensor")
        batch_dim = self._batch_dim(layer, tensors)
        if self.is_learning:
            self._known.add(layer)
        elif layer not in self._known:
            raise TapeError(layer, "it was not used by the two samples of the check")
        if output._is_view():  # a hook on a view would see the result of in-place operations
            output = output.clone()
        if not output.requires_grad and torch.is_grad_enabled():
            output = self._make_root(output)
        if not output.requires_grad:  # inside torch.no_grad(), where autograd has no gradient either
            return None
        use = LayerUse(layer, inputs[0], batch_dim)
        self._uses.append(use)
        for key, _ in self.owned(layer).values():
            self._use_counts[key] = self._use_counts.get(key, 0) + 1
        output.register_hook(lambda grad: self._on_gradient(use, grad))
        return output

    def _is_recording(self) -> bool:
        """Whether uses are recorded, or recomputed by activation checkpointing in the backward pass."""
        return self._num_samples is not None or self._in_backward

    def _refuse_other_use(self, projection: nn.Module) -> None:
        if self._num_samples is not None and self.owned(projection):
            raise TapeError(projection, "it is not self-attention")

    def module_of(self, layer: nn.Module) -> nn.Module:
        """The module of the model that contains a layer."""
        return next((whole for whole, split in self._attentions.items() if layer in split.projections), layer)

    def _batch_dim(self, layer: nn.Module, tensors: list[Tensor]) -> int:
        """Dimension of the samples: the first, or the second, as in transformers over time."""
        dim = self._batch_dims.get(layer, 0)
        if all(t.dim() > dim and t.shape[dim] == self._num_samples for t in tensors):
            return dim
        if self.is_learning and all(t.dim() > 1 and t.shape[1] == self._num_samples for t in tensors):
            self._batch_dims[layer] = 1
            return 1
        place = ("first", "second")[dim]
        raise TapeError(layer, f"its {place} dimension is not the batch in {[tuple(t.shape) for t in tensors]}")

    def _on_gradient(self, use: LayerUse, grad: Tensor) -> None:
        if use.x is not None and use.x._version != use.version:
            raise TapeError(use.layer, "its input was modified in place after use")
        use.grad = grad.movedim(use.batch_dim, 0)
        owned, has_rule = self.owned(use.layer), self.rules[use.layer] is not VJP_RULE
        if not self.is_learning and has_rule:  # a layer without a rule may not use all of its parameters
            self.reached.update(name for _, name in owned.values())
        if self.is_learning and "bias" in owned:
            name, entries = owned["bias"][1], self._own[use.layer]["bias"].numel()
            self.bias_rounding[name] = self.bias_rounding.get(name, 0.0) + rounding_of_sums(use.grad, entries)
        # VJP_RULE calls autograd, and waits for the end of this backward pass.
        if has_rule and all(self._use_counts[key] == 1 for key, _ in owned.values()):
            self._accumulate([use])
            use.grad = None
            if self._is_last_backward:
                use.x = None

    def _groups_by_shared_parameters(self) -> list[list[LayerUse]]:
        """The remaining uses, in groups that share no parameter with each other."""
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
        first, rule = uses[0], self.rules[uses[0].layer]
        num_samples = first.x.shape[0]
        if len(uses) == 1 and rule.power_sum is not None:
            sums = {local: self.sums[name] for local, (_, name) in self.owned(first.layer).items()}
            chunk = self._at_a_time(2 * (first.x.numel() + first.grad.numel()) // num_samples, first.grad)
            if all(  # the first chunk shows whether there is a shortcut
                self._apply(rule.power_sum, first.layer, x, grad, self.power, sums)
                for x, grad in zip(torch.split(first.x, chunk), torch.split(first.grad, chunk), strict=True)
            ):
                return
        chunk = self._at_a_time(self._numbers_per_sample(uses), first.grad)
        for start in range(0, num_samples, chunk):
            part = slice(start, start + chunk)
            totals: dict[str, Tensor] = {}
            for use in uses:
                gradients = self._apply(self.rules[use.layer].per_sample, use.layer, use.x[part], use.grad[part])
                for local, (_, name) in self.owned(use.layer).items():
                    totals[name] = totals[name] + gradients[local] if name in totals else gradients[local]
            for name in list(totals):
                add_power_sums_(self.sums[name], totals.pop(name), self.power)

    def _at_a_time(self, numbers: int, like: Tensor) -> int:
        """Number of samples that fit into the scratch memory, at so many numbers each."""
        return max(1, self._max_scratch_bytes // max(1, numbers * like.element_size()))

    def _numbers_per_sample(self, uses: list[LayerUse]) -> int:
        """Size of the gradients of one sample and of the intermediate results of their rules."""
        parameters = {id(p): p for use in uses for p in self._own[use.layer].values()}
        elements = sum(p.numel() for p in parameters.values()) * (2 if len(uses) > 1 else 1)
        scratch = 0
        for use in uses:
            held = 2 * (use.x.numel() + use.grad.numel()) // use.x.shape[0]
            if (own := self.rules[use.layer].scratch) is not None:
                held += own(use.layer, use.x, use.grad)
            scratch = max(scratch, held)
        return elements + scratch

    def _apply(self, rule: Any, layer: nn.Module, *args: Any) -> Any:
        try:
            found = rule(layer, *args)
        except Exception as error:
            raise TapeError(layer, f"its per-sample gradients could not be computed ({error})") from error
        if isinstance(found, dict) and (missing := self.owned(layer).keys() - found.keys()):
            raise TapeError(layer, f"its rule returns no gradient of {sorted(missing)}")
        return found
