"""Running an experiment from its options to its tables, figures and tracked runs."""

from __future__ import annotations

import hashlib
import logging
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm.auto import tqdm

from pl_personalize import __version__
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.experiment import SeedRun, Work
from pl_personalize.runner.figures import draw_matrices, draw_methods
from pl_personalize.runner.methods import BOUNDS, MethodName
from pl_personalize.runner.metrics_log import MetricsLog
from pl_personalize.runner.options import TrainerOptions, TrainingOptions, WandbOptions
from pl_personalize.runner.results import (
    ResultRow,
    legend,
    markdown_table,
    result_row,
    with_means_over_users,
    write_csv,
    write_markdown,
)
from pl_personalize.runner.run_folder import RunFolder
from pl_personalize.runner.wandb_tracker import WandbTracker


def run_experiment(
    benchmark: str,
    backbone: str,
    make_datamodule: Callable[[int], TaskIncrementalDataModule],
    make_network: Callable[[int], TaskNetwork],
    *,
    methods: Sequence[MethodName],
    seeds: Sequence[int],
    training: TrainingOptions,
    trainer: TrainerOptions,
    wandb: WandbOptions,
    output_dir: Path,
    fisher_draws: int | Literal["all"] = "all",
    options: dict[str, Any] | None = None,
) -> list[ResultRow]:
    """Train the experts, compute importances, merge and test, for each seed; write and print what came out.

    Stages that an earlier call finished in ``output_dir`` are not done again; a stage that was interrupted goes on from
    its last checkpoint.

    Args:
        benchmark: Its name, for the results.
        backbone: Name of the network, for the results.
        make_datamodule: The benchmark for a seed.
        make_network: The network for a number of classes.
        methods: What is compared.
        seeds: One run each.
        training: How experts are trained.
        trainer: For the Trainers.
        wandb: Tracking.
        output_dir: The run's folder.
        fisher_draws: Labels drawn for each sample in a Fisher information, or ``"all"`` for the exact expectation.
        options: Further options that the results depend on.

    Returns:
        The rows of ``results.csv``.

    Raises:
        ArtifactError: If the folder holds a run with other options, or another process works in it.
        MisconfigurationException: If an option is out of range.
    """
    _check(methods, seeds, training)
    decisive = {"benchmark": benchmark, "backbone": backbone, "fisher_draws": fisher_draws}
    decisive |= asdict(training) | asdict(trainer) | (options or {})
    decisive.pop("enable_progress_bar")
    folder = RunFolder(output_dir, decisive)
    with folder.locked():
        log = MetricsLog(folder.metrics_file)
        runs = [
            SeedRun(folder, log, make_datamodule(seed), make_network, methods, seed, training, trainer, fisher_draws)
            for seed in seeds
        ]
        pending = [[work for work in run.stages() if folder.finished(work.name) is None] for run in runs]
        total = sum(1 for run in runs for _ in run.stages())
        done = total - sum(map(len, pending))
        pause = 0.1 if sys.stderr.isatty() else 10  # in a log file, a line now and then
        rows: list[ResultRow] = []
        with (
            _quiet_lightning(),
            tqdm(total=total, unit="stage", initial=done, mininterval=pause, disable=done == total) as bar,
        ):
            for run, works in zip(runs, pending, strict=True):
                found = _SeedResults(benchmark, backbone, run)
                if works or (wandb.mode != "disabled" and folder.finished(_tracked(run.seed)) is None):
                    _run_seed(found, works, bar, _open_tracker(wandb, folder, log, run.seed, decisive, methods))
                rows += found.rows()
        rows = with_means_over_users(rows)
        _write(folder, benchmark, backbone, rows, runs, decisive)
        _say(folder, rows, seeds)
    return rows


def _check(methods: Sequence[str], seeds: Sequence[int], training: TrainingOptions) -> None:
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise MisconfigurationException(f"{name} must be at least one, and each once; got {list(values)}.")
    if training.epochs < 1:
        raise MisconfigurationException(f"training.epochs must be at least 1; got {training.epochs}.")


def _tracked(seed: int) -> str:
    """The stage of bringing a seed's results to W&B."""
    return f"seed{seed}/tracked"


