"""Linear discriminant analysis from moments that add up over batches, and calibration of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
_SCALES = (1e-3, 1e3)  # of logits; a scale beyond these only says that the classes are (in)separable


class Linear(NamedTuple):
    """A linear map of features: weight (K, d) and bias (K,), both float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, K) of features (n, d)."""
        return features.double() @ self.weight.T + self.bias

    def scaled(self, scale: float, shift: Tensor | float = 0.0) -> Linear:
        """The map whose logits are ``scale`` times these, plus ``shift``."""
        return Linear(self.weight * scale, self.bias * scale + shift)


class ClassMoments(NamedTuple):
    """Sums over samples, which add up over batches and processes; float64.

    Attributes:
        counts: Number of samples of each class, (K,).
        sums: Sum of the features of each class, (K, d).
        squares: Sum of the outer products of all features, (d, d).
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int, *, squares: bool = True) -> ClassMoments:
        """Moments of features (n, d) with labels (n,) from 0 to K - 1, with or without ``squares``.

        Example:
            >>> ClassMoments.of(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 2).means[0]
            tensor([2.], dtype=torch.float64)
        """
        features = features.double()
        one_hot = F.one_hot(labels, num_classes).double()
        outer = features.T @ features if squares else features.new_zeros(0, 0)
        return cls(one_hot.sum(0), one_hot.T @ features, outer)

    def plus(self, other: ClassMoments) -> ClassMoments:
        """Moments of both sets of samples."""
        return ClassMoments(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: ClassMoments) -> ClassMoments:
        """Moments without those samples."""
        return ClassMoments(*(a - b for a, b in zip(self, other, strict=True)))

    @property
    def priors(self) -> Tensor:
        """Relative frequencies of the classes, (K,)."""
        return self.counts / self.counts.sum()

    @property
    def means(self) -> Tensor:
        """Class means, (K, d)."""
        return self.sums / self.counts[:, None]

    @property
    def mean(self) -> Tensor:
        """Mean of all samples, (d,)."""
        return self.sums.sum(0) / self.counts.sum()

    @property
    def within(self) -> Tensor:
        """Pooled within-class covariance, (d, d), divided by n."""
        return (self.squares - self.sums.T @ self.means) / self.counts.sum()


def linear_discriminant(moments: ClassMoments, shrinkage: float) -> Linear | None:
    r"""The classifier of linear discriminant analysis, with the covariance shrunk to a multiple of the identity.

    .. math::
        S_a = (1 - a) S + a \frac{\operatorname{tr} S}{d} I, \qquad
        w_k = S_a^{-1} \mu_k, \qquad b_k = -\tfrac12 \mu_k^\top S_a^{-1} \mu_k + \log \pi_k

    (Ledoit and Wolf, 2004; scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a)``.)

    Args:
        moments: Moments in which every class has samples.
        shrinkage: a, from 0 to 1.

    Returns:
        The classifier, or ``None`` if the shrunk covariance is singular to working precision.
    """
    within, center = moments.within, moments.mean
    means = moments.means - center  # small products; the logits of all classes change by the same constant
    covariance = (1 - shrinkage) * within
    covariance.diagonal().add_(shrinkage * within.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(covariance)
    smallest, largest = factor.diagonal().aminmax()
    if failed or not smallest > 1e-7 * largest:
        return None
    weight = torch.cholesky_solve(means.T, factor).T
    bias = moments.priors.log() - 0.5 * (weight * means).sum(1) - weight @ center
    return Linear(weight, bias)


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with one in n + 1 labels spread over the classes, so that no finite sample is separable.

    Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    return F.cross_entropy(logits, labels, label_smoothing=1 / (len(labels) + 1))


def best_scale(logits: Tensor, labels: Tensor) -> float:
    """The factor of the logits with the least negative log-likelihood: the inverse temperature (Guo et al., ICML 2017).

    The likelihood, of slightly smoothed labels, is unimodal in the factor, which is searched from 0.001 to 1000.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4000, 1)
        >>> labels = (torch.arange(4000) % 4 == 0).long()
        >>> round(best_scale(logits, labels), 2), round(torch.tensor(3.0).log().item(), 2)
        (1.1, 1.1)
    """
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in _SCALES)
    golden = (5**0.5 - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    values = [float(smoothed_loss(logits * at.exp(), labels)) for at in (left, right)]
    for _ in range(60):
        if values[0] <= values[1]:
            high, right, values[1] = right, left, values[0]
            left = high - golden * (high - low)
            values[0] = float(smoothed_loss(logits * left.exp(), labels))
        else:
            low, left, values[0] = left, right, values[1]
            right = low + golden * (high - low)
            values[1] = float(smoothed_loss(logits * right.exp(), labels))
    return float(((low + high) / 2).exp())


def combined(parts: Sequence[Linear], factors: Sequence[float]) -> Linear:
    """The weighted sum of linear maps."""
    weight, bias = (
        torch.stack([factor * tensor for factor, tensor in zip(factors, tensors, strict=True)]).sum(0)
        for tensors in zip(*parts, strict=True)
    )
    return Linear(weight, bias)


def best_factors(candidates: Sequence[Tensor], labels: Tensor) -> list[float]:
    """The factors of one or several logits (n, K) whose sum has the least negative log-likelihood."""
    if len(candidates) == 1:
        return [best_scale(candidates[0], labels)]
    return _fitted(candidates, labels, None)[0]


def calibration(logits: Tensor, labels: Tensor, strength: float = 5.0) -> tuple[float, Tensor]:
    r"""Bias-corrected temperature scaling: a factor s and a bias b of logits z, which make them calibrated.

    Minimizes the mean negative log-likelihood of :math:`s z + b` plus :math:`\mathrm{strength} / n \cdot |b|^2`
    (Alexandari et al., ICML 2020; the penalty keeps the bias small where there are few samples).

    Args:
        logits: z, (n, K), float64.
        labels: Labels, (n,).
        strength: Strength of the penalty.

    Returns:
        s, and b (K,).
    """
    (factor,), bias = _fitted([logits], labels, strength)
    return factor, bias - bias.mean()


def _fitted(candidates: Sequence[Tensor], labels: Tensor, strength: float | None) -> tuple[list[float], Tensor]:
    """Factors, and a bias unless ``strength`` is ``None``, by a quasi-Newton method from the separate best scales."""
    stacked = torch.stack(list(candidates))
    starts = torch.tensor([best_scale(logits, labels) for logits in candidates], dtype=stacked.dtype)
    factors = torch.ones_like(starts).div_(len(starts)).requires_grad_()  # relative to the starts
    bias = torch.zeros(stacked.shape[2], dtype=stacked.dtype, requires_grad=strength is not None)
    parameters = [factors] if strength is None else [factors, bias]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = smoothed_loss(torch.einsum("j,jnk->nk", factors * starts, stacked) + bias, labels)
        value = value + (strength or 0.0) / len(labels) * bias.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (factors * starts).tolist(), bias.detach()
