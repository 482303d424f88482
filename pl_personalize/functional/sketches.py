"""Comparison of large tensors in little memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 2**16  # numbers, up to which the tensor itself is the sketch
_DIRECTIONS = 4
_AT_A_TIME = 2**20  # numbers


class Sketch:
    r"""Random projection of a tensor that preserves norms of differences in expectation.

    For a matrix :math:`A`, it is :math:`A U / \sqrt{4}` with four fixed columns of normal numbers in :math:`U`, so that
    :math:`E \|A U / \sqrt{4}\|^2 = \|A\|_F^2`. A small tensor is its own sketch.
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
