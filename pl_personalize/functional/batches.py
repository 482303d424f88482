"""Batches: a tensor, a tuple or list whose first item is the input, or a dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from pl_personalize.functional.batch_fields import (
    agreed,
    is_listed,
    items_of,
    map_samples,
    map_tensors,
    may_be_samples,
    readings,
)
from pl_personalize.functional.names import some

Forward = Callable[[torch.nn.Module, Any], Any]
"""How a model is called on a batch: ``(model, batch) -> output``."""
LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def batch_tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def batch_size(batch: Any) -> int:
    """Number of samples, on which all fields of a batch agree.

    A field is a tensor with the samples in its first dimension; a list or tuple with one item per sample, such as the
    images of a detector or their names; or, like the batch itself, a dict, dataclass, list or tuple of fields. Numbers,
    strings and tensors without dimensions are ignored, and so is a first dimension of 1 beside larger ones, which
    broadcasts, except in the input (the first item, or the entry of a dict named in ``INPUT_KEYS``). If only the labels
    disagree, such as the boxes of all images in one tensor, the other fields decide.

    Raises:
        ValueError: If no field tells the number, fields disagree, or several numbers are possible.
    """
    if isinstance(batch, Tensor) and batch.dim() > 0:
        return batch.shape[0]
    parts = items_of(batch) or []
    said = {name: readings(field) for name, field in parts}
    found = agreed(list(said.values())) or agreed([said[name] for name in _without_labels(batch, list(said))])
    if found is None:
        raise ValueError(f"A batch must hold at least one tensor with a batch dimension; got {type(batch).__name__}.")
    if isinstance(batch, list) and may_be_samples(batch):
        found = found | {len(batch)}
    if len(found) > 1:  # a list of non-tensors, such as a detector's targets, holds one item per sample
        listed = [len(part) for _, part in parts if is_listed(part) and part and not isinstance(part[0], Tensor)]
        likely = found.intersection(listed)
        found = likely if len(likely) == 1 and not isinstance(batch, list) else found
    if len(found) == 1:
        return next(iter(found))
    sizes = some(f"{name}: {_or(sizes)}" for name, sizes in said.items() if sizes is not None)
    if not found:
        raise ValueError(
            f"The fields of a batch disagree on its number of samples ({sizes}). Each needs one entry per sample, in "
            "its first dimension or in a list. Leave other data out of the batch; forward= can pass it to the model."
        )
    raise ValueError(
        f"A batch ({type(batch).__name__}) may be one of {_or(found)} samples ({sizes}). Stack tensors of single "
        "samples, or add a field with one entry per sample, such as a list of names."
    )


def _without_labels(batch: Any, names: list[str]) -> list[str]:
    """Names of the fields other than labels, which may have any form, such as the boxes of all images."""
    if isinstance(batch, Mapping):
        return [name for name in names if name not in map(repr, LABEL_KEYS)]
    return names[:1] if isinstance(batch, list | tuple) and len(names) == 2 else names


def _or(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(sizes))) or "several sizes"


Labels = Callable[[Any], Tensor] | int | str


def batch_labels(batch: Any, labels: Labels | None = None) -> Tensor:
    """Labels of a batch.

    ``labels`` is a function ``batch -> labels``, an index, a key, or an attribute name. By default, they are the second
    of two items, or the entry of a dict named in ``LABEL_KEYS``.

    Raises:
        ValueError: If there are none, or several candidates.
    """
    kind = type(batch).__name__
    if labels is None:
        return _as_labels(_usual_labels(batch), f"the batch ({kind}) has none")
    if callable(labels):
        return _as_labels(labels(batch), f"labels= returned no tensor for a batch ({kind})")
    try:
        found: Any = batch[labels] if isinstance(batch, Mapping | Sequence) else None  # type: ignore[index]
    except (LookupError, TypeError):
        found = None
    if found is None and isinstance(labels, str):
        found = getattr(batch, labels, None)
    return _as_labels(found, f"the batch ({kind}) has no tensor {labels!r}")


def _usual_labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        keys = [key for key in LABEL_KEYS if key in batch]
        if len({id(batch[key]) for key in keys}) > 1:
            raise ValueError(f"The batch has {' and '.join(keys)}: pass labels= to select its labels.")
        return batch[keys[0]] if keys else None
    if isinstance(batch, Sequence) and len(batch) > 2:
        raise ValueError(
            f"The true labels are needed, and their place in a batch of {len(batch)} items ({type(batch).__name__}) is "
            "ambiguous: pass labels=2, for example, or labels=lambda batch: batch[2]."
        )
    return batch[1] if isinstance(batch, Sequence) and len(batch) == 2 else None


def _as_labels(found: Any, problem: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    raise ValueError(
        f"The true labels are needed, and {problem}: pass (input, labels), a dict with one of the keys "
        f"{', '.join(LABEL_KEYS)}, or labels=lambda batch: ...; or choose a kind that needs none."
    )


def call_model(model: torch.nn.Module, batch: Any, label_key: Any = None) -> Any:
    """Call ``model`` on the input of ``batch``; a dict is passed as keyword arguments, without its labels."""
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in (*LABEL_KEYS, label_key)}
        try:
            return model(**inputs)
        except TypeError as error:
            raise ValueError(
                f"The entries {list(inputs)} of a batch do not fit as keyword arguments of {type(model).__name__}: "
                f"{error}. Pass forward=lambda model, batch: ... to compute the logits."
            ) from error
    return model(as_input(batch))


def as_input(batch: Any) -> Any:
    """Input of a batch other than a dict: the tensor itself, or the first item of a sequence."""
    if not isinstance(batch, Tensor | Sequence):
        raise ValueError(
            f"The input in a batch of type {type(batch).__name__} is unknown: pass forward=lambda model, batch: ... to "
            "call the model on it."
        )
    if (
        isinstance(batch, list)
        and len(batch) > 2
        and all(isinstance(item, Tensor) and item.is_floating_point() and item.dim() > 3 for item in batch)
    ):
        raise ValueError(
            f"A batch that is a list of {len(batch)} tensors, the first of shape {tuple(batch[0].shape)}, may hold one "
            "sample in each, such as clips, or several inputs. Stack samples; for several inputs pass "
            "forward=lambda model, batch: ... to call the model on them."
        )
    return batch if isinstance(batch, Tensor) else batch[0]


def as_logits(output: Any) -> Tensor:
    """Logits in a model's output: the tensor itself, its ``.logits``, or its entry ``"logits"``."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise ValueError(
            f"The model must return logits with a batch dimension, or an object with `.logits`; it returned a "
            f"{type(output).__name__}. Pass forward=lambda model, batch: ... to compute the logits."
        )
    return output


