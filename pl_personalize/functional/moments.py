"""Moments of the channels of batch-norm inputs, and the statistics computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MEAN, VARIANCE = "running_mean", "running_var"


def channel_moments(x: Tensor) -> Tensor:
    r"""Count, sum and sum of squares (3, C) of each channel of (N, C) or (N, C, \*), which add up over batches.

    They are float64, or float32 on devices without it.

    Example:
        >>> channel_moments(torch.tensor([[3.0, 0.0], [4.0, 2.0]])).tolist()
        [[2.0, 2.0], [7.0, 2.0], [25.0, 4.0]]
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    others = [dim for dim in range(x.dim()) if dim != 1]
    total = x.sum(others, dtype=dtype)
    squares = torch.linalg.vector_norm(x, dim=others, dtype=dtype).square()
    return torch.stack([torch.full_like(total, x.numel() // max(1, x.shape[1])), total, squares])


def mean_and_variance(moments: Tensor, *, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (C,), from moments (3, C).

    The unbiased variance, as in running statistics, divides by n - 1; the other, by n, as in normalization by a batch.
    A single value has variance 0.

    Example:
        >>> mean, variance = mean_and_variance(channel_moments(torch.tensor([[3.0], [4.0]])), unbiased=True)
        >>> mean.item(), variance.item()
        (3.5, 0.5)
    """
    count, total, squares = moments
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    return mean, variance * (count / (count - 1).clamp_min(1)) if unbiased else variance


def pooled_statistics(
    means: Sequence[Tensor], variances: Sequence[Tensor], weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture of sources, each (C,).

    The variance includes the variance between the sources' means. ``weights`` are equal by default.

    Example:
        >>> mean, variance = pooled_statistics([torch.tensor([0.0]), torch.tensor([2.0])], [torch.ones(1)] * 2)
        >>> mean.item(), variance.item()
        (1.0, 2.0)
    """
    stacked = torch.stack([mean.double() for mean in means])
    share = stacked.new_tensor([1.0] * len(means) if weights is None else list(weights))[:, None]
    share = share / share.sum()
    mean = (share * stacked).sum(0)
    within = (share * torch.stack([variance.double() for variance in variances])).sum(0)
    between = (share * (stacked - mean).square()).sum(0)
    return mean.to(means[0].dtype), (within + between).to(variances[0].dtype)


def in_precision_of(other: Tensor, value: Tensor, what: str) -> Tensor:
    """A statistic in the type and on the device of another tensor.

    Values too small for the type become 0, which is harmless: a layer adds its ``eps`` to a variance. Messages call the
    statistic ``what``.

    Raises:
        ValueError: If a finite entry is too large for the type.

    Example:
        >>> in_precision_of(torch.zeros(1, dtype=torch.float16), torch.tensor([70000.0]), "running_var of 'bn'")
        Traceback (most recent call last):
        ...
        ValueError: The running_var of 'bn' reaches 70000, and float16 holds no more than 65504. ...
    """
    rounded = value.to(other)
    lost = value.isfinite() & ~rounded.isfinite()
    if lost.any():
        kind = str(other.dtype).removeprefix("torch.")
        raise ValueError(
            f"The {what} reaches {float(value[lost].abs().max()):.6g}, and {kind} holds no more than "
            f"{torch.finfo(other.dtype).max:.5g}. Keep the layer in float32 (layer.float(); its inputs may stay in "
            f"{kind}), or scale its inputs down."
        )
    return rounded
