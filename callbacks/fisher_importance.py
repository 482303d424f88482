"""Fisher importances at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.callbacks.data_source import Stage
from pl_personalize.callbacks.importance_callback import ImportanceCallback
from pl_personalize.estimation import check_options
from pl_personalize.functional.batches import Forward


class FisherImportance(ImportanceCallback):
    r"""Estimates the diagonal of the Fisher information when ``fit`` ends, or over the data of a ``predict`` run.

    The mean over samples of :math:`(\partial \log p(\hat y | x) / \partial \theta)^2`, exact per sample. By default the
    labels are drawn from the model's own softmax, so that none are needed. Used as
    :class:`~pl_personalize.callbacks.MASImportance`, whose arguments it shares.

    Args:
        dataloader: See :class:`~pl_personalize.callbacks.MASImportance`.
        labels: ``"sampled"`` from the model (or ``False``), or ``"true"`` ones from the batch (or ``True``), for the
            empirical Fisher: the second of two items, or the label in a dict. A function ``batch -> labels``, or the
            index of an item, says where else the true ones are.
        draws: Labels drawn for each sample, or ``"all"`` for the exact expectation over the classes.
        generator: Source of the drawn labels, or a seed, with which each estimate draws the same; see
            :func:`~pl_personalize.estimate_importance`.
        class_dim: Dimension of the classes where each sample has several positions, see there.
        weights: See :class:`~pl_personalize.callbacks.MASImportance`.
        module: See there.
        exclude: See there.
        forward: See there.
        dirpath: See there.
        filename: See there.
        reduction: See there.
        max_scratch_mb: See there.

    Attributes:
        importance: The result.
        path: Its file.

    Raises:
        MisconfigurationException: As :class:`~pl_personalize.callbacks.MASImportance` does.
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | Stage | Sequence[Stage] | None = None,
        *,
        labels: Literal["sampled", "true"] | bool | int | Callable[[Any], Tensor] = "sampled",
        draws: int | Literal["all"] = 1,
        generator: torch.Generator | int | None = None,
        class_dim: int | None = None,
        weights: Literal["best", "last"] = "best",
        module: str | None = None,
        exclude: Sequence[str] = (),
        forward: Forward | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        reduction: Literal["sample", "batch"] = "sample",
        max_scratch_mb: float = 256,
    ) -> None:
        if isinstance(labels, str) and labels not in ("sampled", "true"):
            raise MisconfigurationException(
                f"labels must be 'sampled' or 'true'; got {labels!r}. For a key, pass a function: "
                f"labels=lambda batch: batch[{labels!r}]."
            )
        # Of YAML, `true` is a truth value.
        is_true = labels is not False and labels != "sampled"
        where = None if isinstance(labels, bool | str) else labels
        self.kind = "empirical_fisher" if is_true else "fisher"
        try:
            check_options(
                *(self.kind, reduction, draws, max_scratch_mb),
                generator=generator,
                labels=where,
                class_dim=class_dim,
                forward=forward,
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        super().__init__(
            dataloader,
            weights=weights,
            module=module,
            exclude=exclude,
            forward=forward,
            dirpath=dirpath,
            filename=filename,
            reduction=reduction,
            max_scratch_mb=max_scratch_mb,
            draws=draws,
            generator=generator,
        )
        self._options |= {"labels": where, "class_dim": class_dim}
