"""Passes over a user's data: the batches that the user's loaders yield, divided among processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from math import inf
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.distributed import _DatasetSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from pl_personalize.functional.batches import batch_size, copy_batch, slice_batch
from pl_personalize.per_sample.module_state import random_state_kept


class PassOverData:
    """The batches of several loaders, one loader after the other, on the device and converted by the Trainer.

    Each loader is read as it is: its class, samplers and workers. Samplers and generators are copied where possible, so
    that training draws the same batches with and without the pass.

    With several processes each sample is read once: a loader with a ``DistributedSampler`` yields the share of its
    process, without the samples repeated to fill it up. The batches of any other loader are those that rank zero draws,
    every n-th for one process.
    """

    def __init__(
        self,
        trainer: Trainer,
        loaders: Sequence[Iterable[Any]],
        limits: Sequence[float],
        *,
        again: bool = False,
        stages: Sequence[RunningStage] | None = None,
    ) -> None:
        self._trainer, self._again = trainer, again
        self._stages: list[RunningStage | None] = [None] * len(loaders) if stages is None else [*stages]
        self._limits = [None if limit == inf else int(limit) for limit in limits]
        with random_state_kept(torch.device("cpu")):  # a sampler that is read here draws what it would have drawn
            self._loaders = [_share(loader, trainer) for loader in loaders]

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        for place, (loader, limit) in enumerate(zip(self._loaders, self._limits, strict=True)):
            index = self._stages[:place].count(self._stages[place])  # of the loader within its stage, as in the run
            if self._again and isinstance(loader, Iterator):
                loader = self._loaders[place] = list(islice(loader, limit))
            for batch in islice(loader, limit):
                with _in_stage(trainer, self._stages[place]):
                    batch = trainer.precision_plugin.convert_input(batch)
                    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=index)
                    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=index)
                yield batch

    def __len__(self) -> int:
        lengths = [sized_len(loader) for loader in self._loaders]
        if None in lengths:
            raise TypeError("A loader has no length.")
        known = [length or 0 for length in lengths]
        return sum(n if limit is None else min(n, limit) for n, limit in zip(known, self._limits, strict=True))


@contextmanager
def _in_stage(trainer: Trainer, stage: RunningStage | None) -> Iterator[None]:
    """Set the stage that ``trainer.training`` and its like report."""
    before = trainer.state.stage
    trainer.state.stage = before if stage is None else stage
    try:
        yield
    finally:
        trainer.state.stage = before


def as_list(loaders: Any) -> list[Iterable[Any]]:
    """Flatten a loader, or any nesting of lists and dicts of loaders."""
    if isinstance(loaders, CombinedLoader):
        return list(loaders.flattened)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [loader for part in loaders for loader in as_list(part)]
    return [loaders]


def refuse_dropped_samplers(trainer: Trainer) -> None:
    """Refuse predict loaders with a sampler inside their batch sampler, which Lightning replaces by all samples."""
    with random_state_kept(torch.device("cpu")):  # the hook may draw, such as a split of the data
        every = as_list(trainer.predict_loop._data_source.dataloader())
    for given, used in zip(every, as_list(trainer.predict_dataloaders), strict=False):
        wanted, taken = (getattr(getattr(loader, "batch_sampler", None), "sampler", None) for loader in (given, used))
        if isinstance(taken, DistributedSampler) and isinstance(taken.dataset, _DatasetSamplerWrapper):
            taken = taken.dataset._sampler
        is_same = type(wanted) is SequentialSampler and len(wanted) == len(taken or ())
        if wanted is not None and isinstance(taken, SequentialSampler) and not is_same:
            outer = type(getattr(given, "batch_sampler", None)).__name__
            raise ValueError(
                f"Lightning predicts all samples of a loader that has a {type(wanted).__name__} inside a {outer}. "
                "Pass the sampler itself: DataLoader(…, sampler=, batch_size=)."
            )


def refuse_iterators(loaders: Iterable[Iterable[Any]]) -> None:
    """Refuse iterators among the data of the run: a pass may consume them."""
    for loader in loaders:
        if isinstance(loader, Iterator):
            raise ValueError(
                f"the data of the run are a {type(loader).__name__}, an iterator (it has __next__), which may be read "
                "once only: by the run or by a pass. Use a DataLoader, a list of batches, or an object without "
                "__next__ whose __iter__ returns a new iterator. Callbacks with dataloader= can read other data."
            )


def can_be_tried_out(loader: Iterable[Any]) -> bool:
    """Whether reading a batch leaves no trace: true for lists, and DataLoaders of torch's class without a stream."""
    if not isinstance(loader, DataLoader):
        return isinstance(loader, list | tuple)
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)


