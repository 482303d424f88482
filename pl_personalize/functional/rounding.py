"""What rounding explains of the difference between two ways to compute the same gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch


def beyond_rounding(
    errors: Mapping[str, float],
    sizes: Mapping[str, float],
    counts: Mapping[str, int],
    dtype: torch.dtype,
    power: int,
    *,
    terms: Mapping[str, float] = MappingProxyType({}),
    exhausted: Collection[str] = (),
) -> list[str]:
    """The parameters whose errors rounding does not explain.

    Where a true gradient is zero, rounding leaves something of the size of the others times the precision: of those of
    the same module, or at worst of the network; or of the numbers that cancel in its sum, as in that of the bias of a
    convolution before an instance norm.

    Args:
        errors: Norms of the differences, by parameter name.
        sizes: Norms of what is right.
        counts: Numbers of entries.
        dtype: In which they were computed.
        power: 1 where absolute values were summed, 2 for squares.
        terms: Sums of the absolute values of the numbers whose sum an entry of a gradient is, the mean over entries.
        exhausted: Names for which there is no other way left; they are allowed more.
    """
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    roots = {name: max(1, count) ** 0.5 for name, count in counts.items()}
    means = {name: size / roots[name] for name, size in sizes.items()}
    largest: dict[str, float] = {}
    for name, mean in means.items():
        largest[_module_of(name)] = max(mean, largest.get(_module_of(name), 0.0))
    unit = min(1e-6, 8 * torch.finfo(dtype).eps)
    far_unit = 1e-3 * unit if dtype == torch.float32 else unit
    wrong = []
    for name, error in errors.items():
        left = unit * terms.get(name, 0.0)
        cancelled = left if power == 1 else left * (left + 2 * means[name] ** 0.5)  # |(g + left)² - g²|
        near = max(unit**power * largest[_module_of(name)], cancelled)
        far = (1e-6 if name in exhausted else far_unit) ** power * max(means.values())
        if not error <= tolerance * sizes[name] + max(near, far) * roots[name]:
            wrong.append(name)
    return wrong


def _module_of(parameter: str) -> str:
    """Name of the module that a parameter is of, also where it is computed from others."""
    return (
        parameter.partition(".parametrizations.")[0]
        if ".parametrizations." in parameter
        else parameter.rpartition(".")[0]
    )
