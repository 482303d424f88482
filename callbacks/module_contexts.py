"""A module as a callback needs it for a pass of its own, and as it was afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from pl_personalize.artifacts import ArtifactError, read_state_dict
from pl_personalize.per_sample.module_state import ForwardState


def best_checkpoint(trainer: Trainer) -> str:
    """The best checkpoint of a ModelCheckpoint that monitors a metric; empty if there is none."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return next((c.best_model_path for c in checkpoints if c.best_model_path), "")


@contextmanager
def best_weights(trainer: Trainer, pl_module: LightningModule, *, wanted: bool) -> Iterator[None]:
    """The weights of the best checkpoint inside, the present ones after.

    Raises:
        MisconfigurationException: If there is a best checkpoint that cannot be read.
    """
    path = best_checkpoint(trainer) if wanted else ""
    if not path:
        yield
        return
    with kept([*pl_module.parameters(), *pl_module.buffers()]), ForwardState(pl_module):
        try:
            checkpoint = {"state_dict": _read(path)}
            if is_overridden("on_load_checkpoint", pl_module):
                pl_module.on_load_checkpoint(checkpoint)  # it may put back what it has left out of the file
            pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
        except Exception as error:  # whatever a hook of the user's makes of a checkpoint
            what = str(error) if isinstance(error, ArtifactError) else f"{path}: {type(error).__name__}: {error}."
            raise MisconfigurationException(
                f"The weights of the best checkpoint cannot be used: {what} weights='last' takes those of the last "
                "epoch."
            ) from error
        yield


def _read(path: str) -> dict[str, Any]:
    """The state dict in a checkpoint, which may be on a remote file system."""
    if "://" not in path:
        return read_state_dict(path)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "best.ckpt")
        get_filesystem(path).get_file(path, local)
        return read_state_dict(local)


@contextmanager
def on_its_device(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The module on the Trainer's device inside; when ``fit`` ends, the strategy has moved it to the CPU."""
    before = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(before)


@contextmanager
def without_logging(pl_module: LightningModule) -> Iterator[None]:
    """``self.log`` does nothing inside: a pass of a callback is none of the user's metrics."""
    modules = [module for module in pl_module.modules() if isinstance(module, LightningModule)]
    before = [{name: vars(module)[name] for name in _LOGS if name in vars(module)} for module in modules]
    for module in modules:
        vars(module).update(dict.fromkeys(_LOGS, _log_nothing))
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in _LOGS:
                vars(module).pop(name, None)
            vars(module).update(own)


_LOGS = ("log", "log_dict")


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of ``self.log``."""


@contextmanager
def buffers_of_rank_zero(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The same buffers on all ranks inside: DDP synchronises batch-norm statistics only when a forward starts."""
    buffers = list(pl_module.buffers()) if trainer.world_size > 1 else []
    with kept(buffers):
        with torch.no_grad():
            for buffer in buffers:
                buffer.copy_(trainer.strategy.broadcast(buffer))
        yield


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the values of tensors back at the end."""
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def all_reduce_of(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over the Trainer's processes; ``None`` for a single one."""
    if trainer.world_size == 1:
        return None
    return partial(trainer.strategy.reduce, reduce_op="sum")
