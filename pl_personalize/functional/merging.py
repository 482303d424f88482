"""The importance-weighted mean of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from pl_personalize.functional.merge_rule import MergeInputs, MergeRule
from pl_personalize.functional.state_dicts import Bounds

Zero = Literal["mean", "reference"]

_CHUNK_CPU = 2**19  # entries per thread: what stays in a core's cache
_CHUNK_ELSEWHERE = 2**24
_SMALL, _LARGE = 1e-25, 1e25  # sums of importances whose products with parameters are safe in float32


def check_importance(name: str, value: Tensor, whose: str = "") -> Bounds:
    """The smallest and the largest entry of an importance (0 and 0 if empty), which is real, finite and not negative.

    Raises:
        ValueError: If it is not.
    """
    if value.is_complex():
        raise ValueError(
            f"The importance of {name!r}{whose} is {value.dtype}; importances are real, even of complex parameters."
        )
    if value.numel() == 0:
        return 0.0, 0.0
    low, high = (float(bound) for bound in torch.aminmax(value.detach()))
    if not (low >= 0 and high < float("inf")):
        what = "NaN" if low != low or high != high else ("a negative entry" if low < 0 else "an infinite entry")
        raise ValueError(f"The importance of {name!r}{whose} has {what}; importances must be finite and not negative.")
    return low, high


@dataclass(frozen=True)
class WeightedOptions:
    """Options of the importance-weighted mean.

    Attributes:
        zero: The value of an entry whose importances sum to zero: the weighted ``"mean"`` of the experts, or
            ``"reference"`` for 0, as in the published code.
    """

    zero: Zero = "mean"

    def __post_init__(self) -> None:
        if self.zero not in get_args(Zero):
            raise ValueError(f"zero must be one of {', '.join(get_args(Zero))}; got {self.zero!r}.")


def prefix_merges(
    inputs: MergeInputs, options: WeightedOptions, start: int = 0, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    r"""One parameter tensor in the merges of experts 1, 1..2, …, 1..T.

    .. math::
        \theta_t = \sum_{k \le t} \frac{w_k \Omega_k}{\sum_{j \le t} w_j \Omega_j} \theta_k

    De Lange et al., CVPR 2020 (IMM mode merging: Lee et al., NeurIPS 2017, equation 8); without importances, the
    weighted mean. The first is expert 1 itself. Tensors are read once, in chunks that fit the processor's cache, with
    little extra memory. Sums are in float32 where its range suffices, else in float64.

    Arguments are those of :attr:`MergeRule.prefixes`; ``out`` may be the parameters' own tensors. The ``scales`` of the
    inputs do not affect the mean of entries without importance.

    Raises:
        FloatingPointError: If a result is NaN or infinite, because a parameter or an importance is.
        ValueError: If the parameter is complex in some experts only.
    """
    parameters, importances, weights = inputs.parameters, inputs.importances or (), inputs.weights
    if start >= len(parameters):
        return []
    is_complex = parameters[0].is_complex()
    if any(p.is_complex() != is_complex for p in parameters):
        raise ValueError("A parameter is complex in some experts and real in others.")
    results = out or [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters[start:]]
    device = results[-1].device
    factors = [weight * scale for weight, scale in zip(weights, inputs.scales or [1.0] * len(weights), strict=True)]
    # None below 1: an importance that underflows in float32 would count as zero.
    smallest = min(factors)
    factors = [factor / smallest for factor in factors]
    low, high = 0.0, math.inf  # of the sums of the first importances, for any number of them
    if inputs.bounds is not None:
        low = factors[0] * inputs.bounds[0][0]
        high = sum(factor * most for factor, (_, most) in zip(factors, inputs.bounds, strict=True))
    chunk = _CHUNK_CPU * torch.get_num_threads() if device.type == "cpu" else _CHUNK_ELSEWHERE
    columns = [[torch.split(t.detach().reshape(-1), chunk) for t in group] for group in (parameters, importances)]
    targets = [torch.split(t.detach().view(-1), chunk) for t in results]
    moves = any(t.device != device for t in (*parameters, *importances))
    storages = {t.untyped_storage().data_ptr() for t in parameters}
    in_place = any(result.untyped_storage().data_ptr() in storages for result in results)
    merger = _ChunkMerger(weights, factors, options.zero, low, high)
    for i in range(len(targets[-1]) if results[-1].numel() else 0):
        thetas, omegas = ([column[i] for column in group] for group in columns)
        if moves:
            thetas, omegas = ([t.to(device) for t in group] for group in (thetas, omegas))
        places = [target[i] for target in targets]
        if is_complex:  # real and imaginary parts are merged with the same importances
            thetas = [torch.view_as_real(theta.resolve_conj()).reshape(-1) for theta in thetas]
            places = [torch.view_as_real(place).view(-1) for place in places]
            omegas = [omega.repeat_interleave(2) for omega in omegas]
        # The memory of an expert is written last: until then, the expert is read.
        values = [torch.empty_like(place) for place in places] if in_place else places
        if not merger.merge(thetas, omegas, values):
            raise FloatingPointError("A merged entry is NaN or infinite.")
        for place, value in zip(places, values, strict=True) if in_place else ():
            place.copy_(value)
    return list(results)


WEIGHTED = MergeRule(
    "weighted",
    "De Lange et al., Unsupervised Model Personalization while Preserving Privacy and Scalability, CVPR 2020",
    lambda inputs, options: prefix_merges(inputs, options, len(inputs.parameters) - 1)[0],
    WeightedOptions,
    prefixes=prefix_merges,
)


@dataclass
class _ChunkMerger:
    """Merges a parameter tensor chunk by chunk; see :func:`prefix_merges`."""

    weights: Sequence[float]
    factors: Sequence[float]
    zero: Zero
    low: float  # lower
    high: float  # and upper bound of all sums of importances
    buffers: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def merge(self, thetas: list[Tensor], omegas: list[Tensor], results: list[Tensor]) -> bool:
        """Write the last merges of a chunk, flat tensors, and return whether they are finite."""
        wide = any(value.dtype == torch.float64 for value in (*thetas, *omegas)) or max(self.factors) > _LARGE
        types = (torch.float64,) if wide else (torch.float32, torch.float64)
        return any(self._merge(thetas, omegas, results, dtype) for dtype in types)

    def _merge(self, thetas: list[Tensor], omegas: list[Tensor], results: list[Tensor], dtype: torch.dtype) -> bool:
        """Return whether the range of ``dtype`` suffices."""
        first = len(thetas) - len(results)
        sums = self._sums(_as(dtype, thetas), _as(dtype, omegas)) if omegas else self._means(thetas, dtype)
        for t, (value, total) in enumerate(sums):
            if t < first:
                continue
            result = results[t - first]
            if t == 0 or total is None:
                result.copy_(value if t else thetas[0])
            elif not self._divide(value, total, thetas[: t + 1], result):
                return False
            if not _is_finite(result):
                return False
        return True

    def _divide(self, weighted: Tensor, total: Tensor, thetas: list[Tensor], result: Tensor) -> bool:
        """Write the average, and return whether the range of the sums' type suffices."""
        dtype = total.dtype
        # Writes that bypass the version counter, as through numpy, make bounds wrong; then float32 fails, and float64
        # does not rely on them.
        small, low = (0.0, 0.0) if dtype == torch.float64 else (_SMALL, self.low)
        if dtype != torch.float64 and self.high > _LARGE and not float(total.sum()) <= _LARGE:
            return False
        empty = None
        if not low > small and not (lowest := float(total.amin())) > small:
            if lowest > 0:
                return False
            # 1 where no expert has any importance, to avoid division by zero, else 0; masks would be slower.
            empty, divisor = self._scratch(total, "empty")
            total = torch.add(total, empty.copy_(total).eq_(0), out=divisor)
            if not float(total.amin()) > small:
                return False
        quotient = torch.div(weighted, total, out=result if result.dtype == dtype else None)
        if empty is not None and self.zero == "mean":
            *_, (mean, _) = self._means(thetas, dtype)
            quotient.addcmul_(empty, mean)
        if quotient is not result:
            result.copy_(quotient)
        return True

    def _means(self, thetas: list[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, None]]:
        """The weighted means of the first experts, in one tensor that is updated."""
        mean, total = thetas[0].to(dtype, copy=True), self.weights[0]
        yield mean, None
        for theta, weight in zip(thetas[1:], self.weights[1:], strict=False):
            total += weight
            mean.lerp_(theta.to(dtype), weight / total)
            yield mean, None

    def _sums(self, thetas: list[Tensor], omegas: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The sums of importance times parameter and of importance over the first experts, updated in place."""
        sums, weighted = self._scratch(thetas[0], "sums")
        total = omegas[0] if self.factors[0] == 1 else torch.mul(omegas[0], self.factors[0], out=sums)
        torch.mul(total, thetas[0], out=weighted)
        yield weighted, total
        for theta, omega, factor in zip(thetas[1:], omegas[1:], self.factors[1:], strict=True):
            total = torch.add(total, omega, alpha=factor, out=sums)
            weighted.addcmul_(omega, theta, value=factor)
            yield weighted, total

    def _scratch(self, like: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """Two buffers, the same for all chunks, so that they stay in the cache."""
        key = purpose, like.dtype
        if key not in self.buffers or len(self.buffers[key][0]) < len(like):
            self.buffers[key] = torch.empty_like(like), torch.empty_like(like)
        one, other = self.buffers[key]
        return (one, other) if len(one) == len(like) else (one[: len(like)], other[: len(like)])


def _as(dtype: torch.dtype, values: list[Tensor]) -> list[Tensor]:
    return [value if value.dtype == dtype else value.to(dtype) for value in values]


def _is_finite(values: Tensor) -> bool:
    """The cheap sum decides unless it overflows, which many large finite terms can also cause."""
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())
