"""What rounding explains of the difference between two ways to compute the same gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite
from types import MappingProxyType

import torch
from torch import Tensor


def rounding_of_sums(grad: Tensor, entries: int) -> float:
    """How much of a bias's gradient, a sum over the positions of the output's, may be nothing but rounding.

    The numbers that are summed may be large and cancel: of the bias of a convolution before an instance norm, which
    takes every bias away, nothing is left but rounding, of the size of these numbers times the precision.

    Args:
        grad: (n, *), of some samples, the gradient of a layer's output.
        entries: How many the bias has.

    Returns:
        Eight units of precision (for the few roundings on the way) of the sum of absolute values that an entry has: the
        root mean square over entries, the largest of the samples. 0 where that is not finite.
    """
    if grad.layout != torch.strided or not grad.numel() or not entries:
        return 0.0
    dim = next((d for d in (1, -1) if grad.dim() > 1 and grad.shape[d] == entries), None)
    if dim is None:  # each entry has its share of the whole
        rows = grad.reshape(len(grad), 1, -1) / entries
    else:
        rows = grad.movedim(dim, 1).reshape(len(grad), entries, -1)
    sums = torch.linalg.vector_norm(rows, 1, dim=2, dtype=torch.promote_types(grad.dtype, torch.float32))
    size = float(sums.square().mean(1).sqrt().max())
    return _unit(grad.dtype) * size if isfinite(size) else 0.0


def beyond_rounding(
    errors: Mapping[str, float],
    sizes: Mapping[str, float],
    counts: Mapping[str, int],
    dtype: torch.dtype,
    power: int,
    *,
    left: Mapping[str, float] = MappingProxyType({}),
    exhausted: Collection[str] = (),
) -> list[str]:
    """The parameters whose errors rounding does not explain.

    Where a true gradient is zero, rounding leaves something of the size of the others times the precision: of those of
    the same module, or at worst of the network; or what is known to be left of it.

    Args:
        errors: Norms of the differences, by parameter name.
        sizes: Norms of what is right.
        counts: Numbers of entries.
        dtype: In which they were computed.
        power: 1 where absolute values were summed, 2 for squares.
        left: What rounding leaves in an entry of a gradient, where that is known: see :func:`rounding_of_sums`.
        exhausted: Names for which there is no other way left; they are allowed more.
    """
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    roots = {name: max(1, count) ** 0.5 for name, count in counts.items()}
    means = {name: size / roots[name] for name, size in sizes.items()}  # root mean squares, of squares if power is 2
    largest: dict[str, float] = {}
    for name, mean in means.items():
        largest[_module_of(name)] = max(mean, largest.get(_module_of(name), 0.0))
    unit = _unit(dtype)
    far_unit = 1e-3 * unit if dtype == torch.float32 else unit
    wrong = []
    for name, error in errors.items():
        near = unit**power * largest[_module_of(name)]
        far = (1e-6 if name in exhausted else far_unit) ** power * max(means.values())
        rest = left.get(name, 0.0)
        if power == 2:  # of a gradient g that may be larger than the rest: (g + rest)² - g²
            rest *= rest + 2 * means[name] ** 0.5
        if not error <= tolerance * sizes[name] + max(near, far, rest) * roots[name]:
            wrong.append(name)
    return wrong


def _unit(dtype: torch.dtype) -> float:
    return min(1e-6, 8 * torch.finfo(dtype).eps)


def _module_of(parameter: str) -> str:
    """Name of the module that a parameter is of, also where it is computed from others."""
    return (
        parameter.partition(".parametrizations.")[0]
        if ".parametrizations." in parameter
        else parameter.rpartition(".")[0]
    )
