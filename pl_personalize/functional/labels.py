"""Class labels in the form that losses and accuracies expect."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def class_labels(labels: Any, num_classes: int, *, offset: int = 0, ignored: int | None = None) -> Tensor:
    """Convert labels to int64 (n,), each from 0 to num_classes − 1 or ``ignored``, if no information is lost.

    Labels are a tensor, array or list (n,) or (n, 1) of whole numbers or booleans of any type, including floats. The
    ``offset`` of a task among several is for the message.

    Raises:
        ValueError: If they cannot be converted. The message names the first wrong label and its sample.

    Example:
        >>> class_labels([[1.0], [0.0]], 2)
        tensor([1, 0])
    """
    values = _as_tensor(labels)
    shape = tuple(values.shape)
    if values.ndim == 2 and shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim != 1:
        hint = " If they are one-hot, pass argmax(1)." if values.ndim == 2 and shape[1] == num_classes else ""
        raise ValueError(f"labels must be one whole number per sample, (n,); got the shape {shape}.{hint}")
    if values.is_floating_point() and (wrong := (values != values.round()) | ~values.isfinite()).any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"label {values[place].item():g} (of sample {place}) is no whole number.")
    found = values.long()
    if not len(found):
        return found
    low, high = (int(value) for value in found.aminmax())
    if low >= 0 and high < num_classes:
        return found
    wrong = (found < 0) | (found >= num_classes)
    if ignored is not None and not (wrong := wrong & (found != ignored)).any():
        return found
    place = int(wrong.nonzero()[0])
    raise ValueError(
        f"label {int(found[place])} (of sample {place}) is no class of the task, which has {num_classes}: labels range "
        f"from 0 to {num_classes - 1} within a task.{_hint(low, high, num_classes, offset)}"
    )


def _hint(low: int, high: int, num_classes: int, offset: int) -> str:
    if offset and offset <= low and high < offset + num_classes:
        return f" These seem to be numbered across all tasks: subtract {offset}."
    if low >= 1 and high == num_classes:
        return " These seem to count from 1: subtract 1."
    return ""


def _as_tensor(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        if labels.is_complex():
            raise ValueError(f"labels must be whole numbers; got {labels.dtype}.")
        return labels
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels must be a tensor, an array or a list of whole numbers: {error}.") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"labels must be whole numbers; got a {type(labels).__name__} of {array.dtype}.")
    return torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
