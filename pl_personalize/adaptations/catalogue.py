"""The registry of adaptations, and the adaptations that come with the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.adaptations.adaptation import Adaptation, AdaptationSequence, option_names
from pl_personalize.adaptations.expert_statistics import Average, Last, OfTheTask, Published, Unchanged
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.adaptations.heads import (
    Auto,
    BlackBoxPriors,
    Priors,
    Refit,
    Standardize,
    TestedAdaBN,
    TrueMoments,
    TruePriors,
    TruePriorsAndMoments,
)
from pl_personalize.adaptations.learned import Learned
from pl_personalize.adaptations.reestimated_statistics import AdaBN, AdaBNSupervised, EarlyAdaBN, Recalibrate
from pl_personalize.batchnorm import batchnorm_layers
from pl_personalize.models import TaskNetwork
from pl_personalize.registry import Registry

ADAPTATIONS: Registry[type[Adaptation]] = Registry(
    "adaptation",
    [
        *(
            Unchanged,
            Last,
            Average,
            OfTheTask,
            Published,
            Recalibrate,
            AdaBN,
            EarlyAdaBN,
            AdaBNSupervised,
            FineTune,
            Learned,
        ),
        *(Refit, Priors, BlackBoxPriors, Standardize, TestedAdaBN, Auto, TruePriors, TrueMoments, TruePriorsAndMoments),
    ],
)


def find_adaptation(name: str, options: Mapping[str, Any] | None = None) -> AdaptationSequence:
    """Find an adaptation by its name, or a sequence of them by names joined by ``+``.

    Args:
        name: Such as ``"AdaBN"`` or ``"recalibrate+AdaBN"``.
        options: Options of the steps by name; every step that has such an option takes it.

    Raises:
        MisconfigurationException: If there is no such adaptation, none of the steps has such an option, or a value is
            out of range.

    Example:
        >>> find_adaptation("AdaBN", {"exact": True}).steps
        (AdaBN(exact=True, prior_samples=0.0, max_scratch_mb=256),)
    """
    try:
        kinds = [ADAPTATIONS.find(part) for part in split_steps(name)]
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    options = dict(options or {})
    known = {option for kind in kinds for option in option_names(kind)}
    if unknown := options.keys() - known:
        raise MisconfigurationException(
            f"The adaptation {name!r} has no option {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    return AdaptationSequence(
        tuple(kind(**{k: v for k, v in options.items() if k in option_names(kind)}) for kind in kinds)
    )


def split_steps(name: str) -> list[str]:
    """The names in a sequence.

    Raises:
        ValueError: If ``none`` is one of several.
    """
    steps = name.split("+")
    if len(steps) > 1 and Unchanged.name in steps:
        raise ValueError(f"{name!r}: {Unchanged.name!r} does nothing in a sequence; leave it out.")
    return steps


def default_adaptation(network: TaskNetwork) -> str:
    """The adaptation that is used if none is chosen: AdaBN where there is batch norm.

    Example:
        >>> from pl_personalize.models import cnn_bn, mlp
        >>> default_adaptation(mlp((4,), 2)), default_adaptation(cnn_bn((3, 28, 28), 2))
        ('none', 'AdaBN')
    """
    return AdaBN.name if batchnorm_layers(network.body) else Unchanged.name
