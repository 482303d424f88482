"""A data loader over tensors in memory that a run can resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pl_personalize.datamodules.image_rows import ImageRows
from pl_personalize.functional.seeding import derive_seed

T = TypeVar("T")
Transform = Callable[[Tensor, int | None], Tensor]
"""What makes a batch of stored images (n, …) into what a network takes; with the seed of what is random in it, or
``None`` where nothing is."""


class TensorBatches(Dataset[Any]):
    """Tensors of one length, of which whole batches are cut by index: a tuple, or for a single tensor the tensor.

    Args:
        tensors: Images, and labels if there are any; (n, …) each.
        transform: What is done with the images of a batch, if anything.
        augment_seed: For :meth:`batch`, the seed of what is random in the transform; by default nothing is.

    Raises:
        ValueError: If there are none, or they differ in length.
    """

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
        """The batch at a place of a training; what is random in the transform depends on that."""
        seed = None if self.augment_seed is None else derive_seed(self.augment_seed, *place)
        return self._cut(torch.as_tensor(indices), seed)

    def _cut(self, indices: Tensor, seed: int | None) -> Any:
        images, *others = (tensor[indices] for tensor in self.tensors)
        if self.transform is not None:
            images = self.transform(images, seed)
        return (images, *others) if others else images


class TaskSampler(DistributedSampler[Any]):
    """The order of an epoch, as a function of the seed and the epoch alone; divided among processes.

    It is a :class:`~torch.utils.data.DistributedSampler`, so that Lightning takes it as it is and tells it the epoch.

    Args:
        dataset: What is sampled.
        shuffle: A new order for each epoch, else the dataset's.
        seed: What the orders depend on.
        repeat: Fill up, by repetition, so that all processes get the same number of samples. Training needs this;
            what is counted or summed must not have it.
    """

    def __init__(self, dataset: Dataset[Any], *, shuffle: bool, seed: int, repeat: bool) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        replicas, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if distributed else (1, 0)
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.repeat = repeat

    def __iter__(self) -> Iterator[int]:
        n: int = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(n, generator=generator).tolist() if self.shuffle else list(range(n))
        if self.repeat and n:
            order += [order[k % n] for k in range(-n % self.num_replicas)]
        return iter(order[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        n: int = len(self.dataset)  # type: ignore[arg-type]
        count = n + (-n % self.num_replicas if self.repeat and n else 0)
        return len(range(self.rank, count, self.num_replicas))


class TensorLoader(DataLoader[Any]):
    """Batches of a :class:`TensorBatches`, cut in this process; its place in an epoch is part of a checkpoint.

    Lightning saves and loads the state with its own checkpoints. With a :class:`TaskSampler` a resumed epoch has the
    rest of the batches that the interrupted one would have had, in the same order.
    """

    _place: dict[str, int] | None = None
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: it reads the epoch when the first batch is asked for, after Lightning has set it.
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
        """The epoch, and how many of its batches were handed out."""
        return dict(self._resume or self._place or {"epoch": self._epoch, "position": 0})

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next pass, if it is of the same epoch, after the batches that were handed out."""
        self._resume = {"epoch": int(state_dict["epoch"]), "position": int(state_dict["position"])}


def as_is(batch: T) -> T:
    """The collate function of data that comes as batches."""
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
    """A :class:`TensorLoader` over ``tensors``; the last batch may be smaller.

    Args:
        tensors: See :class:`TensorBatches`.
        batch_size: Samples in a batch, per process.
        shuffle: See :class:`TaskSampler`.
        seed: See there.
        repeat: See there.
        transform: See :class:`TensorBatches`.
        augment: Whether the transform may do what is random in it: as a function of the seed, the epoch, the batch's
            position in the epoch and the process, so that a resumed run has the same images.
    """
    dataset = TensorBatches(*tensors, transform=transform, augment_seed=seed if augment else None)
    sampler = TaskSampler(dataset, shuffle=shuffle, seed=seed, repeat=repeat)
    return TensorLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=as_is)
