"""Importance-weighted averages of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Zero = Literal["mean", "reference"]

_AT_A_TIME = 2**19  # entries, for each thread of a CPU: what stays in a core's cache
_AT_A_TIME_ELSEWHERE = 2**24
_SMALL, _LARGE = 1e-25, 1e25  # sums of importances between which float32 has room for products with parameters
Bounds = tuple[float, float]


def check_importance(name: str, value: Tensor) -> Bounds:
    """Refuse what no importance can be.

    Returns:
        The smallest and the largest entry; 0 and 0 where there is none.

    Raises:
        ValueError: If it is complex, or an entry is NaN, infinite or negative.
    """
    if value.is_complex():
        raise ValueError(
            f"The importance of {name!r} is {value.dtype}; importances are real numbers, also of complex parameters."
        )
    if value.numel() == 0:
        return 0.0, 0.0
    low, high = (float(bound) for bound in torch.aminmax(value.detach()))
    if not (low >= 0 and high < float("inf")):
        what = "NaN" if low != low or high != high else ("a negative entry" if low < 0 else "an infinite entry")
        raise ValueError(f"The importance of {name!r} has {what}; importances are finite and not negative.")
    return low, high


def prefix_merges(
    parameters: Sequence[Tensor],
    importances: Sequence[Tensor] | None,
    weights: Sequence[float],
    zero: Zero = "mean",
    *,
    scales: Sequence[float] | None = None,
    start: int = 0,
    bounds: Sequence[Bounds] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    r"""One parameter of the merges of experts 1, 1..2, …, 1..T.

    .. math::
        \theta_t = \sum_{k \le t} \frac{w_k \Omega_k}{\sum_{j \le t} w_j \Omega_j} \theta_k

    De Lange et al., CVPR 2020 (IMM mode merging: Lee et al., NeurIPS 2017, equation 8). The first is expert 1 as it is.

    All tensors are read once, a stretch that fits in the processor's cache at a time; in memory are besides the
    arguments and the results only a few numbers. Sums are in float32 where it has room for them, in float64 elsewhere.

    Args:
        parameters: The parameter in each expert; complex in all or in none.
        importances: Its importance in each expert, real, finite and not negative, or ``None`` for the weighted mean.
        weights: One positive factor for each expert.
        zero: What an entry becomes whose importances sum to zero: the weighted ``"mean"`` of the experts, or 0 as in
            the published code (``"reference"``).
        scales: Further factors of the importances, which do not count for the ``"mean"`` of entries without any.
        start: Return from this merge on (0: from expert 1 itself).
        bounds: The smallest and the largest importance in each expert, where they are known; it saves looking.
        out: Tensors to write to, contiguous; they may be the parameters' own. By default new ones.

    Returns:
        T - ``start`` tensors of the parameter's shape, each in its expert's type and on its device.

    Raises:
        FloatingPointError: If a result is NaN or infinite: then a parameter or an importance is.
        ValueError: If some parameters are complex and others are not.
    """
    if start >= len(parameters):
        return []
    is_complex = parameters[0].is_complex()
    if any(p.is_complex() != is_complex for p in parameters):
        raise ValueError("A parameter is complex in some experts and real in others.")
    results = out or [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters[start:]]
    device = results[-1].device
    factors = [weight * scale for weight, scale in zip(weights, scales or [1.0] * len(weights), strict=True)]
    # None below 1: an importance that became zero in float32 would count as none.
    smallest = min(factors)
    factors = [factor / smallest for factor in factors]
    low, high = _bounds_of_sums(bounds, factors)
    chunk = _AT_A_TIME * torch.get_num_threads() if device.type == "cpu" else _AT_A_TIME_ELSEWHERE
    columns = [[torch.split(t.detach().reshape(-1), chunk) for t in group] for group in (parameters, importances or ())]
    targets = [torch.split(t.detach().view(-1), chunk) for t in results]
    moves = any(t.device != device for t in (*parameters, *(importances or ())))
    storages = {t.untyped_storage().data_ptr() for t in parameters}
    in_place = any(result.untyped_storage().data_ptr() in storages for result in results)
    stretch = _Stretch(weights, factors, zero, low, high)
    for i in range(len(targets[-1]) if results[-1].numel() else 0):
        thetas, omegas = ([column[i] for column in group] for group in columns)
        if moves:
            thetas, omegas = ([t.to(device) for t in group] for group in (thetas, omegas))
        places = [target[i] for target in targets]
        if is_complex:  # real and imaginary parts are merged with the same weights
            thetas = [torch.view_as_real(theta.resolve_conj()).reshape(-1) for theta in thetas]
            places = [torch.view_as_real(place).view(-1) for place in places]
            omegas = [omega.repeat_interleave(2) for omega in omegas]
        # What is in the place of an expert is written last: until then, the expert is needed.
        values = [torch.empty_like(place) for place in places] if in_place else places
        if not stretch.merge(thetas, omegas, values):
            raise FloatingPointError("A merged entry is NaN or infinite.")
        for place, value in zip(places, values, strict=True) if in_place else ():
            place.copy_(value)
    return list(results)


@dataclass
class _Stretch:
    """How the stretches of one parameter are merged; see :func:`prefix_merges`."""

    weights: Sequence[float]
    factors: Sequence[float]
    zero: Zero
    low: float  # no sum of importances is smaller,
    high: float  # and none larger
    buffers: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def merge(self, thetas: list[Tensor], omegas: list[Tensor], results: list[Tensor]) -> bool:
        """Write the last merges of a stretch, flat tensors; whether they are finite."""
        merge = self._merge_weighted if omegas else self._merge_means
        wide = any(value.dtype == torch.float64 for value in (*thetas, *omegas)) or max(self.factors) > _LARGE
        return (not wide and merge(thetas, omegas, results, torch.float32)) or merge(
            thetas, omegas, results, torch.float64
        )

    def _merge_means(
        self, thetas: list[Tensor], omegas: list[Tensor], results: list[Tensor], dtype: torch.dtype
    ) -> bool:
        first = len(thetas) - len(results)
        for t, mean in enumerate(self._means(thetas, dtype)):
            if t >= first:
                results[t - first].copy_(mean if t else thetas[0])
        return all(_is_finite(result) for result in results)

    def _merge_weighted(
        self, thetas: list[Tensor], omegas: list[Tensor], results: list[Tensor], dtype: torch.dtype
    ) -> bool:
        """Whether ``dtype`` has room for the sums."""
        first = len(thetas) - len(results)
        for t, (weighted, total) in enumerate(self._sums(_as(dtype, thetas), _as(dtype, omegas))):
            if t < first:
                continue
            result = results[t - first]
            if t == 0:
                result.copy_(thetas[0])
            elif not self._divide(weighted, total, thetas[: t + 1], result):
                return False
            if not _is_finite(result):
                return False
        return True

    def _divide(self, weighted: Tensor, total: Tensor, thetas: list[Tensor], result: Tensor) -> bool:
        """Write the average; whether the type of the sums has room for them."""
        dtype = total.dtype
        # What was written past the version counter, as through numpy, leaves bounds that hold no longer; then float32
        # fails, and float64 looks for itself.
        small, low = (0.0, 0.0) if dtype == torch.float64 else (_SMALL, self.low)
        if dtype != torch.float64 and self.high > _LARGE and not float(total.sum()) <= _LARGE:
            return False
        empty = None
        if not low > small and not (lowest := float(total.amin())) > small:
            if lowest > 0:
                return False
            # 1 where no expert has any importance, so that nothing is divided by zero, else 0; masks would be slower.
            empty, divisor = self._scratch(total, "empty")
            total = torch.add(total, empty.copy_(total).eq_(0), out=divisor)
            if not float(total.amin()) > small:
                return False
        quotient = torch.div(weighted, total, out=result if result.dtype == dtype else None)
        if empty is not None and self.zero == "mean":
            *_, mean = self._means(thetas, dtype)
            quotient.addcmul_(empty, mean)
        if quotient is not result:
            result.copy_(quotient)
        return True

    def _means(self, thetas: list[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """The weighted means of the first experts; one tensor, which changes."""
        mean, total = thetas[0].to(dtype, copy=True), self.weights[0]
        yield mean
        for theta, weight in zip(thetas[1:], self.weights[1:], strict=False):
            total += weight
            mean.lerp_(theta.to(dtype), weight / total)
            yield mean

    def _sums(self, thetas: list[Tensor], omegas: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The sums of importance times parameter, and of importance, over the first experts; two, which change."""
        sums, weighted = self._scratch(thetas[0], "sums")
        total = omegas[0] if self.factors[0] == 1 else torch.mul(omegas[0], self.factors[0], out=sums)
        torch.mul(total, thetas[0], out=weighted)
        yield weighted, total
        for theta, omega, factor in zip(thetas[1:], omegas[1:], self.factors[1:], strict=True):
            total = torch.add(total, omega, alpha=factor, out=sums)
            weighted.addcmul_(omega, theta, value=factor)
            yield weighted, total

    def _scratch(self, like: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """Two tensors to compute in, the same for each stretch: they stay in the cache."""
        key = purpose, like.dtype
        if key not in self.buffers or len(self.buffers[key][0]) < len(like):
            self.buffers[key] = torch.empty_like(like), torch.empty_like(like)
        one, other = self.buffers[key]
        return (one, other) if len(one) == len(like) else (one[: len(like)], other[: len(like)])


def _as(dtype: torch.dtype, values: list[Tensor]) -> list[Tensor]:
    return [value if value.dtype == dtype else value.to(dtype) for value in values]


def _bounds_of_sums(bounds: Sequence[Bounds] | None, factors: Sequence[float]) -> Bounds:
    """What no sum of the first importances falls below or exceeds, whatever their number."""
    if bounds is None:
        return 0.0, math.inf
    return factors[0] * bounds[0][0], sum(factor * high for factor, (_, high) in zip(factors, bounds, strict=True))


def _is_finite(values: Tensor) -> bool:
    """A sum is infinite or NaN wherever a term is; it may be so, too, where finite terms are many and large."""
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())
