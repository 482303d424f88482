"""Multi-head attention with projections as layers; ``nn.MultiheadAttention`` computes them out of sight of hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention:
    """Replacement of an attention's ``forward`` that computes batched self-attention by layers, its ``projections``."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        self._layer = layer
        self.projections = (
            _linear(layer.in_proj_weight, layer.in_proj_bias),
            _linear(layer.out_proj.weight, layer.out_proj.bias),
        )

    def attach(
        self, is_recording: Callable[[], bool], on_other_use: Callable[[nn.Module], None] = lambda projection: None
    ) -> None:
        """Compute by layers whenever ``is_recording()``; where impossible, pass them to ``on_other_use``."""
        self._is_recording, self._on_other_use = is_recording, on_other_use
        self._layer.forward = self._forward  # type: ignore[method-assign]

    def detach(self) -> None:
        """Restore the attention."""
        vars(self._layer).pop("forward", None)

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        layer = self._layer
        plain = query is key and key is value and query.dim() == 3
        if not plain or not self._is_recording():
            for projection in self.projections if self._is_recording() else ():
                self._on_other_use(projection)
            return type(layer).forward(
                layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        x = query if layer.batch_first else query.transpose(0, 1)
        n, length, width = x.shape
        into, out = self.projections
        heads = into(x).reshape(n, length, 3, layer.num_heads, width // layer.num_heads).permute(2, 0, 3, 1, 4)
        masks = []
        if attn_mask is not None:  # (T, T), or (n · heads, T, T)
            added = _added(attn_mask, x.dtype)
            masks.append(added if added.dim() == 2 else added.view(n, layer.num_heads, length, length))
        if key_padding_mask is not None:
            masks.append(_added(key_padding_mask, x.dtype)[:, None, None])
        mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-2, -1) / heads.shape[-1] ** 0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            attended = weights @ heads[2]
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask)
        result = out(attended.transpose(1, 2).reshape(n, length, width))
        return (result if layer.batch_first else result.transpose(0, 1)), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a summand of the scores; in a boolean mask, True means masked out."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def split_attention(layer: nn.Module) -> SplitAttention | None:
    """The attention by layers, or ``None`` for other modules and for subclasses with their own forward."""
    is_plain = (
        isinstance(layer, nn.MultiheadAttention)
        and type(layer).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(layer)
        and layer.in_proj_weight is not None
        and layer.bias_k is None
        and not layer.add_zero_attn
        and isinstance(layer._parameters.get("in_proj_weight"), nn.Parameter)
    )
    return SplitAttention(layer) if is_plain else None  # type: ignore[arg-type]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that shares the given parameters."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.register_parameter("weight", weight)  # type: ignore[arg-type]
    layer.register_parameter("bias", bias)  # type: ignore[arg-type]
    return layer
