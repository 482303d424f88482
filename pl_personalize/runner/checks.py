"""What is checked before an experiment does anything."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.models import TaskNetwork
from pl_personalize.runner.expert_run import SERVER
from pl_personalize.runner.methods import ADAPTATIONS, METHODS, AdaptationName, MethodName, variants
from pl_personalize.runner.options import (
    AdaptationOptions,
    ArtifactName,
    BaselineOptions,
    ImportanceOptions,
    LoggerName,
    TestedModels,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.results import ALL_USERS


def check_options(
    datamodule: TaskIncrementalDataModule,
    methods: Sequence[str],
    models: str,
    seeds: Sequence[int],
    training: TrainingOptions,
    importance: ImportanceOptions,
    adaptation: AdaptationOptions,
    baselines: BaselineOptions,
    trainer: TrainerOptions,
    loggers: Sequence[str],
    wandb: WandbOptions,
) -> None:
    """Refuse options that cannot work, before anything is done.

    Raises:
        MisconfigurationException: With the option, its value, and what it may be.
    """
    for name, values, least in (("methods", methods, 1), ("seeds", seeds, 1), ("loggers", loggers, 0)):
        if len(values) < least or len(set(values)) != len(values):
            what = "at least one, and each once" if least else "each once"
            raise MisconfigurationException(f"{name} must be {what}; got {list(values)}.")
    if reserved := [user for user in datamodule.users if _is_reserved(user)]:
        raise MisconfigurationException(
            f"A user cannot be called {reserved[0]!r}: that has a meaning in results or in names of files."
        )
    if "wandb" not in loggers and wandb.mode != "disabled" and (wandb.artifacts or wandb.images_of):
        raise MisconfigurationException("wandb.artifacts and wandb.images_of need 'wandb' among the loggers.")
    known: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("models", [models], get_args(TestedModels)),
        ("methods", methods, list(METHODS)),
        ("loggers", loggers, get_args(LoggerName)),
        ("wandb.artifacts", wandb.artifacts, get_args(ArtifactName)),
        ("wandb.images_of", wandb.images_of, datamodule.users),
    ]
    for name, chosen, there in known:
        if unknown := [one for one in chosen if one not in there]:
            raise MisconfigurationException(
                f"{name}: there is no {unknown[0]!r}{_meant(unknown[0], there)} There are {', '.join(there)}."
            )
    pull = training.l2_transfer
    for name, value, fits, range_ in (
        ("training.epochs", training.epochs, training.epochs >= 1, "at least 1"),
        ("training.lr", training.lr, 0 < training.lr < math.inf, "positive"),
        ("training.momentum", training.momentum, 0 <= training.momentum < 1, "in [0, 1)"),
        ("training.weight_decay", training.weight_decay, _is_finite(training.weight_decay), "0 or more"),
        (
            "training.l2_transfer",
            pull,
            pull == "reference" or _is_finite(pull),
            "0 or more, or 'reference'",
        ),
        ("training.lr_patience", training.lr_patience, training.lr_patience >= 1, "at least 1"),
        ("training.stop_patience", training.stop_patience, training.stop_patience >= 1, "at least 1"),
        ("adaptation.epochs", adaptation.epochs, adaptation.epochs >= 1, "at least 1"),
        ("adaptation.lr", adaptation.lr, 0 < adaptation.lr < math.inf, "positive"),
        ("adaptation.prior_samples", adaptation.prior_samples, 0 <= adaptation.prior_samples < math.inf, "0 or more"),
        ("baselines.mas_strength", baselines.mas_strength, 0 <= baselines.mas_strength < math.inf, "0 or more"),
        ("baselines.ewc_strength", baselines.ewc_strength, 0 <= baselines.ewc_strength < math.inf, "0 or more"),
        ("baselines.lwf_strength", baselines.lwf_strength, 0 <= baselines.lwf_strength < math.inf, "0 or more"),
        ("baselines.lwf_temperature", baselines.lwf_temperature, 0 < baselines.lwf_temperature < math.inf, "positive"),
        ("baselines.ft_epochs", baselines.ft_epochs, baselines.ft_epochs >= 1, "at least 1"),
        ("baselines.ft_lr", baselines.ft_lr, 0 < baselines.ft_lr < math.inf, "positive"),
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
                f"An experiment with these options needs {package}, which is not installed: pip install {package}"
            )


def _is_reserved(user: str) -> bool:
    return user in (ALL_USERS, SERVER, "", "..") or Path(user).name != user


def _is_finite(value: float | str) -> bool:
    return not isinstance(value, str) and 0 <= value < math.inf


def _meant(unknown: str, there: Sequence[str]) -> str:
    """The name that comes nearest, in whatever case it is written."""
    names = {name.lower(): name for name in there}
    close = get_close_matches(unknown.lower(), names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else "."


def check_body(network: TaskNetwork, methods: Sequence[MethodName]) -> None:
    """Refuse methods that weigh the body's parameters, where none of these is trained.

    Raises:
        MisconfigurationException: If no parameter of the body needs a gradient, and a method needs importances.
    """
    if any(parameter.requires_grad for parameter in network.body.parameters()):
        return
    if weighing := [method for method in methods if METHODS[method].needs_importances]:
        raise MisconfigurationException(
            "The network's body has no parameter that needs a gradient (all are frozen, or there are none), so there "
            f"are no importances for {', '.join(weighing)}. Let some be trained, or leave these methods out."
        )


def choose_adaptations(
    chosen: Sequence[AdaptationName] | AdaptationName | None,
    network: TaskNetwork,
    methods: Sequence[MethodName],
    models: TestedModels = "all",
) -> list[AdaptationName]:
    """The adaptations of batch norm that were chosen; by default AdaBN for a network that has it.

    Raises:
        MisconfigurationException: If they do not fit the network or the models, or a method has none that has a meaning
            for it.
    """
    layers = batchnorm_layers(network.body)
    if chosen is None:
        return ["AdaBN"] if layers else ["none"]
    if isinstance(chosen, str):
        chosen = [chosen]
    known: list[str] = [name for name in ADAPTATIONS if (name == "none") != bool(layers)]
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
        what = (
            f"must be of {', '.join(known)}, each once"
            if layers
            else "have no meaning for a network without batch norm"
        )
        raise MisconfigurationException(f"adaptations {what}; got {list(chosen)}.")
    if "reference" in chosen and models == "last":
        raise MisconfigurationException(
            "The adaptation 'reference' takes γ and β of earlier merges, which models='last' does not make: leave one "
            "of the two out."
        )
    if without := [method for method in methods if not variants([method], chosen)]:
        raise MisconfigurationException(
            f"None of the adaptations {list(chosen)} has a meaning for {', '.join(without)}, which is no merge; add "
            "'last', or leave the method out."
        )
    return list(chosen)


def folder_in_a_sweep(output_dir: Path, runs: int) -> Path:
    """A sweep's agent starts the same command with other options: each gets a folder of its own."""
    if runs != 1:
        raise MisconfigurationException(
            f"In a sweep a call is one run of W&B, but these seeds and methods make {runs}: give one seed, and methods "
            "that the server trains for in one way (merges together, but MAS, EWC, LwF, Finetune and Joint each alone)."
        )
    return output_dir / os.environ.get("WANDB_RUN_ID", "run")
