"""Importance kinds: the objective that each differentiates, and how its gradients become an importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pl_personalize.functional import objectives
from pl_personalize.functional.batches import Labels, batch_labels
from pl_personalize.registry import Registry


@dataclass(frozen=True)
class KindOptions:
    """Options of importance kinds, documented in :func:`~pl_personalize.estimate_importance`.

    Raises:
        ValueError: If a value has the wrong type or is out of range.
    """

    draws: int | Literal["all"] = 1
    labels: Labels | None = None
    class_dim: int | None = None
    generator: torch.Generator | int | None = None

    def __post_init__(self) -> None:
        if self.draws != "all" and (not _is_int(self.draws) or self.draws < 1):
            raise ValueError(f'draws must be a positive integer or "all"; got {self.draws!r}.')
        if not (self.generator is None or isinstance(self.generator, torch.Generator) or _is_int(self.generator)):
            raise ValueError(f"generator must be a torch.Generator or a seed; got {self.generator!r}.")
        if not (self.labels is None or callable(self.labels) or isinstance(self.labels, str) or _is_int(self.labels)):
            raise ValueError(f"labels must be a function of the batch, an index or a key; got {self.labels!r}.")
        if self.class_dim is not None and (not _is_int(self.class_dim) or self.class_dim == 0):
            raise ValueError(f"class_dim must be an integer other than 0 (the samples); got {self.class_dim!r}.")


@dataclass(frozen=True)
class ImportanceKind:
    r"""One kind of importance.

    It is the mean over samples of :math:`\sum_c |\partial \langle c, f(x) \rangle / \partial \theta|^p`.

    Attributes:
        name: Name in :data:`IMPORTANCE_KINDS`.
        reference: The paper that defines it.
        power: p, 1 for absolute values and 2 for squares.
        objective: ``(logits, labels, options) -> cotangents``: one or more gradients c of the objective with respect to
            the detached logits, which are (n, classes, \*) for kinds with ``class_dim``, otherwise as returned by the
            model. The labels are ``None`` for kinds without ``labels``.
        options: Fields of :class:`KindOptions` that it takes, besides ``generator``. With ``"labels"``, it needs true
            labels; with ``"class_dim"``, logits of at least two classes.
        batch_floor: Constant added to the estimates of ``reduction="batch"``.
    """

    name: str
    reference: str
    power: Literal[1, 2]
    objective: Callable[[Tensor, Tensor | None, Any], Iterable[Tensor]]
    options: tuple[Literal["draws", "labels", "class_dim"], ...] = ()
    batch_floor: float = 0.0

    def check(self, options: KindOptions, reduction: str) -> None:
        """Raise a ``ValueError`` unless the kind takes every option that differs from its default."""
        for option in ("draws", "labels", "class_dim"):
            value = getattr(options, option)
            if value != getattr(KindOptions, option) and option not in self.options:
                takers = ", ".join(repr(kind.name) for kind in IMPORTANCE_KINDS.values() if option in kind.options)
                raise ValueError(f"kind={self.name!r} takes no {option}; got {option}={value!r}. It is for {takers}.")
        if options.draws != 1 and reduction != "sample":
            raise ValueError(f"draws={options.draws!r} needs reduction='sample'; got reduction={reduction!r}.")

    def labels(self, batch: Any, options: KindOptions) -> Tensor | None:
        """The labels of a batch, or ``None`` for kinds that need none."""
        return batch_labels(batch, options.labels) if "labels" in self.options else None

    def cotangents(self, batch: Any, options: KindOptions, logits: Tensor) -> Iterable[Tensor]:
        """Gradients of the objective with respect to the logits, of their shape."""
        dim = options.class_dim
        scores = _with_classes_second(logits, dim) if "class_dim" in self.options else logits
        found = self.objective(scores, self.labels(batch, options), options)
        return (direction.movedim(1, dim) for direction in found) if dim is not None else found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _with_classes_second(logits: Tensor, dim: int | None) -> Tensor:
    """The logits as (n, classes, *)."""
    shape = tuple(logits.shape)
    if dim is not None:
        if not -len(shape) < dim < len(shape) or shape[dim] < 2:
            raise ValueError(f"class_dim={dim} is no dimension of at least two classes in logits {shape}.")
        return logits.movedim(dim, 1)
    if len(shape) == 2 and shape[1] > 1:
        return logits
    hint = (
        "For one logit z and a sigmoid, pass the two logits 0 and z: forward=lambda model, batch: "
        "torch.nn.functional.pad(model(batch[0]).view(-1, 1), (1, 0)). For a probability p, z is torch.logit(p)."
        if len(shape) < 3
        else "If each sample has several positions, pass class_dim=-1 for sequences or class_dim=1 for maps."
    )
    raise ValueError(f"A Fisher information needs logits (N, classes) of at least two classes; got {shape}. {hint}")


def _fisher(logits: Tensor, labels: Tensor | None, options: Any) -> Iterable[Tensor]:
    if options.draws == "all":
        return objectives.expected_fisher_cotangents(logits)
    return objectives.fisher_cotangents(logits, options.draws, options.generator)


def _empirical_fisher(logits: Tensor, labels: Any, options: KindOptions) -> Iterable[Tensor]:
    return [objectives.label_cotangent(logits, labels, may_ignore=options.class_dim is not None)]


IMPORTANCE_KINDS = Registry(
    "importance kind",
    [
        ImportanceKind("mas", "Aljundi et al., ECCV 2018", 1, lambda logits, *_: [objectives.mas_cotangent(logits)]),
        ImportanceKind("fisher", "Amari, Neural Computation 1998", 2, _fisher, ("draws", "class_dim"), 1e-8),
        ImportanceKind("empirical_fisher", "Kirkpatrick et al., 2017", 2, _empirical_fisher, ("labels", "class_dim")),
    ],
)
"""All importance kinds by name. To add one, register an :class:`ImportanceKind`."""
