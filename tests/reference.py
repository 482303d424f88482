"""Naive references that tests compare with: one sample at a time, one parameter at a time, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def naive_importance(
    model: nn.Module,
    samples: Sequence[Tensor],
    kind: str,
    labels: Tensor | None = None,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mean over samples of |grad of the squared output norm|, or of the squared gradient of -log p(label)."""
    model = model.eval()
    forward = forward or (lambda model, x: model(x))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for i, sample in enumerate(samples):
        logits = forward(model, sample.unsqueeze(0))
        if kind == "mas":
            objectives = [(logits.square().sum(), 1.0)]
        elif kind == "expected_fisher":
            chances = logits.softmax(1).detach()[0]
            objectives = [(-logits.log_softmax(1)[0, c], float(chances[c])) for c in range(logits.shape[1])]
        else:
            objectives = [(-logits.log_softmax(1)[0, labels[i]], 1.0)]
        for objective, weight in objectives:
            gradients = torch.autograd.grad(
                objective, list(parameters.values()), allow_unused=True, retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                value = gradient.double()
                total[name] += weight * (value.abs() if kind == "mas" else value.square())
    return {name: value / len(samples) for name, value in total.items()}


def relative_error(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest relative error in norm over the parameters; names must agree."""
    assert set(values) == set(reference), set(values) ^ set(reference)
    errors = [
        float((values[name].double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))
        for name, right in reference.items()
    ]
    return max(errors)
