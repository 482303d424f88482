"""Tracking of runs in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.artifacts import file_checksum
from pl_personalize.importance import Importance
from pl_personalize.runner.options import WandbOptions
from pl_personalize.runner.results import ResultRow
from pl_personalize.runner.tracking import RunResults, clean_name, log10_of_positive
from pl_personalize.stages.metrics_log import Record
from pl_personalize.stages.work import RunFile

ARTIFACT_TYPES = {"experts": "expert", "importances": "importance", "merged": "merged-model", "adapted": "adaptation"}
_IMPORTANCE_COLUMNS = ["kind", "owner", "task", "parameter", "norm", "zeros", "num_samples"]


class WandbTracker:
    """Tracks one server method and seed as one W&B run.

    * ``train/loss/task1``, ``train/loss/task2``, …: training curves of each task on a step axis of its own; on the
      common axis ``trainer/global_step`` they would overlap.
    * ``test/<user>/<method>/task<i>``: accuracy on task i, in [0, 1], over ``after_task``.
    * ``importance/<kind>/<owner>``: histograms of the decimal logarithms of the positive entries, over
      ``importance/task``.
    * Tables ``results``, ``accuracy_matrix`` and ``importances``, heat maps of the accuracy matrices, and the results
      as summary.

    W&B writes to the subfolder ``wandb`` of the experiment's folder. A resumed run has the same ``run_id``; further
    arguments are those of ``wandb.init``. A :class:`MisconfigurationException` is raised if it cannot start the run.
    """

    def __init__(self, options: WandbOptions, folder: Path, *, name: str, run_id: str, **arguments: Any) -> None:
        for place in ("cache", "data", "config"):
            os.environ.setdefault(f"WANDB_{place.upper()}_DIR", str((folder / "wandb" / place).resolve()))
        import wandb

        self._wandb, self._options, self._name = wandb, options, name
        try:
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                mode=options.mode,
                dir=folder,
                name=name,
                id=run_id,
                resume="allow" if options.mode == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"),
                **arguments,
            )
        except wandb.errors.Error as error:
            raise MisconfigurationException(
                f"Weights & Biases: {error}. Log in with `wandb login`, or use --wandb.mode offline."
            ) from error
        self._run.define_metric("after_task", hidden=True)
        self._run.define_metric("test/*", step_metric="after_task")
        self._run.define_metric("importance/task", hidden=True)
        self._run.define_metric("importance/*", step_metric="importance/task")
        self._curves: set[str] = set()
        self._importances: list[list[Any]] = []

    @property
    def folder(self) -> Path:
        """Folder to pass to ``wandb sync``."""
        return Path(self._run.dir).parent

    def log(self, record: Record) -> None:
        """Log the metrics of a training step; those of tests and importances are logged with the results."""
        kind, _, label = record.stage.partition("/")
        if kind != "train":
            return
        step = f"step/{label}"
        named = {f"{name}/{label}": value for name, value in record.metrics.items()}
        for name in [step, *named]:
            if name not in self._curves:
                self._run.define_metric(name, **({"hidden": True} if name == step else {"step_metric": step}))
        self._curves |= {step, *named}
        self._run.log(named | {step: record.step})

    def log_importance(self, owner: str, task: int, importance: Importance) -> None:
        """Log a histogram, and add norms to the table of importances."""
        values = torch.cat([log10_of_positive(value) for value in importance.values()])
        if len(values):
            # Rounded, because NumPy cannot bin values that differ by rounding errors only.
            histogram = self._wandb.Histogram(values.numpy().round(6).tolist(), num_bins=64)
            self._run.log({f"importance/{importance.kind}/{owner}": histogram, "importance/task": task})
        self._importances += [
            [importance.kind, owner, task, name, summary["norm"], summary["zeros"], importance.num_samples]
            for name, summary in importance.summary().items()
        ]

    def log_images(self, user: str, images: Tensor) -> None:
        """Log images of a user, of any value range, ``(N, C, H, W)``."""
        from torchvision.utils import make_grid

        grid = make_grid(images, nrow=8, normalize=True, scale_each=True)
        self._run.log({f"images/{user}": self._wandb.Image(grid, caption=f"images of user {user}")})

    def log_results(self, results: RunResults) -> None:
        """Log the results as summary, tables, curves over tasks and heat maps."""
        for label, accuracy in results.val_acc.items():
            self._run.summary[f"val_acc/{label}"] = accuracy
        self._run.log({"val_acc": fmean(results.val_acc.values())})  # objective of sweeps
        for name, value in results.by_name().items():
            self._run.summary[name] = value
        cells = [
            (method, user, t + 1, i + 1, float(matrix[t, i]))
            for (method, user), matrix in results.matrices.items()
            for t in range(len(matrix))
            for i in range(t + 1)
            if matrix[t, i] == matrix[t, i]
        ]
        for after in sorted({cell[2] for cell in cells}):
            seen = {f"test/{user}/{method}/task{i}": value for method, user, t, i, value in cells if t == after}
            self._run.log(seen | {"after_task": after})
        tables: dict[str, tuple[list[Any], list[Any]]] = {
            "results": ([field.name for field in fields(ResultRow)], [astuple(row) for row in results.rows]),
            "accuracy_matrix": (["method", "user", "after_task", "task", "accuracy"], cells),
            "importances": (_IMPORTANCE_COLUMNS, self._importances),
        }
        logged = {name: self._wandb.Table(columns, data) for name, (columns, data) in tables.items() if data}
        self._run.log(logged | {f"figures/{path.stem}": self._wandb.Image(str(path)) for path in results.figures})

    def log_artifacts(self, files: Iterable[RunFile]) -> None:
        """Log files, each after those it was made from, as artifacts with the SHA-256 of both.

        Online, the run also declares the latter as inputs, for W&B's lineage graph; offline, W&B does not support it.
        """
        logged: dict[Path, Any] = {}
        for what, path, sources in files:
            made_of = {source.name: file_checksum(source) for source in sources}
            artifact = self._wandb.Artifact(
                clean_name(f"{self._name}-{what}-{path.stem}"),
                type=ARTIFACT_TYPES[what],
                metadata={"sha256": file_checksum(path), "made_of": made_of},
            )
            artifact.add_file(str(path))
            if self._options.mode == "online":
                for source in sources:
                    if source in logged:
                        self._run.use_artifact(logged[source].wait())
            logged[path] = self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()
