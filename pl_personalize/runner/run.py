"""Running an experiment from its options to its tables, figures and tracked runs."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm.auto import tqdm

from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.expert_run import SERVER, ExpertRun
from pl_personalize.runner.figures import draw_matrices, draw_methods
from pl_personalize.runner.following import Following, rows_of, versions
from pl_personalize.runner.joint_run import JointRun
from pl_personalize.runner.methods import (
    ADAPTATIONS,
    METHODS,
    AdaptationName,
    MethodName,
    Variant,
    by_server,
    variants,
)
from pl_personalize.runner.options import (
    AdaptationOptions,
    ArtifactName,
    ImportanceOptions,
    LoggerName,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.paper import PaperResult
from pl_personalize.runner.results import (
    ALL_USERS,
    ResultRow,
    adaptation_table,
    legend,
    markdown_table,
    results_table,
    with_means_over_users,
    write_csv,
    write_markdown,
)
from pl_personalize.runner.run_folder import RunFolder
from pl_personalize.runner.server_run import ServerRun, Setting
from pl_personalize.runner.significance import Comparison, compare, marks

SERVER_RUNS: dict[str, type[ServerRun]] = {run.server: run for run in (ExpertRun, JointRun)}


def run_experiment(
    benchmark: str,
    backbone: str,
    datamodule: TaskIncrementalDataModule,
    make_network: Callable[[int], TaskNetwork],
    *,
    methods: Sequence[MethodName],
    seeds: Sequence[int],
    output_dir: Path,
    training: TrainingOptions,
    importance: ImportanceOptions,
    trainer: TrainerOptions,
    adaptations: Sequence[AdaptationName] | None = None,
    adaptation: AdaptationOptions | None = None,
    loggers: Sequence[LoggerName] = ("wandb",),
    wandb: WandbOptions | None = None,
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
        methods: What is compared.
        seeds: Seeds of initial parameters and of the order of the data.
        output_dir: The run's folder.
        training: How models are trained.
        importance: How importances are estimated.
        trainer: For the Trainers.
        adaptations: Of batch norm, under which every method is tested; by default ``AdaBN`` for a network that has it.
        adaptation: How batch norm is adapted.
        loggers: Who follows the runs; several, or nobody. There is one run for each seed and server method.
        wandb: Tracking in Weights & Biases.
        options: Further options that the results depend on.
        paper: The paper's figures, to stand beside ours.
        paper_note: What to know when comparing with them.

    Returns:
        The rows of ``results.csv``.

    Raises:
        ArtifactError: If the folder holds a run with other options, or another process works in it.
        MisconfigurationException: If an option is out of range, or data or a package are missing.
    """
    wandb, adaptation = wandb or WandbOptions(), adaptation or AdaptationOptions()
    if wandb.mode == "disabled":
        loggers = [name for name in loggers if name != "wandb"]
    _check(datamodule, methods, seeds, training, importance, trainer, loggers, wandb)
    adaptations = _adaptations(adaptations, make_network(2))
    servers = by_server(methods)
    if "wandb" in loggers and os.environ.get("WANDB_SWEEP_ID"):
        output_dir = _folder_in_a_sweep(output_dir, len(servers) * len(seeds))
    decisive = {"benchmark": benchmark, "backbone": backbone} | asdict(training) | asdict(importance) | asdict(trainer)
    decisive |= options or {}
    if "none" not in adaptations:
        decisive |= {f"adaptation.{name}": value for name, value in asdict(adaptation).items()}
    for name in ("enable_progress_bar", "log_every_n_steps"):
        decisive.pop(name)
    decisive = json.loads(json.dumps(decisive))  # plain numbers and lists, as the manifest and W&B keep them
    start = time.perf_counter()
    seconds: dict[str, float] = defaultdict(float)
    datamodule.prepare_data()
    folder = RunFolder(output_dir, decisive)
    with folder.locked(), _quiet_lightning():
        setting = Setting(folder, datamodule, make_network, training, importance, trainer, adaptations, adaptation)
        runs = [SERVER_RUNS[server](setting, group, seed) for seed in seeds for server, group in servers.items()]
        pending = [[work for work in run.stages() if folder.finished(work.name) is None] for run in runs]
        total = sum(1 for run in runs for _ in run.stages())
        done = total - sum(map(len, pending))
        if done < total:
            _load(datamodule)
        pause = 0.1 if sys.stderr.isatty() else 10  # in a log file, a line now and then
        with tqdm(total=total, unit="stage", initial=done, mininterval=pause, disable=done == total) as bar:
            for run, works in zip(runs, pending, strict=True):
                follow = Following(run, benchmark, backbone, decisive, wandb)
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
        order = [variant.label for variant in variants(methods, adaptations)]
        rows = with_means_over_users(sorted(rows, key=lambda row: order.index(row.label)))
        _finish(folder, rows, runs, decisive | {"seeds": list(seeds)}, paper, paper_note, loggers)
        if seconds:
            seconds["the rest"] = time.perf_counter() - start - sum(seconds.values())
            print("Time:        " + ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()))
    return rows


