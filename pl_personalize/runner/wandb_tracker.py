"""A run in Weights & Biases."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize.artifacts import file_checksum
from pl_personalize.importance import Importance
from pl_personalize.runner.metrics_log import Record
from pl_personalize.runner.options import WandbOptions
from pl_personalize.runner.results import ResultRow
from pl_personalize.runner.stages import RunFile
from pl_personalize.runner.tracking import RunResults

_LONGEST_NAME = 128  # that W&B takes
ARTIFACT_TYPES = {"experts": "expert", "importances": "importance", "merged": "merged-model"}


class WandbTracker:
    """One run of W&B for one server method and seed.

    * The curves of the tasks stand side by side (``train/loss/task1``, ``train/loss/task2``, …), each on its own axis
      of steps: on the common axis ``trainer/global_step`` they would overprint each other.
    * ``test/<user>/<method>/task<i>``: accuracy on task i, in [0, 1], over ``after_task``.
    * ``importance/<kind>/<owner>``: histograms of the decimal logarithm of the positive entries, over
      ``importance/task``.
    * Tables ``results``, ``accuracy_matrix`` and ``importances``; heat maps of the matrices; results as summary.

    Args:
        options: Where to, and whether to send.
        folder: The experiment's folder; W&B writes to ``wandb`` in it.
        name: Name of the run.
        group: What the runs of one call have in common.
        job_type: The server method.
        tags: Words to find the run by.
        run_id: The same when a run goes on, so that its parts belong together.
        config: Options and versions.
    """

    def __init__(
        self,
        options: WandbOptions,
        folder: Path,
        *,
        name: str,
        group: str,
        job_type: str,
        tags: Sequence[str],
        run_id: str,
        config: Mapping[str, Any],
    ) -> None:
        for variable, place in {
            "WANDB_CACHE_DIR": "cache",
            "WANDB_DATA_DIR": "data",
            "WANDB_CONFIG_DIR": "config",
        }.items():
            os.environ.setdefault(variable, str((folder / "wandb" / place).resolve()))
        import wandb

        self._wandb, self._options, self._name = wandb, options, name
        try:
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                mode=options.mode,
                dir=folder,
                name=name,
                group=group,
                job_type=job_type,
                tags=list(tags),
                id=run_id,
                resume="allow" if options.mode == "online" else None,
                config=dict(config),
                reinit="create_new",
                settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise MisconfigurationException(
                f"Weights & Biases: {error} (after wandb login it works online; --wandb.mode offline needs nothing)"
            ) from error
        self._run.define_metric("after_task", hidden=True)
        self._run.define_metric("test/*", step_metric="after_task")
        self._run.define_metric("importance/task", hidden=True)
        self._run.define_metric("importance/*", step_metric="importance/task")
        self._curves: set[str] = set()
        self._importances: list[list[Any]] = []

    @property
    def folder(self) -> Path:
        """The folder that ``wandb sync`` takes."""
        return Path(self._run.dir).parent

    def log(self, record: Record) -> None:
        """Log a step of training; what tests and importances log is in the tables."""
        kind, _, label = record.stage.partition("/")
        if kind != "train":
            return
        step = f"step/{label}"
        named = {f"{name}/{label}": value for name, value in record.metrics.items()}
        for name in [step, *named]:
            if name not in self._curves:
                self._curves.add(name)
                if name == step:
                    self._run.define_metric(step, hidden=True)
                else:
                    self._run.define_metric(name, step_metric=step)
        self._run.log(named | {step: record.step})

    def log_importance(self, owner: str, task: int, importance: Importance) -> None:
        """Log a histogram, and keep norms for the table."""
        positive = [value[value > 0].double().log10().flatten().cpu() for value in importance.values()]
        values = np.concatenate([value.numpy() for value in positive])
        if values.size:
            low, high = float(values.min()), float(values.max())
            margin = 0.5 if high - low < 1e-6 else 0.0  # values that are all but the same have no range
            histogram = np.histogram(values, bins=64, range=(low - margin, high + margin))
            entry = {f"importance/{importance.kind}/{owner}": self._wandb.Histogram(np_histogram=histogram)}
            self._run.log({**entry, "importance/task": task})
        for name, summary in importance.summary().items():
            self._importances.append(
                [importance.kind, owner, task, name, summary["norm"], summary["zeros"], importance.num_samples]
            )

    def log_images(self, user: str, images: Tensor) -> None:
        """Show some images of a user, who was asked for by name.

        Args:
            user: Name of the user.
            images: (n, channels, height, width), of any range.
        """
        from torchvision.utils import make_grid

        grid = make_grid(images, nrow=8, normalize=True, scale_each=True)
        self._run.log({f"images/{user}": self._wandb.Image(grid, caption=f"images of user {user}")})

    def log_results(self, results: RunResults) -> None:
        """Log the results as summary, tables, curves over tasks and heat maps."""
        for label, accuracy in results.val_acc.items():
            self._run.summary[f"val_acc/{label}"] = accuracy
        self._run.log({"val_acc": float(np.mean(list(results.val_acc.values())))})  # what a sweep may maximise
        for row in results.rows:
            self._run.summary[f"{row.label}/{row.user}/avg_acc"] = row.avg_acc
            if row.forgetting is not None:
                self._run.summary[f"{row.label}/{row.user}/forgetting"] = row.forgetting
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
        matrix_columns = ["method", "user", "after_task", "task", "accuracy"]
        tables = {
            "results": self._table([f.name for f in fields(ResultRow)], [asdict(row).values() for row in results.rows]),
            "accuracy_matrix": self._table(matrix_columns, cells),
        }
        if self._importances:
            columns = ["kind", "owner", "task", "parameter", "norm", "zeros", "num_samples"]
            tables["importances"] = self._table(columns, self._importances)
        figures = {f"figures/{path.stem}": self._wandb.Image(str(path)) for path in results.figures}
        self._run.log(tables | figures)

    def _table(self, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> Any:
        return self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])

    def log_artifacts(self, files: Iterable[RunFile]) -> None:
        """Store files with the run, each with what it was made of.

        That is in the artifact's metadata: names of files and their SHA-256. Online, the run also uses the artifacts
        that a merged model was made of, which W&B draws as a graph; offline it refuses that.

        Args:
            files: The files, each after those that it was made of.
        """
        logged: dict[Path, Any] = {}
        for what, path, sources in files:
            made_of = {source.name: file_checksum(source) for source in sources}
            artifact = self._wandb.Artifact(
                artifact_name(f"{self._name}-{what}-{path.stem}"),
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


def artifact_name(name: str) -> str:
    """A name that W&B takes: as it is, or made to fit, with a hash that keeps it apart from others.

    Example:
        >>> artifact_name("Numbers-IMM-seed1-experts-task1")
        'Numbers-IMM-seed1-experts-task1'
        >>> artifact_name("a b"), artifact_name("a-b")
        ('a-b-c8687a08', 'a-b')
    """
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    if plain == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{plain[9 - _LONGEST_NAME :]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
