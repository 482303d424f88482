"""Continual-learning metrics over a sequence of tasks."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from pl_personalize.checks import check_choice, check_option


class TaskAccuracyMatrix(Metric):
    r"""Accuracy on each task of the model after each task.

    Entry :math:`A(t, i)` of :meth:`compute` is the share of correct predictions of model ``t`` (row) on task ``i``
    (column), in [0, 1]; NaN without samples, as above the diagonal.

    Args:
        num_tasks: Number of tasks T.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> matrix = TaskAccuracyMatrix(num_tasks=2)
        >>> matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]), model=1, task=0)
        >>> matrix.compute()
        tensor([[   nan,    nan],
                [0.5000,    nan]])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        check_option("num_tasks", num_tasks, least=1)
        self.num_tasks = num_tasks
        self.add_state("correct", torch.zeros(num_tasks, num_tasks, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_tasks, num_tasks, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, *, model: int, task: int) -> None:
        """Count the correct predictions (n,) of labels (n,) of a task, by the model after task ``model``, both from 0.

        Raises:
            MisconfigurationException: If ``model`` or ``task`` is out of range, or the shapes differ.
        """
        if predictions.dim() != 1 or predictions.shape != labels.shape:
            raise MisconfigurationException(
                f"predictions and labels must both have the shape (n,); got {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}. For logits, pass logits.argmax(1)."
            )
        for name, index in (("model", model), ("task", task)):
            if not 0 <= index < self.num_tasks:
                raise MisconfigurationException(f"{name} must be in 0..{self.num_tasks - 1}; got {index}.")
        self.correct[model, task] += (predictions == labels).sum()
        self.total[model, task] += labels.numel()

    def compute(self) -> Tensor:
        """The (T, T) matrix of accuracies, in [0, 1]."""
        return torch.where(self.total > 0, self.correct / self.total.clamp_min(1), torch.nan)


def average_accuracy(matrix: Tensor) -> Tensor:
    r"""Accuracy of the last model of a (T, T) matrix, model by task, averaged: :math:`\frac1T \sum_i A(T, i)`.

    Example:
        >>> average_accuracy(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor(0.7500)
    """
    return matrix[-1].mean()


def forgetting(matrix: Tensor, divisor: Literal["tasks", "earlier"] = "tasks") -> Tensor:
    r"""Mean loss of accuracy on earlier tasks, :math:`\frac1D \sum_{i<T} (A(i, i) - A(T, i))`.

    Args:
        matrix: (T, T), model by task.
        divisor: D: ``"tasks"`` for T, as in the tables of De Lange et al., CVPR 2020; ``"earlier"`` for T - 1, the
            usual definition (Chaudhry et al., ECCV 2018, without the maximum).

    Returns:
        A scalar; 0 for a single task, negative if later tasks improve earlier ones.

    Raises:
        MisconfigurationException: If ``divisor`` is unknown.

    Example:
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor(0.2500)
    """
    check_choice("divisor", divisor, ("tasks", "earlier"))
    tasks = matrix.shape[0]
    lost = (matrix.diagonal()[:-1] - matrix[-1, :-1]).sum()
    return lost / (tasks if divisor == "tasks" else max(tasks - 1, 1))