def _check(
    datamodule: TaskIncrementalDataModule,
    methods: Sequence[str],
    seeds: Sequence[int],
    training: TrainingOptions,
    importance: ImportanceOptions,
    trainer: TrainerOptions,
    loggers: Sequence[str],
    wandb: WandbOptions,
) -> None:
    for name, values, least in (("methods", methods, 1), ("seeds", seeds, 1), ("loggers", loggers, 0)):
        if len(values) < least or len(set(values)) != len(values):
            what = "at least one, and each once" if least else "each once"
            raise MisconfigurationException(f"{name} must be {what}; got {list(values)}.")
    if reserved := [user for user in datamodule.users if user in (ALL_USERS, SERVER, "", ".", "..")]:
        raise MisconfigurationException(f"A user cannot be called {reserved[0]!r}: that has a meaning in results.")
    if "wandb" not in loggers and wandb.mode != "disabled" and (wandb.artifacts or wandb.images_of):
        raise MisconfigurationException("wandb.artifacts and wandb.images_of need 'wandb' among the loggers.")
    known: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("methods", methods, list(METHODS)),
        ("loggers", loggers, get_args(LoggerName)),
        ("wandb.artifacts", wandb.artifacts, get_args(ArtifactName)),
        ("wandb.images_of", wandb.images_of, datamodule.users),
    ]
    for name, chosen, there in known:
        if unknown := [one for one in chosen if one not in there]:
            raise MisconfigurationException(f"{name}: there is no {unknown[0]!r}; there are {', '.join(there)}.")
    for name, value, fits, range_ in (
        ("training.epochs", training.epochs, training.epochs >= 1, "at least 1"),
        ("training.lr", training.lr, 0 < training.lr < math.inf, "positive"),
        ("training.momentum", training.momentum, 0 <= training.momentum < 1, "in [0, 1)"),
        ("training.weight_decay", training.weight_decay, training.weight_decay >= 0, "0 or more"),
        ("training.l2_transfer", training.l2_transfer, training.l2_transfer >= 0, "0 or more"),
        ("trainer.log_every_n_steps", trainer.log_every_n_steps, trainer.log_every_n_steps >= 1, "at least 1"),
    ):
        if not fits:
            raise MisconfigurationException(f"{name} must be {range_}; got {value}.")
    try:
        Trainer(**asdict(trainer), devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(f"trainer: {error}") from error
    if importance.fisher_draws != "all" and importance.fisher_draws < 1:
        raise MisconfigurationException(f"fisher_draws must be at least 1, or 'all'; got {importance.fisher_draws}.")
    for package in ("matplotlib", "scipy", *(["tensorboard"] if "tensorboard" in loggers else [])):
        if find_spec(package) is None:  # they are needed at the end: say so at the start
            raise MisconfigurationException(
                f"An experiment needs {package}, which is not installed: pip install 'pl-personalize[experiments]'"
            )


def _adaptations(chosen: Sequence[AdaptationName] | None, network: TaskNetwork) -> list[AdaptationName]:
    """Those that were chosen, if they fit the network; by default AdaBN for a network that has batch norm."""
    layers = batchnorm_layers(network.body)
    if chosen is None:
        return ["AdaBN"] if layers else ["none"]
    known = [name for name in ADAPTATIONS if (name == "none") != bool(layers)]
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
        raise MisconfigurationException(
            f"adaptations must be of {', '.join(known)}, each once, for a network {'with' if layers else 'without'} "
            f"batch norm; got {list(chosen)}."
        )
    return list(chosen)


def _load(datamodule: TaskIncrementalDataModule) -> None:
    """Read all data, so that what is missing or broken is found before any training.

    Raises:
        MisconfigurationException: If there is a split without images.
    """
    for i, task in enumerate(datamodule.tasks):
        splits = [
            ("server", what, split) for what, split in zip(("train", "val"), datamodule.server_split(i), strict=True)
        ]
        for user in datamodule.users:
            found = zip(("adapt", "eval"), datamodule.user_split(user, i), strict=True)
            splits += [(f"user {user}", what, split) for what, split in found]
        for owner, what, split in splits:
            if not len(split.labels):
                raise MisconfigurationException(f"There are no {what} images of the {owner} for the task {task!r}.")


def _folder_in_a_sweep(output_dir: Path, runs: int) -> Path:
    """A sweep's agent starts the same command with other options: each gets a folder of its own."""
    if runs != 1:
        raise MisconfigurationException(
            f"In a sweep a call is one run of W&B, but these seeds and methods make {runs}: give one seed, and methods "
            "that the server trains for in one way (not Joint beside others)."
        )
    return output_dir / os.environ.get("WANDB_RUN_ID", "run")


def _finish(
    folder: RunFolder,
    rows: list[ResultRow],
    runs: Sequence[ServerRun],
    options: Mapping[str, Any],
    paper: Mapping[str, PaperResult] | None,
    paper_note: str | None,
    tracked: Sequence[str],
) -> None:
    """Write the tables and figures, print the table, and say where everything is."""
    path = folder.path
    by_method: dict[str, list[str]] = {}
    for row in rows:
        by_method.setdefault(row.method, [])
        if row.label not in by_method[row.method]:
            by_method[row.method].append(row.label)
    competitors = [name for name in by_method if METHODS[name].bound is None]  # type: ignore[index]
    comparisons = compare(rows)
    if max(map(len, by_method.values())) > 1:
        best = {key: mark for labels in by_method.values() for key, mark in marks(rows, comparisons, labels).items()}
        users = sorted({row.user for row in rows}, key=lambda user: user != ALL_USERS)
        table = "\n\n".join(adaptation_table(rows, user, best) for user in users)
    else:
        labels = [label for name in competitors for label in by_method[name]]
        table = results_table(rows, marks(rows, comparisons, labels), paper)
    text = legend(rows, marked=bool(comparisons), paper_note=paper_note if paper else None)
    title = f"{rows[0].benchmark}, {rows[0].backbone}"
    write_csv(path / "results.csv", rows)
    write_csv(path / "comparisons.csv", comparisons, Comparison, decimals=6)
    for stale in (path / "figures").glob("*.png"):
        stale.unlink()
    write_markdown(path / "results.md", title, table, _with_comparisons(text, comparisons), {**options, **versions()})
    draw_methods(path / "figures" / "methods.png", title, rows)
    _draw_means(path / "figures", runs)

    print(f"\n{table}\n\n{text}\n")
    print(f"Results:     {path / 'results.csv'}, {path / 'results.md'}")
    if comparisons:
        print(f"Differences: {path / 'comparisons.csv'} (between methods, with p-values)")
    print(f"Figures:     {path / 'figures'}")
    print(f"Models:      {path / 'checkpoints'}" + (f", {path / 'merged'} (for each user)" if competitors else ""))
    if (path / "importances").is_dir():
        print(f"Importances: {path / 'importances'}")
    print(f"Metrics:     {path / 'metrics.jsonl'}")
    if "csv" in tracked:
        print(f"CSV:         {path / 'csv'}")
    if "tensorboard" in tracked:
        print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(path / 'tensorboard'))}")
    stages = [folder.finished(f"{run.name}/tracked/wandb") for run in runs]
    segments = [name for stage in stages if stage is not None for name in stage.result["folders"]]
    offline = [name for name in segments if name.startswith("offline")]
    if offline:
        print("To W&B:      wandb sync " + " ".join(shlex.quote(str(path / "wandb" / name)) for name in offline))


