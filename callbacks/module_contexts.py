"""Context managers for a callback's own passes over data, which leave the module unchanged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from pl_personalize.artifacts import ArtifactError, read_state_dict
from pl_personalize.per_sample.module_state import ForwardState, buffers_kept

_LOGS = ("log", "log_dict")


def best_checkpoint(trainer: Trainer) -> str:
    """Path of the best checkpoint of a ModelCheckpoint that monitors a metric; empty if there is none."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    return next((c.best_model_path for c in checkpoints if c.best_model_path), "")


@contextmanager
def best_weights(trainer: Trainer, pl_module: LightningModule, *, wanted: bool = True) -> Iterator[None]:
    """Load the weights of the best checkpoint, and restore the current ones on exit."""
    path = best_checkpoint(trainer) if wanted else ""
    if not path:
        yield
        return
    with _structure_kept(pl_module), ForwardState(pl_module):
        try:
            hooked = is_overridden("on_load_checkpoint", pl_module)
            checkpoint = _local(path, _read_whole if hooked else _read_weights)
            if hooked:
                pl_module.on_load_checkpoint(checkpoint)  # it may restore what it has left out of the state dict
            pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
        except Exception as error:  # a user's hook may raise anything
            what = str(error) if isinstance(error, ArtifactError) else f"{path}: {type(error).__name__}: {error}."
            raise MisconfigurationException(
                f"The weights of the best checkpoint cannot be used: {what} Use those of the last epoch with "
                "weights='last'."
            ) from error
        yield


@contextmanager
def _structure_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restore submodules, parameters and buffers on exit, also those that a hook has replaced, and their values."""
    places = [own for module in model.modules() for own in (module._modules, module._parameters, module._buffers)]
    before = [(own, dict(own)) for own in places]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for own, entries in before:
            own.clear()
            own.update(entries)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)


def _local(path: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Read a checkpoint, which may be on a remote file system."""
    if "://" not in path:
        return read(path)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "best.ckpt")
        get_filesystem(path).get_file(path, local)
        return read(local)


def _read_weights(path: str) -> dict[str, Any]:
    return {"state_dict": read_state_dict(path)}


def _read_whole(path: str) -> dict[str, Any]:
    """The whole checkpoint if it holds plain data only, else its weights."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint
    except Exception:  # objects of other classes, or damage, which the next reader reports
        return _read_weights(path)


@contextmanager
def on_its_device(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Move the module to the Trainer's device; at the end of ``fit`` the strategy has moved it to the CPU."""
    before = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(before)


@contextmanager
def silent_and_synchronized(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Disable ``self.log``, and use rank zero's buffers on all ranks; both are restored on exit.

    A callback's pass is not part of the user's metrics. DDP synchronizes batch-norm statistics only when a forward
    starts.
    """
    modules = [module for module in pl_module.modules() if isinstance(module, LightningModule)]
    before = [{name: vars(module)[name] for name in _LOGS if name in vars(module)} for module in modules]
    try:
        for module in modules:
            vars(module).update(dict.fromkeys(_LOGS, lambda *args, **kwargs: None))
        if trainer.world_size == 1:
            yield
            return
        with buffers_kept(pl_module):
            with torch.no_grad():
                for buffer in pl_module.buffers():
                    buffer.copy_(trainer.strategy.broadcast(buffer))
            yield
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in _LOGS:
                vars(module).pop(name, None)
            vars(module).update(own)


def pass_options(trainer: Trainer) -> dict[str, Any]:
    """Options of an estimate over a Trainer's data: a progress bar on rank zero, and sums over all processes."""
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    reduce = None if trainer.world_size == 1 else partial(trainer.strategy.reduce, reduce_op="sum")
    return {"progress": shown, "all_reduce": reduce}


def gather_rows(trainer: Trainer) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Concatenates the rows of a tensor over processes, which may hold different numbers; ``None`` for one process."""
    if trainer.world_size == 1:
        return None

    def gather(rows: torch.Tensor) -> torch.Tensor:
        device = trainer.strategy.root_device
        counts = trainer.strategy.all_gather(torch.tensor(len(rows), device=device)).tolist()
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=device)
        padded[: len(rows)] = rows.to(device)
        parts = trainer.strategy.all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    return gather
