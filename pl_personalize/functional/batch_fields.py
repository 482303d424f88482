"""The fields of a batch, how many samples each speaks of, and taking samples out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Size, Tensor
from torch.nn.utils.rnn import PackedSequence

Readings = frozenset[int]


def items_of(field: Any) -> list[tuple[str, Any]] | None:
    """The parts of a dict, a tuple, a list or a dataclass, each with what it is called; ``None`` of anything else."""
    if isinstance(field, Mapping):
        return [(repr(key), value) for key, value in field.items()]
    if isinstance(field, PackedSequence):  # its tensors have no dimension of the samples
        return None
    if isinstance(field, tuple) and hasattr(field, "_fields"):
        return [(repr(name), value) for name, value in zip(field._fields, field, strict=True)]
    if isinstance(field, list | tuple) and not isinstance(field, Size):
        return [(f"item {k}", value) for k, value in enumerate(field)]
    if is_dataclass(field) and not isinstance(field, type):
        return [(repr(part.name), getattr(field, part.name)) for part in fields(field)]
    return None


def is_listed(field: Any) -> bool:
    """Whether a field is a list or a plain tuple, which may hold one item for each sample."""
    return isinstance(field, list | tuple) and not hasattr(field, "_fields") and not isinstance(field, Size)


def readings(field: Any) -> Readings | None:
    """The numbers of samples for which a field may be read; ``None`` of one that says nothing of it.

    A tensor says its first dimension. A list of things that are alike may hold one for each sample, as a detector's
    images, or several inputs that have the samples in their first dimension: it offers both.
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
    """What all fields that say anything can be read as; empty if they disagree.

    A size of 1 behind a larger one is that of something which is the same for all samples. The first field is the
    input, or a part of it, and no such thing.
    """
    speaking = [one for one in said if one is not None]
    if not speaking:
        return None
    return frozenset.intersection(speaking[0], *(one for one in speaking[1:] if one != {1}))


def _are_alike(items: list[Any]) -> bool:
    """Whether they may be one thing of several samples: of one type, and tensors of as many dimensions."""
    if any(isinstance(item, Tensor) for item in items):
        return len({(type(item), getattr(item, "dtype", None), getattr(item, "ndim", None)) for item in items}) == 1
    return len({type(item) for item in items}) == 1 or all(items_of(item) is None for item in items)


def may_be_samples(batch: list[Any]) -> bool:
    """Whether a list that is a batch looks like one of samples, rather than of fields: images, dicts, or tuples."""
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
    """A batch of ``size`` samples with other things in the place of what it has of each sample.

    Args:
        batch: The batch; it is left alone.
        size: Its number of samples.
        on_rows: From a tensor whose first dimension is the samples to what takes its place.
        on_items: The same of a list or a tuple with one item for each sample.
    """
    has_rows = any(tensor.shape[:1] == (size,) for tensor in _tensors_outside_of_lists(batch))

    def visit(field: Any) -> Any:
        if isinstance(field, Tensor):
            return on_rows(field) if field.shape[:1] == (size,) else field
        if is_listed(field) and field is not batch and _holds_samples(field, size, has_rows):
            return on_items(field)
        if not isinstance(field, list | tuple) or isinstance(field, Size):
            return field
        items = [apply_to_collection(item, (Tensor, list, tuple), visit) for item in field]
        return type(field)(*items) if hasattr(field, "_fields") else type(field)(items)

    return apply_to_collection(batch, (Tensor, list, tuple), visit)


def _holds_samples(field: Any, size: int, has_rows: bool) -> bool:
    if len(field) != size or not _are_alike(list(field)):
        return False
    as_inputs = agreed([readings(item) for item in field])
    # As many inputs as samples: whoever stacks the samples of one field does not list those of another.
    return as_inputs is None or size not in as_inputs or not has_rows


def _tensors_outside_of_lists(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for _, item in items_of(batch) or ():
        if not is_listed(item):
            yield from _tensors_outside_of_lists(item)