def _run_seed(found: _SeedResults, works: Sequence[Work], bar: tqdm[Any], tracker: WandbTracker | None) -> None:
    run, folder = found.run, found.run.folder
    run.log.tracker = tracker
    try:
        for work in works:
            bar.set_description(work.name, refresh=False)
            work.run()
            bar.update()
        if tracker is not None:
            tracker.log_results(with_means_over_users(found.rows()), found.draw(folder.path / "figures"))
            earlier = folder.finished(_tracked(run.seed))
            before = [] if earlier is None else earlier.result["folders"]
            folder.finish(_tracked(run.seed), result={"folders": [*before, tracker.folder.name]})
    finally:
        run.log.tracker = None
        if tracker is not None:
            tracker.finish()


class _SeedResults:
    """What the finished stages of a seed say."""

    def __init__(self, benchmark: str, backbone: str, run: SeedRun) -> None:
        self.run, self._names = run, {"benchmark": benchmark, "backbone": backbone}
        self._methods = (*run.methods, *BOUNDS)

    def rows(self) -> list[ResultRow]:
        run = self.run
        return [
            result_row(run.matrix(method, user), method=method, user=user, seed=run.seed, **self._names)
            for method in self._methods
            for user in run.data.users
        ]

    def draw(self, folder: Path) -> list[Path]:
        run = self.run
        return [
            draw_matrices(
                folder / f"seed{run.seed}" / f"matrix-{method}.png",
                f"{method}, seed {run.seed}",
                {user: run.matrix(method, user) for user in run.data.users},
                run.data.tasks,
            )
            for method in run.methods
        ]


def _open_tracker(
    options: WandbOptions,
    folder: RunFolder,
    log: MetricsLog,
    seed: int,
    decisive: dict[str, Any],
    methods: Sequence[str],
) -> WandbTracker | None:
    if options.mode == "disabled":
        return None
    group = f"{decisive['benchmark']}-{folder.path.name}"
    identity = hashlib.sha256(f"{folder.path.resolve()}|{decisive}|{seed}".encode()).hexdigest()[:12]
    config = {**decisive, "seed": seed, "methods": list(methods), "versions": _versions(), "git_commit": _git_commit()}
    tracker = WandbTracker(
        options, folder.path, name=f"{group}-seed{seed}", group=group, run_id=identity, config=config
    )
    for record in log.read():  # what an earlier call logged, if there was one
        if record.stage.startswith(f"seed{seed}/"):
            tracker.log(record)
    return tracker


def _write(
    folder: RunFolder,
    benchmark: str,
    backbone: str,
    rows: list[ResultRow],
    runs: list[SeedRun],
    options: dict[str, Any],
) -> None:
    title = f"{benchmark}, {backbone}"
    seeds = {"seeds": [run.seed for run in runs]}
    write_csv(folder.path / "results.csv", rows)
    write_markdown(folder.path / "results.md", title, rows, seeds | options | _versions())
    draw_methods(folder.path / "figures" / "methods.png", title, rows)
    for method in runs[0].methods:
        means = {user: torch.stack([run.matrix(method, user) for run in runs]).mean(0) for user in runs[0].data.users}
        of_seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].seed}"
        path = folder.path / "figures" / f"matrix-{method}.png"
        draw_matrices(path, f"{method}: accuracy, {of_seeds}", means, runs[0].data.tasks)


def _say(folder: RunFolder, rows: list[ResultRow], seeds: Sequence[int]) -> None:
    path = folder.path
    print(f"\n{markdown_table(rows)}\n\n{legend(rows)}\n")
    print(f"Results:     {path / 'results.csv'}, {path / 'results.md'}")
    print(f"Figures:     {path / 'figures'}")
    print(f"Models:      {path / 'merged'} (for each user), {path / 'checkpoints'} (experts)")
    print(f"Importances: {path / 'importances'}")
    print(f"Metrics:     {path / 'metrics.jsonl'}")
    tracked = [stage.result["folders"] for seed in seeds if (stage := folder.finished(_tracked(seed))) is not None]
    offline = [name for names in tracked for name in names if name.startswith("offline")]
    if offline:
        print("To W&B:      wandb sync " + " ".join(shlex.quote(str(path / "wandb" / name)) for name in offline))


def _versions() -> dict[str, str]:
    return {
        "pl_personalize": __version__,
        "lightning": lightning.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _git_commit() -> str | None:
    """The commit of the working folder, if it is a checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what Lightning says at the start and end of every one of many short stages."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*smaller than the logging interval.*",
                ".*exists and is not empty.*",
                ".*LeafSpec.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
