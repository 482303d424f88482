"""An experiment in Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pl_personalize.runner.metrics_log import Record
from pl_personalize.runner.options import WandbOptions
from pl_personalize.runner.results import ResultRow


class WandbTracker:
    """One run of W&B for one seed of an experiment; each stage's metrics have their own step axis.

    Several stages in one run would overprint each other on the common axis ``trainer/global_step``.

    Args:
        options: Where to, and whether to send.
        folder: The experiment's folder; W&B writes to ``wandb`` in it.
        name: Name of the run.
        group: What the runs of one call have in common.
        run_id: The same when a run goes on, so that its parts belong together.
        config: Options and versions.
    """

    def __init__(
        self, options: WandbOptions, folder: Path, *, name: str, group: str, run_id: str, config: Mapping[str, Any]
    ) -> None:
        for variable, place in {
            "WANDB_CACHE_DIR": "cache",
            "WANDB_DATA_DIR": "data",
            "WANDB_CONFIG_DIR": "config",
        }.items():
            os.environ.setdefault(variable, str((folder / "wandb" / place).resolve()))
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            dir=folder,
            name=name,
            group=group,
            job_type="experiment",
            id=run_id,
            resume="allow" if options.mode == "online" else None,
            config=dict(config),
            reinit="create_new",
            settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"),
        )
        self._stages: set[str] = set()

    @property
    def folder(self) -> Path:
        """The folder that ``wandb sync`` takes."""
        return Path(self._run.dir).parent

    def log(self, record: Record) -> None:
        """Log the metrics of a step of a stage."""
        stage = record.stage.partition("/")[2]  # without the seed, which is the run's
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log(
            {f"{stage}/{name}": value for name, value in record.metrics.items()} | {f"{stage}/step": record.step}
        )

    def log_results(self, rows: Sequence[ResultRow], figures: Iterable[Path]) -> None:
        """Log the results as summary and table, and figures (of accuracies; never an image of a user)."""
        for row in rows:
            self._run.summary[f"{row.method}/{row.user}/avg_acc"] = row.avg_acc
            if row.forgetting is not None:
                self._run.summary[f"{row.method}/{row.user}/forgetting"] = row.forgetting
        columns: list[str | int] = [field.name for field in fields(ResultRow)]
        table = self._wandb.Table(columns=columns, data=[list(asdict(row).values()) for row in rows])
        self._run.log({"results": table} | {f"figures/{path.stem}": self._wandb.Image(str(path)) for path in figures})

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()
