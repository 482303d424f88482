"""Naive references that tests compare with: one sample at a time, one parameter at a time, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

KINDS = {
    "mas": ("mas", {}),
    "fisher": ("expected_fisher", {"draws": "all"}),
    "empirical_fisher": ("empirical_fisher", {}),
}
"""By kind of importance: that of :func:`naive_importance` which it equals, and with which options."""


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


def naive_batch_importance(
    model: nn.Module, batches: Sequence[Tensor], kind: str, labels: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The published code's estimates, protocol 4.1 and 4.2: (1/B) Σ_b |g_b / N_b|, or 1e-8 + (1/B) Σ_b g_b².

    ``labels``: for each batch those of the negative log-likelihood, drawn or true.
    """
    model = model.eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for b, batch in enumerate(batches):
        logits = model(batch)
        if kind == "mas":
            objective = sum(logits[i, c] ** 2 for i in range(len(batch)) for c in range(logits.shape[1])) / len(batch)
        else:
            chances = logits.softmax(1)
            objective = sum(-chances[i, labels[b][i]].log() for i in range(len(batch))) / len(batch)
        for name, gradient in zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True):
            total[name] += gradient.double().abs() if kind == "mas" else gradient.double() ** 2
    floor = 1e-8 if kind == "fisher" else 0.0
    return {name: floor + value / len(batches) for name, value in total.items()}


def naive_merge(
    parameters: Sequence[Tensor],
    importances: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    zero: str = "mean",
) -> Tensor:
    """Σ w Ω θ / Σ w Ω for one parameter, entry by entry in Python's floats."""
    weights = list(weights or [1.0] * len(parameters))
    thetas = [p.double().flatten().tolist() for p in parameters]
    omegas = (
        [[1.0] * len(thetas[0])] * len(thetas) if importances is None else [i.flatten().tolist() for i in importances]
    )
    merged = []
    for entry in range(len(thetas[0])):
        shares = [w * omega[entry] for w, omega in zip(weights, omegas, strict=True)]
        values = [theta[entry] for theta in thetas]
        if sum(shares) == 0:
            shares = weights
            values = values if zero == "mean" else [0.0] * len(values)
        merged.append(sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares))
    return torch.tensor(merged, dtype=torch.float64).view(parameters[0].shape)
