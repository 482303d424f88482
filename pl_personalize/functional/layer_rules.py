"""Closed forms for the per-sample gradients of a layer's parameters.

During a backward pass a layer sees its input ``x`` and the gradient ``g`` of the objective with respect to its output.
For the layers registered here, the gradient of each *single sample* with respect to each parameter follows from these
two tensors alone, without a backward pass of its own.

A rule is found by the function that the layer runs, ``type(layer).forward``, and not by ``isinstance``: a subclass that
computes something else must not inherit its parent's formula. A new layer type is one function::

    @register_layer_rule(nn.Linear)
    def linear(layer, x, grad):
        return {"weight": ..., "bias": ...}  # each (n, *parameter.shape)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PerSampleRule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
PowerSumRule = Callable[[nn.Module, Tensor, Tensor, int], "dict[str, Tensor] | None"]


@dataclass(frozen=True)
class LayerRule:
    """How the per-sample gradients of one type of layer follow from its input and its output's gradient.

    Attributes:
        per_sample: ``(layer, x, grad) -> {name: (n, *parameter.shape)}``, the gradients of ``n`` samples.
        power_sum: ``(layer, x, grad, power) -> {name: parameter.shape}``, the sum over the samples of
            ``|gradient| ** power`` without the per-sample gradients in memory; ``None`` where the layer has no such
            shortcut, and it returns ``None`` where the shapes at hand have none.
    """

    per_sample: PerSampleRule
    power_sum: PowerSumRule | None = None


_RULES: dict[Callable[..., object] | None, LayerRule] = {}


def register_layer_rule(
    *layer_types: type[nn.Module], power_sum: PowerSumRule | None = None
) -> Callable[[PerSampleRule], PerSampleRule]:
    """Register the decorated function as the per-sample rule of ``layer_types``.

    Args:
        layer_types: Classes whose own ``forward`` the rule describes.
        power_sum: The shortcut of :class:`LayerRule`, if there is one.
    """

    def register(per_sample: PerSampleRule) -> PerSampleRule:
        for layer_type in layer_types:
            _RULES[layer_type.forward] = LayerRule(per_sample, power_sum)
        return per_sample

    return register


def find_layer_rule(layer: nn.Module) -> LayerRule | None:
    """The rule for what ``layer`` computes, or ``None``; none if its ``forward`` was replaced on the instance."""
    return None if "forward" in vars(layer) else _RULES.get(getattr(type(layer), "forward", None))


def raise_to(tensor: Tensor, power: int) -> Tensor:
    """``|tensor| ** power`` for power 1 or 2, a new tensor: a gradient may be a view of something still needed."""
    return tensor.abs() if power == 1 else tensor.square()


def _positions_last(tensor: Tensor) -> Tensor:
    """(n, C, *positions) as (n, C, L)."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1], -1)


def _rows(tensor: Tensor) -> Tensor:
    """(n, *positions, features) as (n, L, features)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _add_power(total: Tensor | None, gradient: Tensor, power: int) -> Tensor:
    """Add the power of a gradient that is new and ours to a running sum."""
    powered = gradient.abs_() if power == 1 else gradient.square_()
    return powered if total is None else total.add_(powered)


def _linear_power_sum(layer: nn.Module, x: Tensor, grad: Tensor, power: int) -> dict[str, Tensor] | None:
    if x.dim() == 2:
        # The per-sample gradient is the outer product of g and x, so |g xᵀ|^p = |g|^p (|x|^p)ᵀ: one matrix product.
        grad = raise_to(grad, power)
        return {"weight": grad.T @ raise_to(x, power), "bias": grad.sum(0)}
    if x.is_cuda:
        return None
    # On a CPU one sample at a time: its gradient is still in the cache when it is added to the sum.
    total: Tensor | None = None
    for one_x, one_grad in zip(_rows(x), _rows(grad), strict=True):
        total = _add_power(total, one_grad.T @ one_x, power)
    return None if total is None else {"weight": total, "bias": raise_to(_rows(grad).sum(1), power).sum(0)}


@register_layer_rule(nn.Linear, power_sum=_linear_power_sum)
def linear(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Linear on (n, *, in): the outer products summed over all positions of a sample."""
    x, grad = _rows(x), _rows(grad)
    return {"weight": torch.bmm(grad.transpose(1, 2), x), "bias": grad.sum(1)}


