"""Helpers for tests of callbacks: a quiet Trainer, rows that record what is read, and scripts of several processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROWS = 23


def quiet_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """One epoch on the CPU that writes nothing but what is asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


class Rows(Dataset[Any]):
    """Rows (6,) of three classes; notes which were read, one by one."""

    def __init__(self, rows: int = ROWS, seed: int = 1, labels: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(rows, 6, generator=generator) + seed, torch.arange(rows) % 3
        self.labels, self.read = labels, list[int]()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> Tensor | tuple[Tensor, Tensor]:
        self.read.append(k)
        return (self.x[k], self.y[k]) if self.labels else self.x[k]


class Data(LightningDataModule):
    """Splits that differ, and a note of each ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return in_order(Rows(9, seed=2))

    def test_dataloader(self) -> list[DataLoader[Any]]:
        assert "test" in self.stages
        return [in_order(Rows(5, seed=3)), in_order(Rows(6, seed=4))]

    def predict_dataloader(self) -> DataLoader[Any]:
        assert "predict" in self.stages
        return in_order(Rows(7, seed=5, labels=False))


def shuffled(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, **({"shuffle": True} | options))


def in_order(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, **options)


class NoTraining(Callback):
    """For what must be refused before."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        raise AssertionError("training began")


def run_script(folder: Path, text: str, *arguments: str) -> None:
    """Run a script that starts several processes, with the folder as its first argument."""
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_forked(folder: Path, text: str, *arguments: str) -> None:
    """Run a script in a fork of this process, which has imported Lightning already; it may only fork, not spawn."""
    script = folder / "script.py"
    script.write_text(text)
    process = get_context("fork").Process(target=_execute, args=(script, *arguments))
    process.start()
    process.join(200)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, (folder / "errors.txt").read_text()[-3000:]


def _execute(script: Path, *arguments: str) -> None:
    sys.argv = [str(script), str(script.parent), *arguments]
    torch.cuda._is_in_bad_fork = lambda: False  # looking for GPUs before the fork is harmless: none is used
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException:
        (script.parent / "errors.txt").write_text(traceback.format_exc())
        os._exit(1)


def cli_of(folder: Path, module: type[LightningModule], data: type[LightningDataModule], rest: str) -> LightningCLI:
    """A LightningCLI with a quiet Trainer of one epoch; ``rest`` is the YAML of its callbacks, and what follows."""
    config = folder / "config.yaml"
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    options = ["accelerator: cpu", "max_epochs: 1", f"default_root_dir: {folder}", *(f"{one}: false" for one in quiet)]
    lines = ["seed_everything: false", "trainer:", *(f"  {option}" for option in options), "  callbacks:"]
    config.write_text("\n".join(lines) + rest)
    return LightningCLI(module, data, args=["--config", str(config)], run=False, save_config_callback=None)
