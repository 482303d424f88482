"""The data of a pass that a callback makes on its own: in order, each sample once, divided among processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from math import inf
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from pl_personalize.functional.batches import batch_size, slice_batch


class PassOverData:
    """Several loaders one after the other, each sample once; each batch is brought to the device as by the Trainer.

    Args:
        trainer: Whose processes share the data.
        loaders: Where the data come from.
        limits: Batches to take from each loader; infinity for all.

    Raises:
        MisconfigurationException: If a loader cannot be divided among several processes.
    """

    def __init__(self, trainer: Trainer, loaders: Sequence[Iterable[Any]], limits: Sequence[float]) -> None:
        self._trainer = trainer
        self._limits = [None if limit == inf else int(limit) for limit in limits]
        self._loaders = [_unrepeated(loader, trainer) for loader in loaders]

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        for batch in chain.from_iterable(
            islice(iter(loader), limit) for loader, limit in zip(self._loaders, self._limits, strict=True)
        ):
            yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)

    def __len__(self) -> int:
        return sum(len(loader) for loader in self._loaders)  # type: ignore[arg-type, misc]


def _unrepeated(loader: Iterable[Any], trainer: Trainer) -> Iterable[Any]:
    """The loader's data in order, each sample once, over all ranks; other iterables as they are."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"{type(loader).__name__} cannot be divided among {trainer.world_size} processes; give a DataLoader "
                "with a map-style dataset."
            )
        return loader
    dataset: Any = loader.dataset
    if isinstance(sampler := _original_sampler(loader), SubsetRandomSampler):
        dataset = Subset(dataset, sorted(sampler.indices))
    by_batch = loader.batch_size is None and loader.batch_sampler is None  # the dataset's items are batches
    return DataLoader(
        dataset,
        batch_size=None if by_batch else loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1),
        sampler=range(trainer.global_rank, len(dataset), trainer.world_size),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def _original_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler below those that Lightning puts around it for prediction and for several processes."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    while (inner := getattr(getattr(sampler, "dataset", None), "_sampler", None)) is not None:
        sampler = inner
    return sampler


def can_be_read_again(loader: Iterable[Any]) -> bool:
    """Whether a look at the first batch leaves the data as they were: not for an iterator or a stream."""
    return not isinstance(loader, Iterator) and not isinstance(getattr(loader, "dataset", None), IterableDataset)


def two_samples(batches: Iterable[Any]) -> Iterator[Any]:
    """The first two samples of each batch, to try something out."""
    for batch in batches:
        yield slice_batch(batch, batch_size(batch), slice(0, 2))