def check_logits(logits: Tensor, num_samples: int) -> None:
    """Raise a ``ValueError`` unless there is one row of logits per sample, and all are finite."""
    if logits.shape[0] != num_samples:
        raise ValueError(f"The model returned {logits.shape[0]} rows of logits for {num_samples} samples.")
    if not torch.isfinite(logits).all():
        raise ValueError("The model's output has NaN or infinite entries, so its importances are undefined.")


def split_batch(batch: Any, num_samples: int) -> list[Tensor]:
    """The tensors of a batch that have one row per sample."""
    found: list[Tensor] = []
    map_samples(batch, num_samples, found.append)
    return found


def join_batch(batch: Any, num_samples: int, rows: Sequence[Tensor]) -> Any:
    """``batch`` with the tensors of :func:`split_batch` replaced by ``rows``, in order."""
    remaining: Iterator[Tensor] = iter(rows)
    return map_samples(batch, num_samples, lambda tensor: next(remaining))


def slice_batch(batch: Any, num_samples: int, rows: slice | list[int]) -> Any:
    """The samples ``rows`` of a batch, still with a batch dimension."""

    def take(items: Any) -> Any:
        return items[rows] if isinstance(rows, slice) else type(items)(items[k] for k in rows)

    return map_samples(batch, num_samples, lambda tensor: tensor[rows], take)


def has_listed_samples(batch: Any, num_samples: int) -> bool:
    """Whether tensors of samples are in a list, and so may have different shapes."""
    lists: list[Any] = []
    map_samples(batch, num_samples, lambda tensor: tensor, lists.append)
    return bool(batch_tensors(lists))


def copy_batch(batch: Any) -> Any:
    """A copy of a batch that a model may change in place."""
    return map_tensors(batch, Tensor.clone)


def are_same(batch: Any, other: Any) -> bool:
    """Whether two batches are equal; objects that cannot be compared, such as arrays, count as different."""
    tensors = [batch_tensors(batch), batch_tensors(other)]
    try:
        return (
            len(tensors[0]) == len(tensors[1])
            and all(map(torch.equal, *tensors))
            and bool(_without_tensors(batch) == _without_tensors(other))
        )
    except (ValueError, RuntimeError):
        return False


def _without_tensors(batch: Any) -> Any:
    rest = apply_to_collection(batch, Tensor, lambda tensor: None)
    return list(rest.items()) if isinstance(rest, Mapping) else rest


def concatenate_batches(batches: Sequence[Any]) -> Any | None:
    """Several batches as one, or ``None`` if they do not fit together."""
    sizes = [batch_size(batch) for batch in batches]
    rows: list[list[Tensor]] = [[] for _ in batches]
    lists: list[list[Any]] = [[] for _ in batches]
    rest = [map_samples(batches[k], sizes[k], rows[k].append, lists[k].append) for k in range(len(batches))]
    alike = {tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors) for tensors in rows}
    types = {tuple(map(type, some_lists)) for some_lists in lists}
    if len(alike) != 1 or len(types) != 1 or not all(are_same(rest[0], other) for other in rest):
        return None
    columns, longer = iter(zip(*rows, strict=True)), iter(zip(*lists, strict=True))
    return map_samples(
        batches[0],
        sizes[0],
        lambda tensor: torch.cat(next(columns)),
        lambda items: type(items)(chain.from_iterable(next(longer))),
    )
