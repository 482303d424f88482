"""Fisher importances at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.callbacks.data_source import Stage
from pl_personalize.callbacks.importance_callback import ImportanceCallback
from pl_personalize.callbacks.requirements import naming_errors


class FisherImportance(ImportanceCallback):
    r"""Estimates the diagonal of the Fisher information at the end of ``fit``, or on the data of a ``predict`` run.

    The mean over samples of :math:`(\partial \log p(\hat y | x) / \partial \theta)^2`, exact per sample. By default the
    labels are drawn from the model's own softmax, so none are needed. Usage and further arguments are those of
    :class:`~pl_personalize.callbacks.MASImportance`.

    Args:
        dataloader: See :class:`~pl_personalize.callbacks.MASImportance`.
        labels: ``"sampled"`` from the model (or ``False``), or the ``"true"`` labels of the batch (or ``True``), for
            the empirical Fisher: the second of two items, or the label in a dict. For other batches, the index of the
            item, or a function ``batch -> labels``.
        draws: Labels drawn per sample, or ``"all"`` for the exact expectation over the classes.
        generator: Generator of the drawn labels, or a seed with which each estimate draws the same; see
            :func:`~pl_personalize.estimate_importance`.
        class_dim: Dimension of the classes, if each sample has several positions; see
            :func:`~pl_personalize.estimate_importance`.
        options: ``weights``, ``module``, ``exclude``, ``forward``, ``dirpath``, ``filename``, ``reduction`` and
            ``max_scratch_mb`` of :class:`~pl_personalize.callbacks.MASImportance`.

    Attributes:
        importance: The result; raises before there is one.
        path: Its file.

    Raises:
        MisconfigurationException: As :class:`~pl_personalize.callbacks.MASImportance`.
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        labels: Literal["sampled", "true"] | bool | int | Callable[[Any], Tensor] = "sampled",
        draws: int | Literal["all"] = 1,
        generator: torch.Generator | int | None = None,
        class_dim: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(labels, str) and labels not in ("sampled", "true"):
            raise MisconfigurationException(
                f"labels must be 'sampled' or 'true'; got {labels!r}. For a key, pass a function: "
                f"labels=lambda batch: batch[{labels!r}]."
            )
        # In YAML, `true` is a bool.
        self.kind = "empirical_fisher" if labels is not False and labels != "sampled" else "fisher"
        super().__init__(dataloader, **options)
        where = None if isinstance(labels, bool | str) else labels
        self._options |= {"draws": draws, "generator": generator, "labels": where, "class_dim": class_dim}
        with naming_errors(self):
            self.check_options()
