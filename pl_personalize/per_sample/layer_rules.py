"""Closed forms for the per-sample gradients of a layer's parameters.

The gradient of each *single sample* with respect to each parameter follows from the layer's input ``x`` and the
gradient ``grad`` of the objective with respect to its output, without another backward pass.

Rules are looked up by the function that the layer runs, ``type(layer).forward``, not by ``isinstance``: a subclass that
computes something else must not inherit its parent's formula. To add a layer type, register one function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

# The first argument is the layer, of a type that the rule is registered for.
PerSampleRule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
PowerSumRule = Callable[[Any, Tensor, Tensor, int, Mapping[str, Tensor]], bool]
Scratch = Callable[[Any, Tensor, Tensor], int]


@dataclass(frozen=True)
class LayerRule:
    """Per-sample gradients of one type of layer.

    Attributes:
        per_sample: ``(layer, x, grad) -> {name: (n, *parameter.shape)}``, the gradients of ``n`` samples.
        power_sum: Optional shortcut ``(layer, x, grad, power, sums) -> bool``. It adds the sum over samples of
            ``|gradient| ** power`` to ``sums``, in place and without per-sample gradients in memory. ``sums`` holds the
            selected parameters only. It returns ``False``, having done nothing, if it does not cover the case.
        scratch: ``(layer, x, grad) -> int``, how many numbers ``per_sample`` holds besides its result.
    """

    per_sample: PerSampleRule
    power_sum: PowerSumRule | None = None
    scratch: Scratch | None = None


_IN_CACHE = 2**18  # numbers; larger tensors are bound by memory bandwidth
_RULES: dict[Callable[..., object] | None, LayerRule] = {}


def register_layer_rule(
    *layer_types: type[nn.Module],
    power_sum: PowerSumRule | None = None,
    scratch: Scratch | None = None,
) -> Callable[[PerSampleRule], PerSampleRule]:
    """Register the decorated function as the rule of classes whose ``forward`` it describes; see :class:`LayerRule`."""

    def register(per_sample: PerSampleRule) -> PerSampleRule:
        for layer_type in layer_types:
            _RULES[layer_type.forward] = LayerRule(per_sample, power_sum, scratch)
        return per_sample

    return register


def find_layer_rule(layer: nn.Module) -> LayerRule | None:
    """The rule for a layer, or ``None``, also if its ``forward`` was replaced on the instance."""
    return None if "forward" in vars(layer) else _RULES.get(getattr(type(layer), "forward", None))


def raise_to(tensor: Tensor, power: int) -> Tensor:
    """``|tensor| ** power`` for power 1 or 2, as a new tensor: a gradient may be a view of something still needed."""
    return tensor.abs() if power == 1 else tensor.square()


def add_powers_(total: Tensor, gradient: Tensor, power: int) -> None:
    """Add ``|gradient| ** power`` to ``total`` of the same shape, overwriting the gradient."""
    if power == 2:
        gradient = gradient.to(total.dtype)  # squares underflow in half precision
        total.addcmul_(gradient, gradient)
    else:
        total.add_(gradient.abs_())


def add_power_sums_(total: Tensor, gradients: Tensor, power: int) -> None:
    """Add the sum of ``|gradients| ** power`` over their first dimension to ``total``, without a copy of them."""
    gradients = gradients.abs() if gradients.is_complex() else gradients
    norms = torch.linalg.vector_norm(gradients, power, dim=0, dtype=total.dtype)
    total.add_(norms) if power == 1 else total.addcmul_(norms, norms)


def _positions_last(tensor: Tensor) -> Tensor:
    """(n, C, *positions) as (n, C, L)."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1], -1)


