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
        parameters: The parameter in each expert; each is read once.
        importances: Its importance in each expert, or ``None`` for the weighted mean.
        weights: One positive factor for each expert.
        zero: What an entry becomes whose importances sum to zero: the weighted ``"mean"`` of the experts, or 0 as in
            the published code (``"reference"``).
        start: Yield from this merge on (0: from expert 1 itself).

    Yields:
        T - ``start`` tensors of the parameter's shape, each new, in the parameter's type.
    """
    merged = total = torch.empty(0)
    total_weight = 0.0
    for k, weight in enumerate(weights):
        parameter = parameters[k].detach()
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        total_weight += weight
        mass = None if importances is None else importances[k].detach().to(parameter.device, torch.float64) * weight
        if k == 0:
            merged = parameter.to(dtype, copy=True)
            total = torch.zeros_like(merged, dtype=torch.float64) if mass is None else mass
            if start == 0:
                yield parameter.clone()
            continue
        # A running mean: each expert moves it by its share of all the importance so far. Shares are formed in float64,
        # where the sum of float32 numbers neither overflows nor vanishes.
        share = torch.full((), weight / total_weight, dtype=dtype, device=merged.device)
        empty = None
        if mass is not None:
            total = total + mass
            empty = total == 0
            share = torch.where(empty, weight / total_weight, mass / total).to(dtype)
        merged.add_(share * (parameter.to(dtype) - merged))
        if k >= start:
            result = merged if empty is None or zero == "mean" else merged.masked_fill(empty, 0)
            yield result.to(parameter.dtype, copy=True)
