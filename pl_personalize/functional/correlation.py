"""Correlation of long vectors with many ties, such as importances: Pearson's, and Spearman's of their ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of the ranks that they take together.

    Args:
        values: (…, n) without NaN.

    Returns:
        (…, n) in float64.

    Raises:
        ValueError: If there is a NaN, which has no rank.

    Example:
        >>> average_ranks(torch.tensor([0.0, 5.0, 0.0, 2.0])).tolist()
        [1.5, 4.0, 1.5, 3.0]
    """
    if bool(values.isnan().any()):
        raise ValueError(f"A NaN has no rank; there are {int(values.isnan().sum())} among {values.numel()} values.")
    ranks = torch.empty(values.shape, dtype=torch.float64, device=values.device)
    rows = zip(values.reshape(-1, values.shape[-1]), ranks.view(-1, values.shape[-1]), strict=True)
    for row, found in rows:
        _, group, counts = torch.unique(row, return_inverse=True, return_counts=True)
        found.copy_((counts.cumsum(0) - (counts.double() - 1) / 2)[group])
    return ranks


def pearson_matrix(rows: Tensor) -> Tensor:
    r"""Pearson's correlation of each row with each: :math:`\sum_j \hat x_j \hat y_j` of centred rows of length 1.

    Args:
        rows: (k, n), n ≥ 2.

    Returns:
        (k, k) in float64, in [-1, 1]; NaN where a row is constant, which correlates with nothing.

    Raises:
        ValueError: If the shape is another.

    Example:
        >>> pearson_matrix(torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0], [1.0, 0.0, 1.0]])).round(decimals=3).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if rows.dim() != 2 or rows.shape[1] < 2:
        raise ValueError(f"Correlations need rows of two values or more, (k, n); got the shape {tuple(rows.shape)}.")
    constant = (rows == rows[:, :1]).all(1)
    rows = rows.double()
    centred = rows - rows.mean(1, keepdim=True)
    centred = centred / centred.abs().amax(1, keepdim=True)  # the squares of small importances would vanish
    centred = centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    matrix: Tensor = (centred @ centred.T).clamp_(-1, 1)
    matrix[constant] = matrix[:, constant] = float("nan")
    return matrix


def spearman_matrix(rows: Tensor) -> Tensor:
    """Spearman's correlation of each row with each: Pearson's of their :func:`average_ranks`.

    Args:
        rows: (k, n), n ≥ 2, without NaN.

    Returns:
        As :func:`pearson_matrix`.

    Raises:
        ValueError: If the shape is another, or there is a NaN.

    Example:
        >>> spearman_matrix(torch.tensor([[1.0, 10.0, 100.0], [0.0, 1.0, 2.0]])).round(decimals=3).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    return pearson_matrix(average_ranks(rows))