def _rows(tensor: Tensor) -> Tensor:
    """(n, *positions, features) as (n, L, features)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _linear_power_sum(layer: nn.Linear, x: Tensor, grad: Tensor, power: int, sums: Mapping[str, Tensor]) -> bool:
    weight, bias = sums.get("weight"), sums.get("bias")
    if x.dim() == 2:
        # The per-sample gradient is the outer product of g and x, so |g xᵀ|^p = |g|^p (|x|^p)ᵀ: one matrix product.
        dtype = next(iter(sums.values())).dtype
        grad = raise_to(grad.to(dtype), power)
        if weight is not None:
            rows = len(x) if x.is_cuda else max(32, _IN_CACHE // max(1, x.shape[1]))
            for some_x, some_grad in zip(torch.split(x, rows), torch.split(grad, rows), strict=True):
                weight.addmm_(some_grad.T, raise_to(some_x.to(dtype), power))
        if bias is not None:
            bias.add_(grad.sum(0))
        return True
    if x.is_cuda:
        return False
    x, grad = _rows(x), _rows(grad)
    if weight is not None:  # one sample at a time, so that its gradient is still in the cache when it is added
        for one_x, one_grad in zip(x, grad, strict=True):
            add_powers_(weight, one_grad.T @ one_x, power)
    if bias is not None:
        add_power_sums_(bias, grad.sum(1), power)
    return True


@register_layer_rule(nn.Linear, power_sum=_linear_power_sum)
def linear(layer: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Linear on (n, *, in): the outer products summed over all positions of a sample."""
    x, grad = _rows(x), _rows(grad)
    return {"weight": torch.bmm(grad.transpose(1, 2), x), "bias": grad.sum(1)}


def _convolution_inputs(layer: _ConvNd, x: Tensor) -> tuple[Tensor, list[int]]:
    """Input and padding with which the layer is a zero-padded convolution."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, list(layer.padding)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return padded, [0] * (x.dim() - 2)


def _convolution_weight_gradients(layer: _ConvNd, x: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """One sample at a time by the library's weight-gradient kernel, which is faster than unfolding on CPUs."""
    x, padding = _convolution_inputs(layer, x)
    options = (layer.stride, padding, layer.dilation, layer.transposed, list(layer.output_padding), layer.groups)
    for one_x, one_grad in zip(torch.split(x, 1), torch.split(grad.contiguous(), 1), strict=True):
        yield torch.ops.aten.convolution_backward(one_grad, one_x, layer.weight, None, *options, [False, True, False])[
            1
        ]


def _convolution_power_sum(layer: _ConvNd, x: Tensor, grad: Tensor, power: int, sums: Mapping[str, Tensor]) -> bool:
    if x.is_cuda:  # a loop over samples would starve the device
        return False
    if "weight" in sums:
        for gradient in _convolution_weight_gradients(layer, x, grad):
            add_powers_(sums["weight"], gradient, power)
    if "bias" in sums:
        add_power_sums_(sums["bias"], _positions_last(grad).sum(2), power)
    return True


