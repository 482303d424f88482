"""Running an experiment: from its options to tables, figures and tracked runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.artifacts import ArtifactError
from pl_personalize.functional.names import some
from pl_personalize.methods import METHODS
from pl_personalize.models import TaskNetwork
from pl_personalize.models.network_options import NetworkOptions
from pl_personalize.runner.check_data import check_data
from pl_personalize.runner.experiment import Experiment
from pl_personalize.runner.following import Following, rows_of
from pl_personalize.runner.progress import Progress
from pl_personalize.runner.quiet import quiet_lightning
from pl_personalize.runner.report import report
from pl_personalize.runner.results import ResultRow, with_means_over_users
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.variants import Variant
from pl_personalize.stages.run_folder import RunFolder, refuse_folder


def run_experiment(experiment: Experiment) -> list[ResultRow]:
    """Train, merge, adapt and test for each seed; write and print the results.

    Args:
        experiment: The experiment.

    Returns:
        The rows of ``results.csv``.

    Raises:
        ArtifactError: If the folder holds a run with other options or files of another program, another process works
            in it, or it is read-only and there is something to write.
        MisconfigurationException: If options, network and data do not fit each other, or data are missing.
    """
    began = time.monotonic()
    experiment = _in_a_sweep(experiment)
    refuse_folder(experiment.folder)  # before anything is fetched
    experiment.data.prepare_data()
    network, variants = _prepare(experiment)
    options = experiment.decisive_options()
    folder = RunFolder(experiment.folder, options)
    with _explained_interruption(), folder.locked() as writable, folder.explained(), quiet_lightning():
        runs = _runs(experiment, folder, variants)
        works = {run: [work for work in run.stages() if folder.finished(work.name) is None] for run in runs}
        following = {run: Following(run, options) for run in runs}
        planned = {work.name: work for run in runs for work in run.stages()}
        pending = {work.name: work for run in runs for work in works[run]}
        if not writable:
            _refuse_work(
                folder, len(pending), [n for n in experiment.loggers if any(f.due(n) for f in following.values())]
            )
        if pending:
            check_data(experiment.data, network, experiment.compared, experiment.trainer)
        else:
            print("Every stage was finished before.")
        progress = Progress(list(pending.values()), len(planned) - len(pending))
        with progress.shown():
            for run in runs:
                if works[run]:
                    run.forget_interrupted()
                wanted = [name for name in experiment.loggers if works[run] or following[run].due(name)]
                run.workspace.show.append(progress.show)
                with following[run].opened(wanted):
                    for work in works[run]:
                        if folder.finished(work.name) is None:  # a shared stage may have been done by another run
                            with progress.stage(work):
                                work.run()
        order = [variant.label for variant in variants]
        rows = [row for run in runs for row in rows_of(run)]
        rows = with_means_over_users(sorted(rows, key=lambda row: order.index(row.label)))
        report(folder, rows, runs, options | {"seeds": experiment.seed_list}, write=writable)
        if seconds := progress.seconds:
            seconds["the rest"] = time.monotonic() - began - sum(seconds.values())
            print("Time:        " + ", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()))
    return rows


def _runs(experiment: Experiment, folder: RunFolder, variants: Sequence[Variant]) -> list[ServerRun]:
    """One run for each seed and family of methods."""
    return [
        ServerRun(experiment, folder, family, [v for v in variants if METHODS[v.method] in methods], seed)
        for seed in experiment.seed_list
        for family, methods in experiment.families.items()
    ]


def _prepare(experiment: Experiment) -> tuple[TaskNetwork, list[Variant]]:
    """A network for checks, and the rows of the tables; refuses a network that does not fit them."""
    if isinstance(experiment.network, NetworkOptions):
        experiment.network.check(experiment.data.image_shape)
    with torch.random.fork_rng(devices=[]):
        network = experiment.make_network(2)
    if others := [name for name, value in network.state_dict().items() if not isinstance(value, torch.Tensor)]:
        raise MisconfigurationException(
            f"The network's state has entries that are no tensors and cannot be kept in a run: {some(others)}. "
            "Make them tensors, or leave them out of the state dict."
        )
    weighing = [method.name for method in experiment.compared if method.needs_importances]
    if weighing and not any(parameter.requires_grad for parameter in network.body.parameters()):
        raise MisconfigurationException(
            "The network's body has no parameter that requires a gradient, so there are no importances for "
            f"{', '.join(weighing)}. Unfreeze some parameters, or leave these methods out."
        )
    return network, experiment.variants(network)


def _in_a_sweep(experiment: Experiment) -> Experiment:
    """The experiment in a folder of its own, if a sweep's agent starts the same command with other options."""
    if "wandb" not in experiment.loggers or not os.environ.get("WANDB_SWEEP_ID"):
        return experiment
    runs = len(experiment.families) * len(experiment.seed_list)
    if runs != 1:
        raise MisconfigurationException(
            f"In a sweep each call must be one run of W&B, but these seeds and methods make {runs}: give one seed, and "
            "methods that share their stages (merges together; MAS, EWC, LwF, Finetune and Joint each alone)."
        )
    return replace(experiment, output_dir=experiment.folder / os.environ.get("WANDB_RUN_ID", "run"))


def _refuse_work(folder: RunFolder, stages: int, untold: Sequence[str]) -> None:
    """Refuse to write to a read-only folder."""
    left = [f"{stages} stages are unfinished"] if stages else []
    left += [f"the loggers {', '.join(untold)} are incomplete (loggers=[] leaves them out)"] if untold else []
    if left:
        raise ArtifactError(
            f"{folder.path} is read-only, and {' and '.join(left)}. Choose another folder with output_dir "
            "(--output_dir), or make this one writable."
        )


@contextmanager
def _explained_interruption() -> Iterator[None]:
    """Say that an interrupted run can be resumed; Lightning turns Ctrl-C into an exit without a word."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("\nInterrupted. Run the same command to resume.", file=sys.stderr)
        raise SystemExit(130) from None
