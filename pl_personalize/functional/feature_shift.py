"""Covariate shift: how a user's features differ from the server's beyond what their class mix explains."""

from __future__ import annotations

import torch
from torch import Tensor

from pl_personalize.functional.discriminant import ClassMoments, Linear


def outside_directions(moments: ClassMoments, count: int) -> Tensor:
    """Directions in which a class mix does not move the mean of the features, each divided by its std.

    Those of greatest within-class variance outside the span of the class means, found by subspace iteration.

    Args:
        moments: The server's moments.
        count: Maximum number of directions.

    Returns:
        (r, d), r ≤ count; the within-class variance of features along each row is 1.
    """
    within, means = moments.within, moments.means - moments.mean
    span = _basis(means)
    count = min(count, len(within) - len(span))
    if count < 1:
        return within.new_zeros(0, len(within))

    def outside(columns: Tensor) -> Tensor:
        return columns - span.T @ (span @ columns)

    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(len(within), min(2 * count, len(within) - len(span)), dtype=within.dtype, generator=generator)
    for _ in range(8):
        columns = torch.linalg.qr(outside(within @ outside(columns)))[0]
    columns = torch.linalg.qr(outside(columns))[0]
    variances, rotation = torch.linalg.eigh(columns.T @ within @ columns)
    order = variances.argsort(descending=True)[:count]
    order = order[variances[order] > 1e-10 * variances.max()]
    return (columns @ rotation[:, order] / variances[order].sqrt()).T


def _basis(rows: Tensor) -> Tensor:
    """An orthonormal basis (r, d) of the span of rows (K, d)."""
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    return right[sizes > 1e-8 * sizes.max()]


def standardized(head: Linear, mean: Tensor, std: Tensor, source_mean: Tensor, source_std: Tensor) -> Linear:
    r"""A head on features standardized to the server's moments, folded into its weight and bias.

    .. math::
        f' = \frac{f - \mathrm{mean}}{\mathrm{std}} \mathrm{std}_\mathrm{source} + \mathrm{mean}_\mathrm{source}

    The ratio of the stds is limited to 0.1 to 10: features that hardly vary, such as those of dead units, say little.

    Args:
        head: The head for f'.
        mean: Mean of the user's features, (d,).
        std: Their standard deviation, (d,).
        source_mean: Mean of the server's features, (d,).
        source_std: Their standard deviation, (d,).
    """
    floor = torch.finfo(std.dtype).tiny
    weight = head.weight * (source_std.clamp_min(floor) / std.clamp_min(floor)).clamp(0.1, 10)
    return Linear(weight, head.bias + head.weight @ source_mean - weight @ mean)
