"""Tolerances for rounding between two ways of computing the same gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite
from types import MappingProxyType

import torch
from torch import Tensor


def rounding_of_sums(grad: Tensor, entries: int) -> float:
    """Rounding error of a bias's gradient, which is the sum of the output's gradient over positions.

    The summands may be large and cancel: before an instance norm, which removes every bias, only rounding is left of a
    convolution's bias gradient, of the size of the summands times the precision.

    For the output's gradient (n, *) of n samples and a bias of so many entries, it is eight units of precision times
    the sum of absolute values of an entry: root mean square over entries, maximum over samples. 0 if that is not
    finite.
    """
    if grad.layout != torch.strided or not grad.numel() or not entries:
        return 0.0
    dim = next((d for d in (1, -1) if grad.dim() > 1 and grad.shape[d] == entries), None)
    if dim is None:  # an equal share for each entry
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
    """Names of parameters whose errors are larger than rounding explains.

    If a true gradient is zero, rounding leaves an error of the size of other gradients times the precision: those of
    the same module, or at worst of the network; or what is given as ``left``.

    All mappings are by parameter name: ``errors`` and ``sizes`` are norms of differences and of right values,
    ``counts`` numbers of entries, ``left`` the :func:`rounding_of_sums` where known. ``dtype`` is the type of the
    computation, and ``exhausted`` are names without a slower route, which get a larger tolerance.
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
        if power == 2:  # (g + rest)² - g², as the gradient g may be larger than the rest
            rest *= rest + 2 * means[name] ** 0.5
        if not error <= tolerance * sizes[name] + max(near, far, rest) * roots[name]:
            wrong.append(name)
    return wrong


def _unit(dtype: torch.dtype) -> float:
    return min(1e-6, 8 * torch.finfo(dtype).eps)


def _module_of(parameter: str) -> str:
    """Name of the module of a parameter, also if it is parametrized."""
    module, inner, _ = parameter.partition(".parametrizations.")
    return module if inner else parameter.rpartition(".")[0]
