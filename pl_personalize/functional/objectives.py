"""The objectives whose gradients make importances, as gradients with respect to the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def mas_cotangent(logits: Tensor) -> Tensor:
    r"""Gradient of :math:`\|f(x)\|_2^2` with respect to the logits.

    Args:
        logits: (n, *).

    Returns:
        ``2 * logits``, (n, *). Aljundi et al., ECCV 2018, "Memory Aware Synapses", equation 2 with the squared norm.
    """
    return 2 * logits


def label_cotangent(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient of :math:`-\log p(y | x)` with respect to the logits.

    Args:
        logits: (n, classes).
        labels: (n,), integers.

    Returns:
        ``softmax(logits) - onehot(labels)``, (n, classes).

    Raises:
        ValueError: If the labels are no integers, or not one for each row, or out of range.
    """
    if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"The labels must be integers, one for each of {logits.shape[0]} samples; they are {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if labels.numel() and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"The labels must be in 0..{logits.shape[1] - 1}; they go from {found}.")
    return _less_one(logits.softmax(1), labels.long())


def _less_one(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (n, classes) less 1 at each label (n,)."""
    return probabilities.scatter_add(1, labels.unsqueeze(1), probabilities.new_full((len(labels), 1), -1))


def sample_labels(logits: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Draw labels from the model's own softmax.

    Args:
        logits: (n, classes).
        draws: Number of independent draws.
        generator: Source of randomness; drawn on its device.

    Returns:
        (n, draws), on the logits' device.
    """
    return _draw(logits.softmax(1), draws, generator)


def _draw(probabilities: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    moved = probabilities if generator is None else probabilities.to(generator.device)
    return torch.multinomial(moved, draws, replacement=True, generator=generator).to(probabilities.device)


def fisher_cotangents(logits: Tensor, draws: int, generator: torch.Generator | None) -> list[Tensor]:
    """One direction per draw; the squares of their gradients sum to the mean over draws.

    Args:
        logits: (n, classes).
        draws: Number of labels drawn for each sample.
        generator: Source of randomness.

    Returns:
        ``draws`` tensors (n, classes).
    """
    probabilities = logits.softmax(1)
    labels = _draw(probabilities, draws, generator)
    return [_less_one(probabilities, labels[:, k]) / draws**0.5 for k in range(draws)]


def expected_fisher_cotangents(logits: Tensor) -> Iterator[Tensor]:
    r"""One direction per class, in turn; the squares of their gradients sum to the expectation under the softmax.

    Args:
        logits: (n, classes).

    Yields:
        For each class ``c``, the gradient of :math:`-\log p(c | x)` times :math:`\sqrt{p(c | x)}`, (n, classes).
    """
    probabilities = logits.softmax(1)
    for c in range(logits.shape[1]):
        direction = probabilities.clone()
        direction[:, c] -= 1
        yield direction.mul_(probabilities[:, c : c + 1].sqrt())
