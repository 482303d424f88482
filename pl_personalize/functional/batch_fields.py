"""Fields of a batch: their number of samples, and selection of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Size, Tensor
from torch.nn.utils.rnn import PackedSequence

Readings = frozenset[int]
INPUT_KEYS = ("input", "inputs", "input_ids", "pixel_values", "image", "images")
_PACKED = (
    "A PackedSequence cannot be divided into samples: pass padded sequences and their lengths, and pack them in the "
    "model or in forward=."
)


def items_of(field: Any) -> list[tuple[str, Any]] | None:
    """Names and values of the parts of a dict, tuple, list or dataclass; ``None`` for anything else.

    Those of a dict start with its input, then those that may be constants (see :func:`agreed`) come last: its order
    has no meaning.
    """
    if isinstance(field, Mapping):
        ordered = sorted(
            field.items(), key=lambda item: (item[0] not in INPUT_KEYS, readings(item[1]) == frozenset([1]))
        )
        return [(repr(key), value) for key, value in ordered]
    if isinstance(field, PackedSequence):  # its tensors have no sample dimension
        return None
    if isinstance(field, tuple) and hasattr(field, "_fields"):
        return [(repr(name), value) for name, value in zip(field._fields, field, strict=True)]
    if isinstance(field, list | tuple) and not isinstance(field, Size):
        return [(f"item {k}", value) for k, value in enumerate(field)]
    if is_dataclass(field) and not isinstance(field, type):
        return [(repr(part.name), getattr(field, part.name)) for part in fields(field)]
    return None


def is_listed(field: Any) -> bool:
    """Whether a field is a list or a plain tuple, which may hold one item per sample."""
    return isinstance(field, list | tuple) and not hasattr(field, "_fields") and not isinstance(field, Size)


def readings(field: Any) -> Readings | None:
    """Possible numbers of samples in a field; ``None`` if it does not tell.

    For a tensor, its first dimension. A list of similar items may hold one per sample, like a detector's images, or
    several inputs with the samples in their first dimension, so both numbers are possible.
    """
    if isinstance(field, Tensor):
        return frozenset(field.shape[:1]) or None
    parts = items_of(field)
    if not parts:
        return None
    items = [item for _, item in parts]
    found = agreed([readings(item) for item in items])
    if not is_listed(field) or not _are_alike(items):
        return found
    return frozenset([len(items)]) | (found or frozenset())


def agreed(said: list[Readings | None]) -> Readings | None:
    """Numbers of samples that all fields allow; empty if they disagree, ``None`` if none tells.

    A size of 1 in any field but the first, which holds the input, stands for something shared by all samples.
    """
    speaking = [one for one in said if one is not None]
    if not speaking:
        return None
    return frozenset.intersection(speaking[0], *(one for one in speaking[1:] if one != {1}))


def _are_alike(items: list[Any]) -> bool:
    """Whether items have one type, and tensors one number of dimensions, so that they may belong to several samples."""
    if any(isinstance(item, Tensor) for item in items):
        return len({(type(item), getattr(item, "dtype", None), getattr(item, "ndim", None)) for item in items}) == 1
    return len({type(item) for item in items}) == 1 or all(items_of(item) is None for item in items)


def may_be_samples(batch: list[Any]) -> bool:
    """Whether a batch that is a list looks like one of samples (images, dicts or tuples) rather than of fields."""
    if len(batch) < 2 or not _are_alike(batch):
        return False
    first = batch[0]
    if isinstance(first, Mapping) and any(item.keys() != first.keys() for item in batch):
        return False
    is_image = isinstance(first, Tensor) and first.is_floating_point() and first.dim() == 3
    return (is_image and len(batch) > 2) or items_of(first) is not None


def map_samples(
    batch: Any, size: int, on_rows: Callable[[Tensor], Any], on_items: Callable[[Any], Any] = lambda items: items
) -> Any:
    """A copy of a batch of ``size`` samples in which the parts that hold samples are replaced.

    ``on_rows`` maps tensors with the samples in their first dimension, ``on_items`` lists or tuples with one item each.
    """
    has_rows = any(tensor.shape[:1] == (size,) for tensor in _tensors_outside_of_lists(batch))

    def visit(field: Any) -> Any:
        if isinstance(field, Tensor):
            return on_rows(field) if field.shape[:1] == (size,) else field
        if isinstance(field, PackedSequence):
            raise ValueError(_PACKED)
        if is_listed(field) and field is not batch and _holds_samples(field, size, has_rows):
            return on_items(field)
        if not isinstance(field, list | tuple) or isinstance(field, Size):
            return field
        items = [apply_to_collection(item, (Tensor, list, tuple), visit) for item in field]
        return type(field)(*items) if hasattr(field, "_fields") else type(field)(items)

    return apply_to_collection(batch, (Tensor, list, tuple), visit)


def map_tensors(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of a batch in which each tensor is changed; a ``PackedSequence`` is an error."""

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(part)
        raise ValueError(_PACKED)

    return apply_to_collection(batch, (Tensor, PackedSequence), visit)


def _holds_samples(field: Any, size: int, has_rows: bool) -> bool:
    if len(field) != size or not _are_alike(list(field)):
        return False
    as_inputs = agreed([readings(item) for item in field])
    # As many inputs as samples: samples are either stacked in all fields or listed in all.
    return as_inputs is None or size not in as_inputs or not has_rows


def _tensors_outside_of_lists(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for _, item in items_of(batch) or ():
        if not is_listed(item):
            yield from _tensors_outside_of_lists(item)