def _convolution_inputs(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input and the padding for which the layer is a plain zero-padded convolution."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, list(layer.padding)  # type: ignore[arg-type]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # type: ignore[arg-type]
    return padded, [0] * (x.dim() - 2)


def _convolution_weight_gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """One sample at a time through the library's own weight-gradient kernel, which beats an unfolded product on CPU."""
    x, padding = _convolution_inputs(layer, x)
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    options = (layer.stride, padding, layer.dilation, transposed, list(layer.output_padding), layer.groups)  # type: ignore[arg-type]
    grad = grad.contiguous()
    for i in range(x.shape[0]):
        yield torch.ops.aten.convolution_backward(
            grad[i : i + 1], x[i : i + 1], weight, None, *options, [False, True, False]
        )[1]


def _convolution_power_sum(layer: nn.Module, x: Tensor, grad: Tensor, power: int) -> dict[str, Tensor] | None:
    total: Tensor | None = None
    for gradient in _convolution_weight_gradients(layer, x, grad):
        total = _add_power(total, gradient, power)
    bias = raise_to(_positions_last(grad).sum(2), power).sum(0)
    return None if total is None else {"weight": total, "bias": bias}


@register_layer_rule(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    power_sum=_convolution_power_sum,
)
def convolution(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Convolutions and transposed ones with any stride, dilation, groups and padding."""
    weight = torch.cat([gradient.unsqueeze(0) for gradient in _convolution_weight_gradients(layer, x, grad)])
    return {"weight": weight, "bias": _positions_last(grad).sum(2)}


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Batch norm in eval mode: an affine map of the input normalised by the running statistics."""
    x, grad = _positions_last(x), _positions_last(grad)
    mean: Tensor = layer.running_mean[:, None]  # type: ignore[index]
    scale: Tensor = torch.rsqrt(layer.running_var + layer.eps)  # type: ignore[operator]
    return {"weight": ((x - mean) * grad).sum(2) * scale, "bias": grad.sum(2)}


@register_layer_rule(nn.LayerNorm)
def layer_norm(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Layer norm: products with the normalised input, summed over the positions of a sample."""
    shape: tuple[int, ...] = layer.normalized_shape  # type: ignore[assignment]
    products = F.layer_norm(x, shape, eps=layer.eps) * grad  # type: ignore[arg-type]
    return {"weight": _sum_positions(products, len(shape)), "bias": _sum_positions(grad, len(shape))}


@register_layer_rule(nn.GroupNorm)
def group_norm(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Group norm: as layer norm, over the positions of each channel."""
    normalised = F.group_norm(x, layer.num_groups, eps=layer.eps)  # type: ignore[arg-type]
    return {"weight": _positions_last(normalised * grad).sum(2), "bias": _positions_last(grad).sum(2)}


def _sum_positions(tensor: Tensor, kept: int) -> Tensor:
    """(n, *positions, *kept) as (n, *kept): the sum over positions."""
    return tensor.reshape(tensor.shape[0], -1, *tensor.shape[tensor.dim() - kept :]).sum(1)


@register_layer_rule(nn.PReLU)
def prelu(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """PReLU with one slope, or one for each channel."""
    products = x.clamp_max(0) * grad
    if layer.num_parameters == 1:
        return {"weight": products.reshape(x.shape[0], -1).sum(1, keepdim=True)}
    return {"weight": _positions_last(products).sum(2)}


def _embedding_power_sum(layer: nn.Module, x: Tensor, grad: Tensor, power: int) -> dict[str, Tensor] | None:
    # A row gets the sum over a sample's positions that have it: one row for each pair of sample and entry.
    count, width = layer.weight.shape  # type: ignore[misc]
    entries = x.reshape(x.shape[0], -1)
    pairs = entries + count * torch.arange(x.shape[0], device=x.device)[:, None]
    unique, inverse = torch.unique(pairs, return_inverse=True)
    rows = grad.new_zeros(len(unique), width).index_add_(0, inverse.flatten(), grad.reshape(-1, width))
    rows = rows.abs_() if power == 1 else rows.square_()
    total = grad.new_zeros(count, width).index_add_(0, unique % count, rows)
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0  # type: ignore[index]
    return {"weight": total}


@register_layer_rule(nn.Embedding, power_sum=_embedding_power_sum)
def embedding(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Embedding: gradients added up by entry."""
    count, width = layer.weight.shape  # type: ignore[misc]
    n = x.shape[0]
    index = x.reshape(n, -1, 1).expand(-1, -1, width)
    total = grad.new_zeros(n, count, width).scatter_add_(1, index, grad.reshape(n, -1, width))
    if layer.padding_idx is not None:
        total[:, layer.padding_idx] = 0  # type: ignore[index]
    return {"weight": total}
