"""Objectives of importances, as gradients with respect to the logits.

Probabilities and their distances to 1 are computed in at least float32 and keep their relative precision. Results have
the logits' type.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of ignored positions, as in :func:`torch.nn.functional.cross_entropy`."""


def mas_cotangent(logits: Tensor) -> Tensor:
    r"""Gradient (n, \*) of :math:`\|f(x)\|_2^2` with respect to the logits: ``2 * logits``.

    Aljundi et al., ECCV 2018, "Memory Aware Synapses", equation 2 with the squared norm.
    """
    return 2 * logits


def label_cotangent(logits: Tensor, labels: Tensor, *, may_ignore: bool = False) -> Tensor:
    r"""Gradient of :math:`-\log p(y | x)`, summed over the positions of a sample, with respect to the logits.

    It is ``softmax(logits) - onehot(labels)``, (n, classes, \*), for integer labels (n, \*). Positions labelled
    ``IGNORE_INDEX`` are ignored if ``may_ignore``, otherwise out of range.

    Raises:
        ValueError: If the labels are not integers, not one per position, or out of range.
    """
    shape = (logits.shape[0], *logits.shape[2:])
    if labels.shape != shape or labels.is_floating_point() or labels.is_complex():
        each = f"one for each of {shape[0]} samples" + (f" and its positions, {shape}" if len(shape) > 1 else "")
        raise ValueError(
            f"The labels must be integers, {each}; they are {labels.dtype} of shape {tuple(labels.shape)}."
        )
    labels = labels.long()
    ignored = labels == IGNORE_INDEX if may_ignore else torch.zeros_like(labels, dtype=torch.bool)
    counted = labels[~ignored]
    if counted.numel() and not (counted.min() >= 0 and counted.max() < logits.shape[1]):
        found = f"{int(counted.min())} to {int(counted.max())}"
        raise ValueError(f"The labels must be in 0..{logits.shape[1] - 1}; they range from {found}.")
    score = _less_one(_probabilities(logits), labels.masked_fill(ignored, 0))
    return score.masked_fill_(ignored.unsqueeze(1), 0).to(logits.dtype)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _less_one(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (n, classes, *) minus 1 at each label (n, *), as minus the sum of the others for precision."""
    index = labels.unsqueeze(1)
    others = probabilities.scatter(1, index, 0)
    return others.scatter_(1, index, -others.sum(1, keepdim=True))


def draw_labels(probabilities: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Draw labels (n, *, draws) from probabilities (n, classes, *), independently at each position."""
    rows = probabilities.movedim(1, -1)
    moved = rows.reshape(-1, rows.shape[-1]).to(rows.device if generator is None else generator.device)
    labels = torch.multinomial(moved, draws, replacement=True, generator=generator)
    return labels.to(probabilities.device).reshape(*rows.shape[:-1], draws)


def fisher_cotangents(logits: Tensor, draws: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """One cotangent (n, classes, *) per draw of labels; the squares of their gradients sum to the mean over draws."""
    probabilities = _probabilities(logits)
    labels = draw_labels(probabilities, draws, generator)
    for k in range(draws):
        yield (_less_one(probabilities, labels[..., k]) / draws**0.5).to(logits.dtype)


def expected_fisher_cotangents(logits: Tensor) -> Iterator[Tensor]:
    r"""One cotangent per class; the squares of their gradients sum to the expectation under the softmax.

    Labels of several positions are independent, with scores of mean 0, so the expected square of the sum of scores is
    the sum over positions of expected squares: one cotangent (n, classes, \*) per position and class ``c``, the
    gradient of :math:`-\log p(c | x)` there times :math:`\sqrt{p(c | x)}`.
    """
    probabilities = _probabilities(logits).flatten(2) if logits.dim() > 2 else _probabilities(logits).unsqueeze(2)
    for position in range(probabilities.shape[2]):
        here = probabilities[:, :, position]
        for c in range(here.shape[1]):
            score = _less_one(here, here.new_full((len(here),), c, dtype=torch.long)) * here[:, c : c + 1].sqrt()
            if logits.dim() > 2:
                everywhere = torch.zeros_like(probabilities)
                everywhere[:, :, position] = score
                score = everywhere.view(logits.shape)
            yield score.to(logits.dtype)