def batched_weight_gradients(layer: _ConvNd, x: Tensor, grad: Tensor) -> Tensor:
    """Gradients (n, *weight.shape) by one batched product over unfolded windows, which is fast on GPUs.

    For a convolution, windows of its input and the output's gradient; for a transposed one, the other way round.
    """
    dims, n, groups = x.dim() - 2, x.shape[0], layer.groups
    if layer.transposed:
        assert not isinstance(layer.padding, str)
        padding = [width for side in reversed(layer.padding) for width in (side, side)]
        source, values = F.pad(grad, padding), x
    else:
        x, widths = _convolution_inputs(layer, x)
        source, values = F.pad(x, [width for side in reversed(widths) for width in (side, side)]), grad
    for dim in range(dims):
        size, step, gap = layer.kernel_size[dim], layer.stride[dim], layer.dilation[dim]
        source = source.unfold(dim + 2, (size - 1) * gap + 1, step)[..., ::gap]
        source = source.narrow(dim + 2, 0, values.shape[dim + 2])
    source = source.movedim(list(range(2, 2 + dims)), list(range(-dims, 0)))  # (n, C, *kernel, *positions)
    windows = source.reshape(n, groups, -1, values[0, 0].numel())  # (n, groups, C · kernel, L)
    values = values.reshape(n, groups, values.shape[1] // groups, -1)
    return torch.matmul(values, windows.transpose(2, 3)).reshape(n, *layer.weight.shape)


def _convolution_scratch(layer: _ConvNd, x: Tensor, grad: Tensor) -> int:
    if not x.is_cuda:
        return 0
    source, values = (grad, x) if layer.transposed else (x, grad)
    return source.shape[1] * math.prod(layer.kernel_size) * values[0, 0].numel()


@register_layer_rule(
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    power_sum=_convolution_power_sum,
    scratch=_convolution_scratch,
)
def convolution(layer: _ConvNd, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Convolution or transposed convolution with any stride, dilation, groups and padding."""
    if x.is_cuda:
        weight = batched_weight_gradients(layer, x, grad)
    else:
        weight = torch.cat([gradient.unsqueeze(0) for gradient in _convolution_weight_gradients(layer, x, grad)])
    return {"weight": weight, "bias": _positions_last(grad).sum(2)}


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: _BatchNorm, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Batch norm in eval mode: an affine map of the input normalized by the running statistics."""
    assert layer.running_mean is not None  # without running statistics, samples mix and the model is refused
    assert layer.running_var is not None
    x, grad = _positions_last(x), _positions_last(grad)
    centered, scale = x - layer.running_mean[:, None], torch.rsqrt(layer.running_var + layer.eps)
    return {"weight": (centered * grad).sum(2) * scale, "bias": grad.sum(2)}


@register_layer_rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Layer and RMS norm: products with the normalized input, summed over the positions of a sample."""
    shape: tuple[int, ...] = layer.normalized_shape
    normalized = (F.rms_norm if isinstance(layer, nn.RMSNorm) else F.layer_norm)(x, shape, eps=layer.eps)
    terms = {"weight": normalized * grad, "bias": grad}
    return {name: term.reshape(len(x), -1, *shape).sum(1) for name, term in terms.items()}


@register_layer_rule(nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def channel_norm(layer: nn.GroupNorm | _InstanceNorm, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Group and instance norm: as layer norm, over the positions of each channel."""
    if isinstance(layer, nn.GroupNorm):
        normalized = F.group_norm(x, layer.num_groups, eps=layer.eps)
    else:
        mean, var = layer.running_mean, layer.running_var
        normalized = F.instance_norm(x, mean, var, use_input_stats=mean is None, eps=layer.eps)
    return {"weight": _positions_last(normalized * grad).sum(2), "bias": _positions_last(grad).sum(2)}


@register_layer_rule(nn.PReLU)
def prelu(layer: nn.PReLU, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """PReLU with one slope, or one for each channel."""
    products = x.clamp_max(0) * grad
    if layer.num_parameters == 1:
        return {"weight": products.reshape(x.shape[0], -1).sum(1, keepdim=True)}
    return {"weight": _positions_last(products).sum(2)}


def _embedding_power_sum(layer: nn.Embedding, x: Tensor, grad: Tensor, power: int, sums: Mapping[str, Tensor]) -> bool:
    if x.is_cuda or layer.scale_grad_by_freq:  # on a GPU, counting the pairs would synchronize
        return False
    # One row per pair of sample and entry: the sum over the positions with that entry.
    count, width = layer.weight.shape
    entries = x.reshape(x.shape[0], -1)
    if layer.padding_idx is not None:
        grad = grad.masked_fill(x.eq(layer.padding_idx).unsqueeze(-1), 0)
    pairs = entries + count * torch.arange(x.shape[0], device=x.device)[:, None]
    unique, inverse = torch.unique(pairs, return_inverse=True)
    total = sums["weight"]
    rows = total.new_zeros(len(unique), width).index_add_(0, inverse.flatten(), grad.reshape(-1, width).to(total.dtype))
    total.index_add_(0, unique % count, rows.abs_() if power == 1 else rows.square_())
    return True


@register_layer_rule(nn.Embedding, power_sum=_embedding_power_sum)
def embedding(layer: nn.Embedding, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Embedding: gradients added up by entry."""
    if layer.scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq=True has no closed form")
    count, width = layer.weight.shape
    n = x.shape[0]
    index = x.reshape(n, -1, 1).expand(-1, -1, width)
    total = grad.new_zeros(n, count, width).scatter_add_(1, index, grad.reshape(n, -1, width))
    if layer.padding_idx is not None:
        total[:, layer.padding_idx] = 0
    return {"weight": total}
