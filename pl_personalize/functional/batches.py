"""What a batch is: a tensor, a tuple or list whose first item is the input, or a dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def batch_tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def batch_size(batch: Any) -> int:
    """Number of samples: the length of the batch's first tensor.

    Raises:
        ValueError: If the batch has no tensor with at least one dimension.
    """
    for tensor in batch_tensors(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError(f"A batch must hold at least one tensor with a batch dimension; got {type(batch).__name__}.")


def batch_labels(batch: Any) -> Tensor:
    """The labels of a batch: the second item of a tuple or list, or the entry of a dict named in ``LABEL_KEYS``.

    Raises:
        ValueError: If there are none.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"The true labels are needed, and the batch ({type(batch).__name__}) has none: give (input, labels) or a "
            f"dict with one of the keys {', '.join(LABEL_KEYS)}, or choose a kind that needs no labels."
        )
    return labels


def call_model(model: torch.nn.Module, batch: Any) -> Any:
    """Call ``model`` on the input of ``batch``; a dict becomes keyword arguments, without its labels."""
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        try:
            return model(**inputs)
        except TypeError as error:
            raise ValueError(
                f"The entries {list(inputs)} of a batch do not fit as keyword arguments of {type(model).__name__}: "
                f"{error}. Say how logits are computed: forward=lambda model, batch: ..."
            ) from error
    return model(as_input(batch))


def as_input(batch: Any) -> Any:
    """The input in a batch that is no dict: the tensor itself, or the first item."""
    return batch if isinstance(batch, Tensor) else batch[0]


def as_logits(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, its ``.logits``, or its entry ``"logits"``.

    Raises:
        ValueError: If there are none.
    """
    if not isinstance(output, Tensor):
        output = (
            output["logits"]
            if isinstance(output, Mapping) and "logits" in output
            else getattr(output, "logits", output)
        )
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise ValueError(
            f"The model must return logits with a batch dimension, or an object with `.logits`; it returned a "
            f"{type(output).__name__}. Pass forward=lambda model, batch: ... to say how logits are computed."
        )
    return output


def check_logits(logits: Tensor, num_samples: int) -> None:
    """Refuse logits from which no importance follows.

    Raises:
        ValueError: If there is not one row for each sample, or an entry is NaN or infinite.
    """
    if logits.shape[0] != num_samples:
        raise ValueError(f"The model returned {logits.shape[0]} rows of logits for {num_samples} samples.")
    if not torch.isfinite(logits).all():
        raise ValueError("The model's output has NaN or infinite entries; its importances are not defined.")


def split_batch(batch: Any, num_samples: int) -> list[Tensor]:
    """The tensors of a batch that have one row for each sample."""
    return [tensor for tensor in batch_tensors(batch) if tensor.dim() > 0 and tensor.shape[0] == num_samples]


def join_batch(batch: Any, num_samples: int, rows: Sequence[Tensor]) -> Any:
    """``batch`` with the tensors of :func:`split_batch` replaced by ``rows``, in order."""
    remaining: Iterator[Tensor] = iter(rows)

    def replace(tensor: Tensor) -> Tensor:
        return next(remaining) if tensor.dim() > 0 and tensor.shape[0] == num_samples else tensor

    return apply_to_collection(batch, Tensor, replace)


def slice_batch(batch: Any, num_samples: int, rows: slice | list[int]) -> Any:
    """The samples ``rows`` of a batch, still with a batch dimension."""
    return join_batch(batch, num_samples, [tensor[rows] for tensor in split_batch(batch, num_samples)])


def copy_batch(batch: Any) -> Any:
    """A batch that a model may change in place."""
    return apply_to_collection(batch, Tensor, Tensor.clone)


def _form(batch: Any) -> Any:
    """What a batch is beside the tensors that have a row for each sample, in order."""
    size = batch_size(batch)
    form = apply_to_collection(batch, Tensor, lambda t: t.shape[1:] if t.dim() and t.shape[0] == size else t.tolist())
    return list(form.items()) if isinstance(form, Mapping) else form


def concatenate_batches(batches: Sequence[Any]) -> Any | None:
    """Several batches as one, or ``None`` where they do not fit together."""
    sizes = [batch_size(batch) for batch in batches]
    rows = [split_batch(batch, size) for batch, size in zip(batches, sizes, strict=True)]
    shapes = {tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors) for tensors in rows}
    try:
        alike = len(shapes) == 1 and all(bool(_form(batch) == _form(batches[0])) for batch in batches)
    except (ValueError, RuntimeError):  # things that cannot be compared, such as arrays
        alike = False
    if not alike:
        return None
    return join_batch(batches[0], sizes[0], [torch.cat(column) for column in zip(*rows, strict=True)])