def parts_of_batch(loaders: Any, batch: Any) -> list[Any]:
    """The part of a training batch that comes from each of the loaders, in the order of :func:`as_list`."""
    if isinstance(loaders, Mapping):
        return [part for name, loader in loaders.items() for part in parts_of_batch(loader, batch[name])]
    if isinstance(loaders, list | tuple):
        return [part for loader, own in zip(loaders, batch, strict=True) for part in parts_of_batch(loader, own)]
    return [batch]


def two_samples(batches: Iterable[Any]) -> Iterator[Any]:
    """A copy of the first two samples of each batch."""
    for batch in batches:
        yield copy_batch(slice_batch(batch, batch_size(batch), slice(0, 2)))


def _share(loader: Iterable[Any], trainer: Trainer) -> Iterable[Any]:
    """This process's share of a loader."""
    if trainer.world_size == 1:
        return _copy(loader, trainer) if isinstance(loader, DataLoader) else loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise _not_divisible(loader, trainer, "give a DataLoader with a map-style dataset")
    copied = _copy(loader, trainer)
    batch_sampler = copied.batch_sampler
    sampler: Any = copied.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        indices = _unrepeated(sampler, trainer)
        if batch_sampler is None:
            return _with(copied, sampler=indices)
        batch_sampler = copy.copy(batch_sampler)
        batch_sampler.sampler = indices  # type: ignore[attr-defined]
        return _with(copied, batch_sampler=batch_sampler)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise _not_divisible(loader, trainer, "it overrides __iter__; give it a DistributedSampler")
    name = "sampler" if batch_sampler is None else "batch_sampler"
    drawn = _of_rank_zero(trainer, getattr(copied, name))
    return _with(copied, **{name: drawn[trainer.global_rank :: trainer.world_size]})


def _not_divisible(loader: Iterable[Any], trainer: Trainer, advice: str) -> ValueError:
    return ValueError(f"{type(loader).__name__} cannot be divided among {trainer.world_size} processes: {advice}.")


def _copy(loader: DataLoader[Any], trainer: Trainer) -> DataLoader[Any]:
    """Copy a loader with its samplers, where these can be copied; the data are shared."""
    names: Mapping[str, Any] = vars(loader)
    position = {name: names[name] for name in ("sampler", "batch_sampler", "generator") if name in names}
    if isinstance(wrapper := position.get("batch_sampler"), _IndexBatchSamplerWrapper):
        position["batch_sampler"] = wrapper._batch_sampler  # it records indices for Lightning's prediction loop
    large = (loader.dataset, trainer, trainer.lightning_module, getattr(trainer, "datamodule", None))
    with suppress(Exception):  # a sampler may hold anything, such as a file or a lock
        position = copy.deepcopy(position, {id(shared): shared for shared in large})
    return _with(loader, **position)


def _with(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """Copy a loader with changed attributes, some of which a DataLoader refuses to have set."""
    copied = copy.copy(loader)
    vars(copied).update(changed, _iterator=None)
    return copied


def _unrepeated(sampler: DistributedSampler[Any], trainer: Trainer) -> list[int]:
    """This process's indices, without those repeated to fill it up."""
    size: int = len(sampler.dataset)  # type: ignore[arg-type]
    if isinstance(sampler.dataset, _DatasetSamplerWrapper):  # around a user's sampler
        return _of_rank_zero(trainer, sampler.dataset._sampler)[sampler.rank :: sampler.num_replicas]
    indices = list(sampler)
    # A user's subclass may repeat or omit samples: then nothing was filled up.
    is_filled_up = indices == list(DistributedSampler.__iter__(sampler))
    return indices[: len(range(sampler.rank, size, sampler.num_replicas))] if is_filled_up else indices


def _of_rank_zero(trainer: Trainer, sampler: Iterable[Any]) -> list[Any]:
    """The indices that rank zero draws, in every process."""
    drawn: Any = list(sampler) if trainer.global_rank == 0 else None
    return list(trainer.strategy.broadcast(drawn))
