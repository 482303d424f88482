"""Covariate shift: how a user's features differ from the server's beyond what their class mix explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pl_personalize.functional.discriminant import Linear


def outside_directions(within: Tensor, span: Tensor, count: int) -> Tensor:
    """Directions of greatest within-class variance outside a span, found by subspace iteration.

    Args:
        within: Within-class covariance, (d, d).
        span: Orthonormal basis, (s, d).
        count: Maximum number of directions.

    Returns:
        (r, d), r ≤ count: orthogonal rows along which the within-class variance is 1.
    """
    room = len(within) - len(span)
    if min(count, room) < 1:
        return within.new_zeros(0, len(within))

    def outside(columns: Tensor) -> Tensor:
        return columns - span.T @ (span @ columns)

    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(len(within), min(2 * count, room), dtype=within.dtype, generator=generator)
    for _ in range(8):
        columns = torch.linalg.qr(outside(within @ outside(columns)))[0]
    columns = torch.linalg.qr(outside(columns))[0]
    variances, rotation = torch.linalg.eigh(columns.T @ within @ columns)
    order = variances.argsort(descending=True)[: min(count, room)]
    order = order[variances[order] > 1e-10 * variances.max()]
    rows: Tensor = (columns @ rotation[:, order] / variances[order].sqrt()).T
    return rows


def covariate_statistic(scores: Tensor, std: Tensor, count: float) -> Tensor:
    """The statistic of covariate shift: the squared mean score in each direction, relative to its variance, summed.

    Args:
        scores: Scores of samples in each direction, relative to the server's mean, (…, n, r).
        std: Standard deviation of the server's scores, (r,). The samples' own counts where it is larger.
        count: Effective number of samples.
    """
    mean = scores.mean(-2)
    own = (scores - mean.unsqueeze(-2)).square().mean(-2).sqrt()
    return count * (mean / own.maximum(std).clamp_min(1e-12)).square().sum(-1)


def nearest_centers(points: Tensor, count: int, iterations: int = 30) -> Tensor:
    """The cluster (n,) of each point (n, d), by k-means (Lloyd, 1982) from the centers of k-means++."""
    generator = torch.Generator().manual_seed(0)
    centers = points[:1]
    for _ in range(min(count, len(points)) - 1):
        distances = torch.cdist(points, centers).amin(1).square() + 1e-12
        centers = torch.cat([centers, points[torch.multinomial(distances, 1, generator=generator)]])
    for _ in range(iterations):
        one_hot = torch.nn.functional.one_hot(torch.cdist(points, centers).argmin(1), len(centers)).to(points)
        sizes = one_hot.sum(0)[:, None]
        centers = torch.where(sizes > 0, one_hot.T @ points / sizes.clamp_min(1), centers)
    return torch.cdist(points, centers).argmin(1)


def span_basis(rows: Tensor) -> Tensor:
    """An orthonormal basis (r, d) of the span of rows (K, d)."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = right[sizes > 1e-8 * sizes.max()]
    return basis


def standardized(head: Linear, mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> Linear:
    r"""A head on features standardized to the server's moments, folded into its weight and bias.

    .. math::
        f' = \frac{f - \mathrm{mean}}{\mathrm{std}} \mathrm{std}_\mathrm{source} + \mathrm{mean}_\mathrm{source}

    The ratio of the stds is limited to 0.1 to 10, and is 1 for features that do not vary, as with a single image.

    Args:
        head: The head for f'.
        mean: Mean of the user's features, (d,).
        std: Their standard deviation, (d,).
        source_mean: Mean of the server's features, (d,).
        source_std: Their standard deviation, (d,).
    """
    varies = std > 1e-3 * source_std
    ratio = (source_std / std.where(varies, torch.ones_like(std))).clamp(0.1, 10)
    weight = head.weight * ratio.where(varies, torch.ones_like(ratio))
    return Linear(weight, head.bias + head.weight @ source_mean - weight @ mean)


class CameraShifts(NamedTuple):
    """How the features of the same samples move from the server's camera to others.

    Attributes:
        shifts: Difference of the means, (M, d).
        log_ratios: Logarithm of the ratio of the stds, (M, d).
    """

    shifts: Tensor
    log_ratios: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Sequence[Tensor]) -> CameraShifts:
        """From features (n, d) of samples, and those of the same samples for each camera."""
        mean, std = before.mean(0), before.std(0, correction=0)
        floor = 1e-6 + 1e-3 * std.max()
        shifts = torch.stack([features.mean(0) - mean for features in after])
        stds = torch.stack([features.std(0, correction=0) for features in after])
        return cls(shifts, (stds.clamp_min(floor) / std.clamp_min(floor)).log().clamp(-3, 3))

    def select(self, index: Tensor) -> CameraShifts:
        """Some of the cameras."""
        return CameraShifts(self.shifts[index], self.log_ratios[index])

    def outside(self, difference: Tensor, span: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The shifts (M, d) and a difference (d,) outside the span (r, d) of the class means, in units of ``std``."""
        floor = std.clamp_min(1e-6 + 1e-3 * std.max())
        both = torch.cat([self.shifts, difference[None]])
        both = (both - both @ span.T @ span) / floor
        return both[:-1], both[-1]

    def predict(self, difference: Tensor, span: Tensor, std: Tensor, strength: float = 0.03) -> tuple[Tensor, Tensor]:
        r"""The shift and the ratio of the stds, each (d,), of which only the part outside the span was seen.

        A class mix does not move the mean of features outside the span of the class means, so that part of the
        difference between a user's mean and the server's tells the camera. It is regressed on the cameras, by ridge
        regression of relative strength; the same combination of cameras predicts the rest.

        Args:
            difference: The user's mean less the server's, (d,).
            span: Orthonormal basis of the span of the class means, (r, d).
            std: Standard deviation of the server's features, (d,).
            strength: Strength of the ridge, relative to the mean squared size of a camera's shift.
        """
        shifts, seen = self.outside(difference, span, std)
        gram = shifts @ shifts.T
        gram.diagonal().add_(strength * gram.diagonal().mean() + 1e-12)
        weights = torch.linalg.solve(gram, shifts @ seen)
        return weights @ self.shifts, (weights @ self.log_ratios).clamp(-1.5, 1.5).exp()
