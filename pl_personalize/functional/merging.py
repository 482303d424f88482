"""Importance-weighted averages of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Zero = Literal["mean", "reference"]


def check_importance(name: str, value: Tensor) -> None:
    """Refuse what no importance can be.

    Raises:
        ValueError: If an entry is NaN, infinite or negative.
    """
    if value.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(value.detach()))
    if not (low >= 0 and high < float("inf")):
        what = "NaN" if low != low or high != high else ("a negative entry" if low < 0 else "an infinite entry")
        raise ValueError(f"The importance of {name!r} has {what}; importances are finite and not negative.")


def prefix_merges(
    parameters: Sequence[Tensor],
    importances: Sequence[Tensor] | None,
    weights: Sequence[float],
    zero: Zero = "mean",
    *,
    start: int = 0,
) -> Iterator[Tensor]:
    r"""One parameter of the merges of experts 1, 1..2, …, 1..T.

    .. math::
        \theta_t = \sum_{k \le t} \frac{w_k \Omega_k}{\sum_{j \le t} w_j \Omega_j} \theta_k

    De Lange et al., CVPR 2020 (IMM mode merging: Lee et al., NeurIPS 2017, equation 8). The first is expert 1 as it is.

    Args:
        parameters: The parameter in each expert; read once, and again only where an entry has no importance.
        importances: Its importance in each expert, or ``None`` for the weighted mean.
        weights: One positive factor for each expert.
        zero: What an entry becomes whose importances sum to zero: the weighted ``"mean"`` of the experts, or 0 as in
            the published code (``"reference"``).
        start: Yield from this merge on (0: from expert 1 itself).

    Yields:
        T - ``start`` tensors of the parameter's shape, each new, in the parameter's type.
    """
    numerator: Tensor | None = None
    denominator: Tensor | None = None
    for k in range(len(parameters)):
        parameter = parameters[k]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        weight = torch.full((), weights[k], dtype=dtype, device=parameter.device)
        share = weight if importances is None else importances[k].to(parameter.device, dtype) * weight
        if numerator is None or denominator is None:
            numerator, denominator = parameter.to(dtype) * share, share.clone()
            if start == 0:
                yield parameter.clone()
            continue
        numerator.addcmul_(parameter.to(dtype), share)
        denominator.add_(share)
        if k < start:
            continue
        merged = numerator / denominator
        if importances is not None:
            # Below the smallest normal number the quotient has no precision left.
            empty = denominator < torch.finfo(dtype).tiny
            if empty.any():
                merged[empty] = 0.0 if zero == "reference" else _mean(parameters, weights, k + 1)[empty]
        yield merged.to(parameter.dtype)


def _mean(parameters: Sequence[Tensor], weights: Sequence[float], count: int) -> Tensor:
    total = sum(weights[:count])
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    mean = torch.zeros_like(parameters[0], dtype=dtype)
    for k in range(count):
        mean.add_(parameters[k].to(mean), alpha=weights[k] / total)
    return mean
