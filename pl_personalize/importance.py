"""Importances of a model's parameters, in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pl_personalize.artifacts import ArtifactError, load_tensors, save_tensors
from pl_personalize.functional.merging import check_importance
from pl_personalize.functional.names import prefix_hint, some
from pl_personalize.functional.state_dicts import Bounds, NamedEntries

Kind = str
"""Name of an entry of :data:`~pl_personalize.functional.importance_kinds.IMPORTANCE_KINDS`, or of another source."""
Reduction = Literal["sample", "batch"]
ARTIFACT_KIND = "importance"


class Importance(NamedEntries[Tensor]):
    """Importance of each parameter: non-negative tensors by parameter name, with their origin.

    Args:
        values: Importance by parameter name, of the parameter's shape.
        kind: How they were estimated: ``"mas"``, ``"fisher"``, ``"empirical_fisher"``, or any other name.
        num_samples: Number of samples averaged over.
        reduction: ``"sample"``, or ``"batch"`` for the published code's estimate.
        routes: How each parameter's gradients were computed (``"closed form"``, ``"layer"``, ``"model"``, ``"loop"``
            or ``"batch"``); ``"none"`` if no gradient reached it.

    Raises:
        ValueError: If a value is negative, NaN or infinite, ``num_samples`` is not positive, or ``kind`` is empty.

    Example:
        >>> importance = Importance({"weight": torch.tensor([0.5, 2.0])}, kind="mas", num_samples=8)
        >>> importance["weight"].tolist(), importance.num_samples
        ([0.5, 2.0], 8)
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        kind: Kind,
        num_samples: int,
        reduction: Reduction = "sample",
        routes: Mapping[str, str] | None = None,
    ) -> None:
        if not kind or not isinstance(kind, str):
            raise ValueError(f"kind must be a name, such as 'mas'; got {kind!r}.")
        if num_samples < 1:
            raise ValueError(f"Importances need at least one sample; got num_samples={num_samples}.")
        self._bounds = {name: (_version(value), check_importance(name, value)) for name, value in values.items()}
        self._entries = dict(values)
        self.kind = kind
        self.num_samples = num_samples
        self.reduction = reduction
        self.routes = dict(routes or {})

    def __repr__(self) -> str:
        return (
            f"Importance(kind={self.kind!r}, num_samples={self.num_samples}, reduction={self.reduction!r}, "
            f"parameters={len(self)})"
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """How the importances were computed, as stored in files."""
        return {name: getattr(self, name) for name in ("kind", "num_samples", "reduction", "routes")}

    def bounds(self, name: str) -> Bounds | None:
        """Smallest and largest entry of a tensor, or ``None`` if it may have been changed in place since."""
        version, bounds = self._bounds[name]
        return bounds if version is not None and _version(self[name]) == version else None

    def to(self, *args: Any, **kwargs: Any) -> Importance:
        """A copy with every tensor moved or cast by :meth:`torch.Tensor.to`."""
        return Importance({name: value.to(*args, **kwargs) for name, value in self.items()}, **self.metadata)

    def summary(self) -> dict[str, dict[str, float]]:
        """The Euclidean ``norm`` and the share of ``zeros`` of each parameter."""
        return {
            name: {"norm": float(value.norm()), "zeros": float((value == 0).sum()) / max(value.numel(), 1)}
            for name, value in self.items()
        }

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a safetensors file, atomically, with a checksum.

        Returns:
            The path.
        """
        return str(save_tensors(path, self, kind=ARTIFACT_KIND, metadata=self.metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Read a file written by :meth:`save`.

        Raises:
            ArtifactError: If it is missing, damaged, or of another kind.
        """
        values, metadata = load_tensors(path, kind=ARTIFACT_KIND)
        try:
            return cls(values, **metadata)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path} does not hold importances: {error}") from error

    @classmethod
    def combine(cls, importances: Iterable[Importance]) -> Importance:
        """Importance over the data of several: their mean, weighted by the number of samples.

        Raises:
            ValueError: If there are none, or they differ in kind, reduction, names or shapes.
        """
        parts = list(importances)
        if not parts:
            raise ValueError("Importance.combine needs at least one importance.")
        first = parts[0]
        for other in parts[1:]:
            for what in ("kind", "reduction"):
                if getattr(first, what) != getattr(other, what):
                    raise ValueError(
                        f"Importances of different {what} cannot be combined: "
                        f"{getattr(first, what)!r} and {getattr(other, what)!r}."
                    )
            shapes = [{name: tuple(value.shape) for name, value in part.items()} for part in (first, other)]
            if shapes[0] != shapes[1]:
                wrong = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
                raise ValueError(
                    f"Importances of different parameters cannot be combined; they differ in {some(wrong)}."
                    + prefix_hint([name for name in other if name not in first], first)
                )
        total = sum(part.num_samples for part in parts)
        values = {
            name: sum((part[name] * (part.num_samples / total) for part in parts), torch.zeros_like(first[name]))
            for name in first
        }
        routes: dict[str, str] = {}
        for part in parts:  # a parameter without a gradient in one part may have one in another
            routes |= {name: route for name, route in part.routes.items() if routes.get(name, "none") == "none"}
        return Importance(values, **first.metadata | {"num_samples": total, "routes": routes})


def _version(value: Tensor) -> int | None:
    """Number of changes in place, which inference tensors do not count."""
    return None if value.is_inference() else value._version
