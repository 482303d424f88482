"""Fisher importances at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.callbacks.estimation_callback import Stage
from pl_personalize.callbacks.importance_callback import ImportanceCallback
from pl_personalize.functional.per_sample import Forward


class FisherImportance(ImportanceCallback):
    r"""Estimates the diagonal of the Fisher information when ``fit`` ends, or over the data of a ``predict`` run.

    The mean over samples of :math:`(\partial \log p(\hat y | x) / \partial \theta)^2`, exact per sample. By default the
    labels are drawn from the model's own softmax, so that none are needed. Used as
    :class:`~pl_personalize.callbacks.MASImportance`, whose arguments it shares.

    Args:
        dataloader: See :class:`~pl_personalize.callbacks.MASImportance`.
        labels: ``"sampled"`` from the model, or ``"true"`` ones from the batch (the empirical Fisher).
        draws: Labels drawn for each sample, or ``"all"`` for the exact expectation over the classes.
        generator: Source of the drawn labels, see :func:`~pl_personalize.estimate_importance`.
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
        dataloader: Iterable[Any] | Stage | None = None,
        *,
        labels: Literal["sampled", "true"] = "sampled",
        draws: int | Literal["all"] = 1,
        generator: torch.Generator | None = None,
        weights: Literal["best", "last"] = "best",
        module: str | None = None,
        exclude: Sequence[str] = (),
        forward: Forward | None = None,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        reduction: Literal["sample", "batch"] = "sample",
        max_scratch_mb: float = 256,
    ) -> None:
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
        if labels not in ("sampled", "true"):
            raise MisconfigurationException(f"labels must be 'sampled' or 'true'; got {labels!r}.")
        self.kind = "empirical_fisher" if labels == "true" else "fisher"
