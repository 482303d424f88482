"""Powers of the gradient of each batch's mean: the estimates of the published code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from pl_personalize.functional.batches import Forward, as_logits, check_logits
from pl_personalize.per_sample.gradient_tape import NO_GRADIENT, sum_type
from pl_personalize.per_sample.layer_rules import raise_to
from pl_personalize.per_sample.module_state import ForwardState, evaluating
from pl_personalize.per_sample.norm_calls import right_norm_gradients


class BatchPowerSums(ExitStack):
    r"""Accumulates :math:`|\partial \frac1n \sum_i \langle c_i, f(x_i) \rangle / \partial \theta|^p` over batches.

    Counterpart of :class:`~pl_personalize.per_sample.power_sums.PerSamplePowerSums` (De Lange et al., CVPR 2020).
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, power: int, forward: Forward
    ) -> None:
        super().__init__()
        self._model, self._parameters, self._power, self._forward = model, list(parameters.values()), power, forward
        self.sums = {name: torch.zeros_like(p, dtype=sum_type(p)) for name, p in parameters.items()}
        self.reached: set[str] = set()
        self.routes = dict.fromkeys(parameters, "batch")

    def __enter__(self) -> Self:
        self.enter_context(evaluating(self._model))
        self.enter_context(right_norm_gradients())
        self._state = ForwardState(self._model)
        return self

    def add(self, batch: Any, num_samples: int, cotangents: Callable[[Tensor], Iterable[Tensor]]) -> None:
        """Add the powers of one batch's gradient."""
        logits = as_logits(self._forward(self._model, batch))
        check_logits(logits, num_samples)
        if not logits.requires_grad:
            raise ValueError(NO_GRADIENT)
        directions = list(cotangents(logits.detach()))
        for k, direction in enumerate(directions, start=1):
            gradients = torch.autograd.grad(
                logits, self._parameters, direction / num_samples, k < len(directions), allow_unused=True
            )
            for (name, total), gradient in zip(self.sums.items(), gradients, strict=True):
                if gradient is not None:  # squared in the precision of the sum
                    total.add_(raise_to(gradient.abs().to(total.dtype), self._power))
                    self.reached.add(name)
        self._state.put_back()
