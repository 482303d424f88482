"""Running an experiment from its options to its tables, figures and tracked runs."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from pl_personalize.artifacts import ArtifactError
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.datamodules.base import whole
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.check_data import check_data
from pl_personalize.runner.checks import check_body, check_options, choose_adaptations, folder_in_a_sweep
from pl_personalize.runner.expert_run import ExpertRun
from pl_personalize.runner.following import Following, rows_of
from pl_personalize.runner.joint_run import JointRun
from pl_personalize.runner.methods import MERGES_AND_BOUNDS, AdaptationName, MethodName, by_server, variants
from pl_personalize.runner.options import (
    AdaptationOptions,
    BaselineOptions,
    ImportanceOptions,
    LoggerName,
    TestedModels,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.report import report
from pl_personalize.runner.results import ResultRow, with_means_over_users
from pl_personalize.runner.run_folder import RunFolder, refuse_folder
from pl_personalize.runner.sequence_run import EWCRun, FinetuneRun, LwFRun, MASRun
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.stages import Setting

SERVER_RUNS: dict[str, type[ServerRun]] = {
    run.server: run for run in (ExpertRun, MASRun, EWCRun, LwFRun, FinetuneRun, JointRun)
}
TRAINING = TrainingOptions()
IMPORTANCE = ImportanceOptions()
ADAPTATION = AdaptationOptions()
BASELINES = BaselineOptions()
TRAINER = TrainerOptions()
WANDB = WandbOptions()


def run_experiment(
    benchmark: str,
    backbone: str,
    datamodule: TaskIncrementalDataModule,
    make_network: Callable[[int], TaskNetwork],
    *,
    methods: Sequence[str] | str = MERGES_AND_BOUNDS,
    seeds: Sequence[int] | int = (1, 2, 3),
    adaptations: Sequence[AdaptationName] | AdaptationName | None = None,
    models: TestedModels = "all",
    training: TrainingOptions = TRAINING,
    importance: ImportanceOptions = IMPORTANCE,
    adaptation: AdaptationOptions = ADAPTATION,
    baselines: BaselineOptions = BASELINES,
    trainer: TrainerOptions = TRAINER,
    loggers: Sequence[LoggerName] | LoggerName = ("wandb",),
    wandb: WandbOptions = WANDB,
    output_dir: Path | None = None,
    options: Mapping[str, Any] | None = None,
    paper: Mapping[str, PaperResult] | None = None,
    paper_note: str | None = None,
) -> list[ResultRow]:
    """Train, compute importances, merge and test, for each seed; write and print what came out.

    Stages that an earlier call finished in ``output_dir`` are not done again; a stage that was interrupted goes on from
    its last checkpoint.

    Args:
        benchmark: Its name, for the results.
        backbone: Name of the network, for the results.
        datamodule: The benchmark.
        make_network: The network for a number of classes.
        methods: What is compared, one or several: the merges ``MAS-RACL``, ``FIM-RACL``, ``MAS-IMM``, ``FIM-IMM``,
            ``mean-IMM``; the methods ``MAS``, ``EWC``, ``LwF``, ``Finetune``, which train one model through all tasks;
            ``FT``, experts trained further on the user's labelled images; the bounds ``Experts``, ``Joint``.
        seeds: One or several, of initial parameters and of the order of the data.
        adaptations: Of batch norm, for networks that have it, under which methods are tested, one or several: ``last``,
            ``average``, ``expert``, ``reference``, ``recalibrate``, ``AdaBN``, ``AdaBN-S``; by default ``AdaBN``.
        models: What is tested of a sequence of models: ``all``, or ``last``: only the one after the last task, which
            has no forgetting, and takes a fraction of the time.
        training: How models are trained.
        importance: How importances are estimated.
        adaptation: How batch norm is adapted.
        baselines: Methods that do not merge: ``MAS``, ``EWC``, ``LwF``, ``FT``.
        trainer: For the Lightning Trainers.
        loggers: Who follows the runs: ``wandb``, ``csv``, ``tensorboard``; one, several, or none. There is one run for
            each seed and server method.
        wandb: Tracking in Weights & Biases.
        output_dir: Folder of the run, by default ``runs`` and the benchmark's name. Run again, it goes on where it was.
            A finished run may be in a folder that cannot be written: then its results are printed alone.
        options: Further options that the results depend on.
        paper: The paper's figures, to stand beside ours.
        paper_note: What to know when comparing with them.

    Returns:
        The rows of ``results.csv``.

    Raises:
        ArtifactError: If the folder holds a run with other options or files of another program, another process works
            in it, or it cannot be written and there is something to write.
        MisconfigurationException: If an option is out of range, or data or a package are missing.
    """
    names = [methods] if isinstance(methods, str) else methods
    seeds = [whole("A seed", seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    loggers = [loggers] if isinstance(loggers, str) else loggers
    if wandb.mode == "disabled":
        loggers = [name for name in loggers if name != "wandb"]
    output_dir = (output_dir or Path("runs") / re.sub(r"\W+", "-", benchmark.lower())).expanduser()
    with _quiet_lightning():
        check_options(
            datamodule, names, models, seeds, training, importance, adaptation, baselines, trainer, loggers, wandb
        )
    chosen = cast("Sequence[MethodName]", names)  # as was just checked
    with torch.random.fork_rng(devices=[]):
        network = make_network(2)
    check_body(network, chosen)
    adaptations = choose_adaptations(adaptations, network, chosen, models)
    servers = by_server(chosen)
    if "wandb" in loggers and os.environ.get("WANDB_SWEEP_ID"):
        output_dir = folder_in_a_sweep(output_dir, len(servers) * len(seeds))
    decisive = {"benchmark": benchmark, "backbone": backbone} | asdict(training) | asdict(importance) | asdict(trainer)
    decisive["models"] = models
    decisive |= {f"baselines.{name}": value for name, value in asdict(baselines).items()} | dict(options or {})
    if "none" not in adaptations:
        decisive |= {f"adaptation.{name}": value for name, value in asdict(adaptation).items()}
    for name in ("enable_progress_bar", "log_every_n_steps"):
        decisive.pop(name)
    decisive = json.loads(json.dumps(decisive))  # plain numbers and lists, as the manifest and W&B keep them
    start = time.perf_counter()
    seconds: dict[str, float] = defaultdict(float)
    refuse_folder(output_dir)  # before anything is fetched
    datamodule.prepare_data()
    folder = RunFolder(output_dir, decisive)
    with _explained_interruption(), folder.locked() as writable, folder.explained(), _quiet_lightning():
        setting = Setting(
            folder, datamodule, make_network, training, importance, trainer, adaptations, adaptation, baselines, models
        )
        runs = [SERVER_RUNS[server](setting, group, seed) for seed in seeds for server, group in servers.items()]
        pending = [[work for work in run.stages() if folder.finished(work.name) is None] for run in runs]
        total = sum(1 for run in runs for _ in run.stages())
        done = total - sum(map(len, pending))
        following = [Following(run, benchmark, backbone, decisive, wandb) for run in runs]
        if not writable:
            _refuse_work(output_dir, total - done, [n for n in loggers if any(follow.due(n) for follow in following)])
        if done < total:
            check_data(datamodule, network, chosen, trainer)
        else:
            print("Every stage was finished before.")
        pause = 0.1 if sys.stderr.isatty() else 10  # in a log file, a line now and then
        with tqdm(total=total, unit="stage", initial=done, mininterval=pause, disable=done == total) as bar:
            for run, works, follow in zip(runs, pending, following, strict=True):
                if works:
                    run.forget_interrupted()
                wanted = [name for name in loggers if works or follow.due(name)]
                with follow.opened(wanted):
                    for work in works:
                        bar.set_description(work.name, refresh=False)
                        begun = time.perf_counter()
                        work.run()
                        seconds[work.kind] += time.perf_counter() - begun
                        bar.update()
        rows = [row for run in runs for row in rows_of(run, benchmark, backbone)]
        order = [variant.label for variant in variants(chosen, adaptations)]
        rows = with_means_over_users(sorted(rows, key=lambda row: order.index(row.label)))
        report(folder, rows, runs, decisive | {"seeds": list(seeds)}, paper, paper_note, loggers, write=writable)
        if seconds:
            seconds["the rest"] = time.perf_counter() - start - sum(seconds.values())
            print("Time:        " + ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()))
    return rows


def _refuse_work(folder: Path, stages: int, untold: Sequence[str]) -> None:
    """Refuse what would have to be written in a folder that cannot be.

    Raises:
        ArtifactError: If stages are not finished, or loggers not told.
    """
    left = [f"{stages} stages are not finished"] if stages else []
    left += [f"the loggers {', '.join(untold)} were not told all (loggers=[] leaves them out)"] if untold else []
    if left:
        raise ArtifactError(
            f"{folder} cannot be written, and {' and '.join(left)}. Choose another folder with output_dir "
            "(--output_dir), or let this one be written."
        )


@contextmanager
def _explained_interruption() -> Iterator[None]:
    """Say that an interrupted run can go on; Lightning turns Ctrl-C into an exit without a word."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


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
                ".*have no `val_dataloader`.*",  # where batch norm alone is trained
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
