"""Tracking of a run by loggers, from its first step to its results."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pl_personalize.importance import Importance
from pl_personalize.runner.figures import draw_matrices, lowest_accuracy
from pl_personalize.runner.results import ResultRow, result_row, with_means_over_users
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.tracking import LoggerTracker, RunResults, csv_tracker, tensorboard_tracker
from pl_personalize.runner.wandb_tracker import WandbTracker
from pl_personalize.stages.metrics_log import Record

Tracker = LoggerTracker | WandbTracker
_PACKAGES = ("pl-personalize", "lightning", "torch", "torchvision", "torchmetrics", "wandb", "numpy")


class Following:
    """Loggers of a run: they receive its earlier metrics, then new ones, and the results at the end."""

    def __init__(self, run: ServerRun, options: Mapping[str, Any]) -> None:
        self._run, self._options, self._wandb = run, options, run.experiment.wandb

    def stage(self, logger: str) -> str:
        """Name of the stage that sends the run's results to a logger."""
        return f"{self._run.name}/tracked/{logger}"

    def due(self, logger: str) -> bool:
        """Whether a logger has not received everything that is finished, or received it under other options."""
        done = self._run.folder.finished(self.stage(logger))
        return done is None or any(done.result.get(key) != value for key, value in self._covered(logger).items())

    def _covered(self, logger: str) -> dict[str, Any]:
        labels = [variant.label for variant in self._run.with_all_tested().variants]
        wandb = self._wandb
        options = [wandb.mode, wandb.project, wandb.entity, wandb.group, *wandb.artifacts, *wandb.images_of]
        return {"tested": labels, "options": options if logger == "wandb" else []}

    @contextmanager
    def opened(self, loggers: Sequence[str]) -> Iterator[None]:
        """Track the stages inside; then log the results."""
        run = self._run
        trackers: dict[str, Tracker] = {}
        try:
            for name in loggers:
                trackers[name] = self._open(name)
            for tracker in trackers.values():
                relay = self._relay(tracker)
                for record in run.log.read():  # metrics of an earlier call
                    relay(record)
                run.log.followers.append(relay)
            yield
            for name, tracker in trackers.items():
                self._conclude(tracker, run.with_all_tested())
                before = run.folder.finished(self.stage(name))
                folders = [] if before is None else before.result["folders"]
                if isinstance(tracker, WandbTracker):
                    folders = [*folders, tracker.folder.name]
                run.folder.finish(self.stage(name), result={"folders": folders, **self._covered(name)})
        finally:
            run.log.followers.clear()
            for tracker in trackers.values():
                tracker.finish()

    def _relay(self, tracker: Tracker) -> Callable[[Record], None]:
        """Forward the records of this run and of its shared stages, with names of stages relative to the run."""
        prefixes = [f"{prefix}/" for prefix in self._run.prefixes]

        def relay(record: Record) -> None:
            for prefix in prefixes:
                if record.stage.startswith(prefix):
                    tracker.log(record._replace(stage=record.stage.removeprefix(prefix)))

        return relay

    def _open(self, logger: str) -> Tracker:
        run, folder, experiment = self._run, self._run.folder.path, self._run.experiment
        family, methods = run.workspace.name, [method.name for method in run.methods]
        place = f"{family}-seed{run.seed}"
        if logger == "csv":
            return csv_tracker(folder / "csv" / place)
        if logger == "tensorboard":
            return tensorboard_tracker(folder / "tensorboard" / place)
        group = self._wandb.group or f"{experiment.benchmark}-{folder.name}"
        identity = hashlib.sha256(f"{folder.resolve()}|{self._options}|{run.name}".encode()).hexdigest()[:12]
        tracker = WandbTracker(
            self._wandb,
            folder,
            name=f"{group}-{place}",
            group=group,
            job_type=family,
            tags=[
                tag[:64] for tag in (experiment.benchmark, str(experiment.backbone), family, *methods)
            ],  # W&B's limit
            run_id=identity,
            config={
                **self._options,
                "server_method": family,
                "seed": run.seed,
                "methods": methods,
                "adaptations": list(dict.fromkeys(variant.adaptation for variant in run.variants)),
                "tasks": list(run.data.tasks),
                "users": list(run.data.users),
                "versions": versions(),
                "git_commit": git_commit(),
            },
        )
        for user in self._wandb.images_of:
            data = run.data.view(user=user)
            loaders = [data.adapt_dataloader(task, batch_size=8) for task in range(len(data.tasks))]
            tracker.log_images(user, torch.cat([next(iter(loader)) for loader in loaders]))
        return tracker

    def _conclude(self, tracker: Tracker, run: ServerRun) -> None:
        for owner, task, file in run.family.importances():
            if not file.path.exists():  # of a method that is not asked for now, and removed since
                continue
            tracker.log_importance(owner, task + 1, Importance.load(file.path))
        matrices: dict[tuple[str, str], Tensor] = {}
        matrices |= {(v.label, user): run.matrix(v, user) for v in run.variants for user in run.data.users}
        low = lowest_accuracy(matrices.values())
        figures = [
            draw_matrices(
                run.folder.path / "figures" / run.name / f"matrix-{variant.label}.png",
                f"{variant.label}, seed {run.seed}",
                {user: matrices[variant.label, user] for user in run.data.users},
                run.data.tasks,
                low,
            )
            for variant in run.variants
        ]
        rows = with_means_over_users(rows_of(run))
        tracker.log_results(RunResults(rows, matrices, run.validation(), figures))
        if isinstance(tracker, WandbTracker):
            tracker.log_artifacts([file for file in run.files() if file.kind in self._wandb.artifacts])


def rows_of(run: ServerRun) -> list[ResultRow]:
    """Rows of the results of a run's tests."""
    experiment = run.experiment
    return [
        result_row(
            run.matrix(variant, user),
            benchmark=experiment.benchmark,
            backbone=str(experiment.backbone),
            method=variant.method,
            adaptation=variant.adaptation,
            user=user,
            seed=run.seed,
        )
        for variant in run.variants
        for user in run.data.users
    ]


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def git_commit() -> str | None:
    """The commit of the script that runs, if it is in a checkout; with ``-dirty`` where that has changes."""
    folder = Path(sys.argv[0]).resolve().parent
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
