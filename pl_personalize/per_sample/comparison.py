"""Comparison of gradients computed in two ways: sketches of large tensors, and tolerances for rounding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from types import MappingProxyType

import torch
from torch import Tensor

_SMALL = 2**16  # numbers, up to which the tensor itself is the sketch
_DIRECTIONS = 4
_AT_A_TIME = 2**20  # numbers


class Sketch:
    r"""Projection :math:`A U / \sqrt{4}` of a matrix on four normal columns, which keeps norms in expectation.

    A small tensor is its own sketch.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._rows = shape[0] if len(shape) > 1 else 1
        columns = int(torch.Size(shape).numel()) // max(1, self._rows)
        self._directions: Tensor | None = None
        if self._rows * columns > _SMALL and columns > 2 * _DIRECTIONS:
            generator = torch.Generator().manual_seed(0)
            normal = torch.randn(columns, _DIRECTIONS, generator=generator, dtype=torch.float64)
            self._directions = (normal / _DIRECTIONS**0.5).to(device, dtype)
        size = columns if self._directions is None else _DIRECTIONS
        self._values = torch.zeros(self._rows, size, dtype=dtype, device=device)

    def add(self, tensor: Tensor, power: int = 1) -> float:
        """Add the sketch of ``|tensor| ** power`` without a full copy, and return its Euclidean norm."""
        rows = tensor if tensor.dim() > 1 else tensor.reshape(1, -1)
        square = torch.zeros((), dtype=torch.float64, device=tensor.device)
        at_a_time, start = max(1, _AT_A_TIME // max(1, rows[:1].numel())), 0
        for piece in torch.split(rows, at_a_time) if rows.numel() else ():
            piece = piece.reshape(len(piece), -1)
            piece = (piece.abs() if piece.is_complex() else piece).to(self._values.dtype).abs()
            piece = piece.square() if power == 2 else piece
            square += piece.norm().double().square()
            projected = piece if self._directions is None else piece @ self._directions
            self._values[start : start + len(piece)] += projected
            start += len(piece)
        return float(square.sqrt())

    def distance(self, other: Sketch) -> float:
        """Euclidean norm of the difference, in expectation."""
        return float((self._values - other._values).norm())

    def is_multiple_of(self, other: Sketch) -> bool:
        """Whether it equals the other times a factor far from 1, up to rounding."""
        size, other_size = float(self._values.norm()), float(other._values.norm())
        if not (size > 0 and other_size > 0) or 0.8 < size / other_size < 1.25:
            return False
        return float((self._values / size - other._values / other_size).norm()) <= 1e-3


def rounding_of_sums(grad: Tensor, entries: int) -> float:
    """Rounding error of the gradient of a bias with so many entries, from the output's gradient (n, *).

    The summands may cancel: before an instance norm, only rounding is left. It is eight units of precision times the
    sum of absolute values: root mean square over entries, maximum over samples; 0 if that is not finite.
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

    Where a true gradient is zero, rounding leaves an error of the size of the precision times other gradients of the
    module, or at worst of the network; or the :func:`rounding_of_sums` in ``left``. ``errors`` and ``sizes`` are norms
    of differences and of right values, ``counts`` numbers of entries, ``dtype`` the type of the computation, and
    ``exhausted`` names without a slower route, which get a larger tolerance.
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
