"""Data loader over tensors in memory that can resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pl_personalize.datamodules.labelled_images import ImageRows, permutation
from pl_personalize.functional.seeding import derive_seed

T = TypeVar("T")
Transform = Callable[[Tensor, int | None], Tensor]
"""Converts a batch of stored images (n, …) to network inputs, given the seed of its randomness or ``None`` for none."""


class TensorBatches(Dataset[Any]):
    """Dataset of tensors of one length, indexed by whole batches: tuples, or tensors if there is only one."""

    def __init__(
        self, *tensors: Tensor | ImageRows, transform: Transform | None = None, augment_seed: int | None = None
    ) -> None:
        if not tensors or len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(f"Tensors must be of one length; got {[tuple(tensor.shape) for tensor in tensors]}.")
        self.tensors, self.transform, self.augment_seed = tensors, transform, augment_seed

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        rows = self._cut(torch.tensor([index]), None)
        return tuple(row[0] for row in rows) if isinstance(rows, tuple) else rows[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self._cut(torch.as_tensor(indices), None)

    def batch(self, indices: Sequence[int], *place: int) -> Any:
        """Batch at a place in the training, on which the randomness of the transform depends."""
        seed = None if self.augment_seed is None else derive_seed(self.augment_seed, *place)
        return self._cut(torch.as_tensor(indices), seed)

    def _cut(self, indices: Tensor, seed: int | None) -> Any:
        images, *others = (tensor[indices] for tensor in self.tensors)
        if self.transform is not None:
            images = self.transform(images, seed)
        return (images, *others) if others else images


class TaskSampler(DistributedSampler[Any]):
    """Order of an epoch as a function of only the seed and the epoch, divided among processes.

    A subclass of :class:`~torch.utils.data.DistributedSampler`, so that Lightning uses it unchanged and sets the epoch.
    """

    def __init__(self, dataset: Dataset[Any], *, shuffle: bool, seed: int, repeat: bool) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        replicas, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.repeat = repeat

    def __iter__(self) -> Iterator[int]:
        n: int = len(self.dataset)  # type: ignore[arg-type]
        order = permutation(n, self.seed, self.epoch).tolist() if self.shuffle else list(range(n))
        if self.repeat and n:
            order += [order[k % n] for k in range(-n % self.num_replicas)]
        return iter(order[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        n: int = len(self.dataset)  # type: ignore[arg-type]
        count = n + (-n % self.num_replicas if self.repeat and n else 0)
        return len(range(self.rank, count, self.num_replicas))


class TensorLoader(DataLoader[Any]):
    """Loader of :class:`TensorBatches` whose position in an epoch is part of checkpoints; it uses no worker processes.

    Lightning saves and restores the state. With a :class:`TaskSampler`, a resumed epoch yields the remaining batches
    of the interrupted one in the same order.
    """

    _place: dict[str, int] | None = None
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that the epoch is read with the first batch, after Lightning has set it.
        start, resume = 0, self._resume
        if resume is not None and resume["epoch"] == self._epoch and resume["position"] < len(self):
            start = resume["position"]
        self._resume = None
        dataset: Any = self.dataset
        rank = int(getattr(self.sampler, "rank", 0))
        for position, indices in enumerate(self.batch_sampler or ()):
            if position < start:
                continue
            self._place = {"epoch": self._epoch, "position": position + 1}
            yield dataset.batch(indices, self._epoch, position, rank)

    @property
    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches yielded in it."""
        return dict(self._resume or self._place or {"epoch": self._epoch, "position": 0})

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next pass over the same epoch after the batches already yielded."""
        self._resume = {"epoch": int(state_dict["epoch"]), "position": int(state_dict["position"])}


def as_is(batch: T) -> T:
    """Collate function for data that is already batched."""
    return batch


def tensor_loader(
    *tensors: Tensor | ImageRows,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    repeat: bool = False,
    transform: Transform | None = None,
    augment: bool = False,
) -> TensorLoader:
    """:class:`TensorLoader` over ``tensors``; the last batch may be smaller.

    Args:
        tensors: As for :class:`TensorBatches`, like ``transform``.
        batch_size: Batch size per process.
        shuffle: As for :class:`TaskSampler`, like ``seed`` and ``repeat``.
        seed: Seed of the orders and of the augmentation.
        repeat: Whether all processes get the same number of samples.
        transform: Transform of a batch of images.
        augment: Whether the transform may be random, as a function of the seed, the epoch, the batch's position and the
            process; a resumed run repeats it.
    """
    dataset = TensorBatches(*tensors, transform=transform, augment_seed=seed if augment else None)
    sampler = TaskSampler(dataset, shuffle=shuffle, seed=seed, repeat=repeat)
    return TensorLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=as_is)
