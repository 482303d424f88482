"""What ``numbers.py`` runs; see there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_personalize.datamodules import NumbersDataModule
from pl_personalize.datamodules.numbers import IMAGE_SHAPE
from pl_personalize.models import TaskNetwork, check_backbone, cnn_bn, mlp
from pl_personalize.models import backbone as published_network
from pl_personalize.runner import TrainerOptions, paper_results, run_experiment
from pl_personalize.runner.command_line import errors_in_one_line

PAPER_SOURCES = ("svhn", "mnist")
PAPER_HIDDEN = (100, 100)
OWN_NETWORKS = ("mlp", "cnn_bn")
TRAINER = TrainerOptions(accelerator="cpu")


def main(
    data_dir: Path = Path("data"),
    sources: Sequence[str] = PAPER_SOURCES,
    download: bool = False,
    max_per_source: PositiveInt | None = 10_000,
    split_seed: int | Literal["seed"] = 27,
    backbone: str = "mlp",
    hidden: Sequence[PositiveInt] = PAPER_HIDDEN,
    weights: str | None = None,
    image_size: PositiveInt | None = None,
    batch_size: PositiveInt = 20,
    eval_batch_size: PositiveInt = 1000,
    seeds: Sequence[int] | int = (1, 2, 3, 4, 5),
    trainer: TrainerOptions = TRAINER,
    num_threads: PositiveInt = 1,
    **options: Any,
) -> None:
    """Train, merge and test on Numbers, for a user of each source.

    Args:
        data_dir: Folder of the collections that have names.
        sources: Names (``svhn``, ``mnist``, ``usps``) or folders with ``{train,test}/<digit>/*``; each is one user.
        download: Fetch collections that are missing.
        max_per_source: Cap on the server's images of a task and source; null for all.
        split_seed: Seed of the choice and the division of the images; ``seed``: each of the seeds.
        backbone: ``mlp``, the paper's; ``cnn_bn``: four blocks of convolution and batch norm; or a classification model
            of torchvision (``squeezenet1_1``, ``resnet18``, …), or of timm, if it is installed (``timm:resnet18``).
        hidden: Widths of the hidden layers of ``mlp``.
        weights: For a model of torchvision or timm: the name of published weights (``DEFAULT``) or the path of a file
            with a state dict; null for random ones.
        image_size: For a model of torchvision or timm: side to which it enlarges the images of 28×28, where these are
            too small; null to leave them.
        batch_size: For training.
        eval_batch_size: For importances (those of ``MAS`` and ``EWC`` have ``batch_size``), adaptation and tests; it
            matters for ``--importance.reduction batch``, and for batch norm that is not adapted with
            ``--adaptation.exact true``.
        seeds: One or several, of initial parameters and of the order of the data.
        trainer: For the Lightning Trainers.
        num_threads: Threads for PyTorch; more do not help networks this small.
        **options: Of :func:`~pl_personalize.runner.run_experiment`.
    """
    torch.set_num_threads(num_threads)
    data = NumbersDataModule(
        data_dir,
        sources,
        download=download,
        max_per_source=max_per_source,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        split_seed=split_seed,
    )
    if backbone != "mlp" and tuple(hidden) != PAPER_HIDDEN:
        raise MisconfigurationException(f"hidden is for the backbone mlp alone; got {list(hidden)} with {backbone}.")
    make_network = network_maker(backbone, hidden, weights, image_size)
    same = set(sources) == set(PAPER_SOURCES)
    different = "" if same else f", here {', '.join(data.users)}: compare methods, not levels"
    with_paper = backbone == "mlp" and tuple(hidden) == PAPER_HIDDEN
    run_experiment(
        "Numbers",
        {"mlp": f"MLP {'-'.join(map(str, hidden))}", "cnn_bn": "CNN-BN"}.get(backbone, backbone),
        data,
        make_network,
        seeds=seeds,
        trainer=trainer,
        options={
            "data_dir": str(data_dir.expanduser().resolve()),
            "sources": list(sources),
            "max_per_source": max_per_source,
            "split_seed": split_seed,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
        }
        | ({} if backbone in OWN_NETWORKS else {"weights": weights, "image_size": image_size}),
        paper=paper_results("Numbers", "MLP") if with_paper else None,
        paper_note=f"In the paper, the users are svhn and mnist{different}.",
        **options,
    )


def network_maker(
    backbone: str, hidden: Sequence[int], weights: str | None, image_size: int | None
) -> Callable[[int], TaskNetwork]:
    """What makes the network for a number of classes.

    Raises:
        MisconfigurationException: If there is no such network, or it cannot take the images.
    """
    if backbone in OWN_NETWORKS and (weights, image_size) != (None, None):
        raise MisconfigurationException(
            f"weights and image_size are for networks of torchvision and timm; got {weights} and {image_size} with "
            f"{backbone}."
        )
    if backbone == "mlp":
        return lambda n: mlp(IMAGE_SHAPE, n, hidden)
    if backbone == "cnn_bn":
        return lambda n: cnn_bn(IMAGE_SHAPE, n)

    def make(num_classes: int) -> TaskNetwork:
        network = published_network(backbone, num_classes, weights=weights)
        if image_size is not None:
            network.body.register_forward_pre_hook(partial(_enlarge, size=image_size))
        return network

    try:
        check_backbone(backbone, OWN_NETWORKS)
        network = make(2)
    except (ValueError, ModuleNotFoundError) as error:
        raise MisconfigurationException(str(error)) from error
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *IMAGE_SHAPE))
    except Exception as error:  # where images are too small, any layer may be the one to notice
        side = image_size or IMAGE_SHAPE[-1]
        raise MisconfigurationException(
            f"{backbone} takes no images of {side}×{side} pixels ({error}). Try --image_size 64, or 224."
        ) from error
    return make


def _enlarge(body: nn.Module, inputs: tuple[Tensor, ...], size: int) -> Tensor:
    """In the network, not in the datamodule: there all images are in memory."""
    return F.interpolate(inputs[0], (size, size), mode="bilinear", antialias=True)


def run() -> None:
    """Take the options of the command line."""
    with errors_in_one_line():
        auto_cli(main, as_positional=False)
