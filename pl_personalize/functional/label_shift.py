"""Label shift: class priors estimated from unlabelled samples."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 1e-6


def em_priors(
    logits: Tensor, source: Tensor, *, alpha: float = 0.0, scale: float = 1.0, max_iter: int = 1000, tol: float = 1e-7
) -> Tensor:
    r"""Class priors of unlabelled samples by expectation maximization.

    .. math::
        r_{ik} \propto \frac{q_k}{\pi_k} p(k \mid x_i), \qquad q_k \propto \alpha K \pi_k + \sum_i r_{ik}

    (Saerens, Latinne and Decaestecker, Neural Computation 2002; with :math:`\alpha > 0`, the mode under a Dirichlet
    prior around π, for few samples.)

    Args:
        logits: Calibrated logits under the source's priors, (n, K) or several sets (…, n, K).
        source: The source's class priors π, (K,), positive.
        alpha: Pseudo-counts of a class, on average over classes.
        scale: Factor of the log-likelihoods; above 1, the assignments are harder.
        max_iter: Maximum number of iterations.
        tol: Largest change of a prior at which the iteration ends.

    Returns:
        q, (…, K), which sums to 1.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0]] * 3 + [[0.0, 9.0]], dtype=torch.float64)
        >>> em_priors(logits, torch.tensor([0.5, 0.5], dtype=torch.float64)).round(decimals=3)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    likelihoods = scale * (logits - source.log())
    priors, pseudo_counts = source.expand(*logits.shape[:-2], -1), alpha * len(source) * source
    for _ in range(max_iter):
        counts = (likelihoods + priors.clamp_min(_SMALLEST).log().unsqueeze(-2)).softmax(-1).sum(-2) + pseudo_counts
        before, priors = priors, counts / counts.sum(-1, keepdim=True)
        if (priors - before).abs().max() < tol:
            break
    return priors


def confusion(logits: Tensor, labels: Tensor, source: Tensor) -> Tensor:
    """Mean predicted probabilities (K, K) of labelled samples of each class, row by class.

    The row of a class without samples is ``source``, (K,), which tells nothing of it.
    """
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[1]).double()
    counts = one_hot.sum(0)[:, None]
    return torch.where(counts > 0, (one_hot.T @ logits.softmax(1)) / counts.clamp_min(1), source)


def bbse_priors(predicted: Tensor, confusion: Tensor, source: Tensor, *, strength: float = 0.0) -> Tensor:
    r"""Class priors by black-box shift estimation, which needs no calibrated classifier.

    Solves :math:`\min_q |C^\top q - \bar p|^2 + \mathrm{strength} \cdot |q - \pi|^2` and clips negative entries (Lipton
    et al., ICML 2018, with predicted probabilities in place of predicted classes; regularized: Azizzadenesheli et al.,
    ICLR 2019).

    Args:
        predicted: Mean predicted probabilities of the unlabelled samples, (K,) or of several sets (…, K).
        confusion: Those of the source's samples of each class, (K, K), row by class; see :func:`confusion`.
        source: The source's class priors π, (K,).
        strength: Strength of the regularization; 0 for plain BBSE.

    Returns:
        q, (…, K), which sums to 1.

    Example:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> matrix = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        >>> bbse_priors(matrix.T @ torch.tensor([0.7, 0.3], dtype=torch.float64), matrix, half)
        tensor([0.7000, 0.3000], dtype=torch.float64)
    """
    normal = confusion @ confusion.T + strength * torch.eye(len(source), dtype=confusion.dtype)
    right = (predicted - source @ confusion) @ confusion.T
    solution = torch.linalg.lstsq(normal, right.reshape(-1, len(source)).T).solution.T
    priors = (source + solution.view_as(predicted)).clamp_min(_SMALLEST)
    found: Tensor = priors / priors.sum(-1, keepdim=True)
    return found


def label_shift_evidence(logits: Tensor, source: Tensor, priors: Tensor) -> Tensor:
    r"""Twice the log-likelihood ratio of two class priors, in nats.

    .. math::
        \Lambda = 2 \sum_i \log \sum_k p(k \mid x_i) \frac{q_k}{\pi_k}

    Args:
        logits: Calibrated logits under the source's priors, (…, n, K).
        source: π, (K,).
        priors: q, (…, K).

    Returns:
        Λ, (…).
    """
    ratio = (priors.clamp_min(_SMALLEST) / source).log().unsqueeze(-2)
    return 2 * (logits.log_softmax(-1) + ratio).logsumexp(-1).sum(-1)
