"""Importance-weighted averages of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Zero = Literal["mean", "reference"]

_AT_A_TIME = 2**18  # entries, for each thread of a CPU: what stays in a core's cache
_AT_A_TIME_ELSEWHERE = 2**24
_SMALL, _LARGE = 1e-25, 1e25  # sums of importances between which float32 has room for products with parameters


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
    scales: Sequence[float] | None = None,
    start: int = 0,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    r"""One parameter of the merges of experts 1, 1..2, …, 1..T.

    .. math::
        \theta_t = \sum_{k \le t} \frac{w_k \Omega_k}{\sum_{j \le t} w_j \Omega_j} \theta_k

    De Lange et al., CVPR 2020 (IMM mode merging: Lee et al., NeurIPS 2017, equation 8). The first is expert 1 as it is.

    All tensors are read once, a stretch that fits in the processor's cache at a time; in memory are besides the
    arguments and the results only a few numbers. Sums are in float32 where it has room for them, in float64 elsewhere.

    Args:
        parameters: The parameter in each expert.
        importances: Its importance in each expert, finite and not negative, or ``None`` for the weighted mean.
        weights: One positive factor for each expert.
        zero: What an entry becomes whose importances sum to zero: the weighted ``"mean"`` of the experts, or 0 as in
            the published code (``"reference"``).
        scales: Further factors of the importances, which do not count for the ``"mean"`` of entries without any.
        start: Return from this merge on (0: from expert 1 itself).
        out: Tensors to write to, contiguous; they may be the parameters' own. By default new ones.

    Returns:
        T - ``start`` tensors of the parameter's shape, each in its expert's type and on its device.

    Raises:
        FloatingPointError: If a result is NaN or infinite: then a parameter or an importance is.
    """
    if start >= len(parameters):
        return []
    results = out or [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters[start:]]
    device = results[-1].device
    factors = [weight * scale for weight, scale in zip(weights, scales or [1.0] * len(weights), strict=True)]
    factors = [factor / factors[0] for factor in factors]
    chunk = _AT_A_TIME * torch.get_num_threads() if device.type == "cpu" else _AT_A_TIME_ELSEWHERE
    columns = [[torch.split(t.detach().reshape(-1), chunk) for t in group] for group in (parameters, importances or ())]
    targets = [torch.split(t.detach().view(-1), chunk) for t in results]
    storages = {t.untyped_storage().data_ptr() for t in parameters}
    in_place = any(result.untyped_storage().data_ptr() in storages for result in results)
    buffer = torch.empty(2 * min(chunk, results[-1].numel()), dtype=torch.float64, device=device)
    for i in range(len(targets[-1]) if results[-1].numel() else 0):
        thetas, omegas = ([column[i].to(device) for column in group] for group in columns)
        places = [target[i] for target in targets]
        # What is in the place of an expert is written last: until then, the expert is needed.
        values = [torch.empty_like(place) for place in places] if in_place else places
        stretch = _Stretch(thetas, omegas, weights, factors, zero, values, buffer)
        if not (stretch.merge() or stretch.merge(torch.float64)):
            raise FloatingPointError("A merged entry is NaN or infinite.")
        for place, value in zip(places, values, strict=True) if in_place else ():
            place.copy_(value)
    return list(results)


@dataclass
class _Stretch:
    """A part of one parameter, flat; see :func:`prefix_merges`. The results are those of the last merges."""

    thetas: list[Tensor]
    omegas: list[Tensor]
    weights: Sequence[float]
    factors: Sequence[float]
    zero: Zero
    results: list[Tensor]
    buffer: Tensor

    def scratch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two tensors to compute in, the same for each stretch: they stay in the cache."""
        one, other = self.buffer.view(dtype).view(2, -1)
        return one[: len(self.thetas[0])], other[: len(self.thetas[0])]

    def merge(self, dtype: torch.dtype | None = None) -> bool:
        """Write the results; whether ``dtype``, by default the parameters' (at least float32), has room for them."""
        if dtype is None:
            dtype = torch.float32
            for theta in self.thetas:
                dtype = torch.promote_types(dtype, theta.dtype)
        first = len(self.thetas) - len(self.results)
        if first == 0:
            self.results[0].copy_(self.thetas[0])
        wanted = dict(enumerate(self.results, start=first))
        wanted.pop(0, None)
        write = self._write_weighted if self.omegas else self._write_means
        return write(wanted, dtype) and all(_is_finite(result) for result in self.results)

    def _write_means(self, wanted: dict[int, Tensor], dtype: torch.dtype) -> bool:
        for t, mean in enumerate(self._means(dtype)):
            if t in wanted:
                wanted[t].copy_(mean)
        return True

    def _write_weighted(self, wanted: dict[int, Tensor], dtype: torch.dtype) -> bool:
        for t, (weighted, total) in enumerate(self._sums(dtype)):
            if t not in wanted:
                continue
            if dtype != torch.float64 and not (float(total.amin()) >= _SMALL and float(total.sum()) <= _LARGE):
                return False
            torch.div(weighted, total, out=wanted[t]) if wanted[t].dtype == dtype else wanted[t].copy_(weighted / total)
            empty = total == 0 if dtype == torch.float64 else None
            if empty is not None and bool(empty.any()):
                means = next(mean for k, mean in enumerate(self._means(dtype)) if k == t)
                filling = means if self.zero == "mean" else torch.zeros_like(means)
                wanted[t].copy_(torch.where(empty, filling, weighted / total))
        return True

    def _means(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weighted means of the first experts; one tensor, which changes."""
        mean, total = self.thetas[0].to(dtype, copy=True), self.weights[0]
        yield mean
        for theta, weight in zip(self.thetas[1:], self.weights[1:], strict=True):
            total += weight
            mean.lerp_(theta.to(dtype), weight / total)
            yield mean

    def _sums(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """The sums of importance times parameter, and of importance, over the first experts; two, which change."""
        sums, weighted = self.scratch(dtype)
        total = self.omegas[0].to(dtype)
        torch.mul(total, self.thetas[0].to(dtype), out=weighted)
        yield weighted, total
        for theta, omega, factor in zip(self.thetas[1:], self.omegas[1:], self.factors[1:], strict=True):
            mass = omega.to(dtype)
            total = torch.add(total, mass, alpha=factor, out=sums)
            weighted.addcmul_(mass, theta.to(dtype), value=factor)
            yield weighted, total


def _is_finite(values: Tensor) -> bool:
    """A sum is infinite or NaN wherever a term is; it may be so, too, where finite terms are many and large."""
    return bool(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite()) or bool(
        values.isfinite().all()
    )
