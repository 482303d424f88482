"""Checks of all data before the first training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.datamodules import LabelledImages, TaskIncrementalDataModule
from pl_personalize.methods import Method
from pl_personalize.models import TaskNetwork
from pl_personalize.stages.options import TrainerOptions


class _Split(NamedTuple):
    """A split and whose it is."""

    name: str
    data: LabelledImages


def check_data(
    datamodule: TaskIncrementalDataModule, network: TaskNetwork, methods: Sequence[Method], trainer: TrainerOptions
) -> None:
    """Read all data, and refuse what is missing, broken or of no use to the network before any training.

    The network may be one for any number of classes; it is tried on the device and in the precision of the trainer.
    """
    splits = _read_all(datamodule)
    if any(method.family.needs_one_shape for method in methods):
        datamodule.refuse_several_shapes()
    of_a_kind: dict[tuple[tuple[int, ...], torch.dtype], _Split] = {}
    for split in splits:
        of_a_kind.setdefault((tuple(split.data.images.shape[1:]), split.data.images.dtype), split)
    for split in of_a_kind.values():
        _try(network, datamodule, split, trainer)


def _read_all(datamodule: TaskIncrementalDataModule) -> list[_Split]:
    splits: list[_Split] = []
    for i, task in enumerate(datamodule.tasks):
        owners = [("server", zip(("train", "val"), datamodule.server_split(i), strict=True))]
        for user in datamodule.users:
            owners.append((f"user {user}", zip(("adapt", "eval"), datamodule.user_split(user, i), strict=True)))
        for owner, found in owners:
            for what, split in found:
                if not len(split.labels):
                    raise MisconfigurationException(f"There are no {what} images of the {owner} for the task {task!r}.")
                splits.append(_Split(f"the {what} images of the {owner} for the task {task!r}", split))
    return splits


def _try(network: TaskNetwork, datamodule: TaskIncrementalDataModule, split: _Split, options: TrainerOptions) -> None:
    """One look at some images, as a stage will have it."""
    trainer = options.trainer(logger=False, enable_checkpointing=False)
    plugin, device = trainer.precision_plugin, trainer.strategy.root_device
    stored = split.data.images[:2]
    seen = f"{tuple(stored.shape[1:])}, {stored.dtype}"
    try:
        images = datamodule.transform(stored, None)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), plugin.forward_context():
            logits = plugin.convert_module(network).to(device).eval()(plugin.convert_input(images.to(device)))
    except Exception as error:  # whatever a network, or a benchmark's transform, raises
        raise MisconfigurationException(
            f"The network cannot take {split.name} ({seen}): {type(error).__name__}: {error}. Give images that it "
            "takes, in load_server, load_user or transform of the datamodule, or another network."
        ) from error
    if images.is_floating_point() and not bool(images.isfinite().all()):
        raise MisconfigurationException(f"The transform of {split.name} ({seen}) makes NaN or infinite values of them.")
    if logits.ndim != 2 or len(logits) != len(images):
        raise MisconfigurationException(
            f"The network makes {tuple(logits.shape)} of {len(images)} images ({seen}, {split.name}); logits must be "
            "(n, classes)."
        )
