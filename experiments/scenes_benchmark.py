"""What ``catprior.py`` and ``transprior.py`` run; see there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_personalize.datamodules.scenes import SceneDataModule
from pl_personalize.models import TaskNetwork, check_backbone
from pl_personalize.models import backbone as published_network
from pl_personalize.runner import TrainingOptions, paper_by_label, run_experiment
from pl_personalize.runner.command_line import errors_in_one_line

PAPER_BACKBONES = {"alexnet": "AlexNet", "vgg11": "VGG11", "vgg11_bn": "VGG11-BN"}
ELSEWHERE = {"task", "user", "seed"}  # set by the runner
TRAINING = TrainingOptions(epochs=50)


def compare(
    data: SceneDataModule,
    benchmark: str,
    *,
    backbone: str = "vgg11",
    weights: str | None = "DEFAULT",
    channels_last: bool = False,
    training: TrainingOptions = TRAINING,
    num_threads: PositiveInt | None = None,
    **options: Any,
) -> None:
    """Train, merge and test on a benchmark of scenes.

    Args:
        data: The benchmark.
        benchmark: Its name.
        backbone: A classification model of torchvision (``alexnet``, ``vgg11``, ``vgg11_bn`` in the paper), or of timm,
            if it is installed (``timm:tf_efficientnet_lite0``).
        weights: The name of published weights (``DEFAULT``) or the path of a file with a state dict; null for random
            ones.
        channels_last: Give images to the network in the memory layout in which most convolutions are faster (some other
            layers take no such images); results may differ by rounding.
        training: How models are trained.
        num_threads: Threads for PyTorch; by default its own choice.
        **options: Of :func:`~pl_personalize.runner.run_experiment`.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    data.prepare_data()  # before weights are fetched
    published = PAPER_BACKBONES.get(backbone)
    run_experiment(
        benchmark,
        published or backbone,
        data,
        network_maker(backbone, weights, data.image_size, channels_last),
        training=training,
        options={**data.decisive_options(), "weights": weights, "channels_last": channels_last},
        paper=None if published is None else paper_by_label(benchmark, published),
        paper_note="In the paper, the scenes are MIT Indoor's, and forgetting stands in parentheses.",
        **options,
    )


def to_channels_last(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """A hook before a module's forward, which changes how its images lie in memory."""
    return inputs[0].contiguous(memory_format=torch.channels_last)


def network_maker(
    backbone: str, weights: str | None, image_size: int, channels_last: bool = False
) -> Callable[[int], TaskNetwork]:
    """What makes the network for a number of classes.

    Raises:
        MisconfigurationException: If there is no such network or no such weights, or it cannot take the images.
    """

    def make(num_classes: int) -> TaskNetwork:
        network = published_network(backbone, num_classes, weights=weights)
        if channels_last:
            network.body.register_forward_pre_hook(to_channels_last)
        return network

    try:
        check_backbone(backbone)
        network = make(2)
    except (ValueError, ModuleNotFoundError) as error:
        raise MisconfigurationException(str(error)) from error
    except OSError as error:
        raise MisconfigurationException(
            f"The weights {weights!r} of {backbone} cannot be fetched ({error}). Give the path of a file with "
            "--weights, or null for random ones."
        ) from error
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # where images are too small, any layer may be the one to notice
        raise MisconfigurationException(
            f"{backbone} takes no images of {image_size}×{image_size} pixels ({error}). Try a larger --image_size."
        ) from error
    return make


def run(benchmark: str, datamodule: type[SceneDataModule], description: str) -> None:
    """Take the options of the command line: those of the datamodule, and those of :func:`compare`."""
    parser = ArgumentParser(description=description.partition("\n\n    python")[0])  # which would lose its line breaks
    parser.add_argument("--config", action="config", help="Path to a configuration file.")
    names = parser.add_class_arguments(datamodule, skip=ELSEWHERE)
    parser.add_function_arguments(compare, skip={"data", "benchmark"})
    chosen = dict(parser.instantiate(parser.parse_args()))
    options = {name: value for name, value in chosen.items() if name not in {"config", *names}}
    with errors_in_one_line():
        compare(datamodule(**{name: chosen[name] for name in names}), benchmark, **options)