def _with_comparisons(text: str, comparisons: Sequence[Comparison]) -> str:
    """The legend, and the differences between methods over all users."""
    lines = [
        [
            one.method,
            one.other,
            f"{one.difference:+.2f}",
            f"{one.p:.2g}",
            f"{one.p_adjusted:.2g}",
            "≈" if one.within_noise else "",
        ]
        for one in comparisons
        if one.user == ALL_USERS
    ]
    if not lines:
        return text
    header = ["method", "other", "difference", "p", "p (Holm)", "within noise"]
    return f"{text}\n\n## Differences over seeds and users\n\n{markdown_table([header, *lines])}"


def _draw_means(folder: Path, runs: Sequence[ServerRun]) -> None:
    """The accuracy matrix of each method, mean over seeds."""
    groups: dict[Variant, list[ServerRun]] = {}
    for run in runs:
        for variant in run.variants:
            groups.setdefault(variant, []).append(run)
    for variant, group in groups.items():
        users, tasks = group[0].data.users, group[0].data.tasks
        means = {user: torch.stack([run.matrix(variant, user) for run in group]).mean(0) for user in users}
        of_seeds = f"mean of {len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        draw_matrices(folder / f"matrix-{variant.label}.png", f"{variant.label}: accuracy, {of_seeds}", means, tasks)


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
