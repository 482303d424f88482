"""Networks by name, as scripts and configuration files choose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_personalize.models.backbones import backbone, check_backbone
from pl_personalize.models.task_network import TaskNetwork, cnn_bn, mlp
from pl_personalize.per_sample.module_state import random_state_kept

OWN_NETWORKS = ("mlp", "cnn_bn")
_HIDDEN = (100, 100)


@dataclass(frozen=True)
class NetworkOptions:
    """Network chosen by name, with validated options.

    Attributes:
        name: ``mlp``, a multi-layer perceptron; ``cnn_bn``, four blocks of convolution and batch norm; the name of a
            torchvision classification model (``squeezenet1_1``, ``resnet18``, …); or ``timm:`` and the name of a timm
            model (``timm:resnet18``), if timm is installed.
        hidden: Widths of the hidden layers of ``mlp``.
        weights: For a torchvision or timm model: the name of published weights (``DEFAULT``) or the path of a file with
            a state dict; null for random initialization.
        resize_to: For a torchvision or timm model: side length in pixels to which the network resizes its input images
            (bilinear, antialiased), for models that need larger images than the data set has; null to keep their size.
        channels_last: Convert input images to the channels-last memory format, in which most convolutions are faster.
            Some layers do not support it, and results may differ by rounding errors. Not for ``mlp``.

    Raises:
        MisconfigurationException: If the name is unknown, or an option does not apply to the network.

    Example:
        >>> options = NetworkOptions(hidden=[20])
        >>> options.title
        'MLP 20'
        >>> options.make((3, 28, 28), num_classes=2).num_classes
        2
    """

    name: str = "mlp"
    hidden: Sequence[int] = _HIDDEN
    weights: str | None = None
    resize_to: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        try:
            check_backbone(self.name, OWN_NETWORKS)
        except (ValueError, ModuleNotFoundError) as error:
            raise MisconfigurationException(str(error)) from error
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.name != "mlp" and self.hidden != _HIDDEN:
            raise MisconfigurationException(f"hidden={list(self.hidden)} applies to mlp only, not to {self.name}.")
        if not self.hidden or not all(isinstance(width, int) and width > 0 for width in self.hidden):
            raise MisconfigurationException(f"hidden must be positive integers, at least one; got {list(self.hidden)}.")
        if self.name in OWN_NETWORKS:
            for option in ("weights", "resize_to"):
                if (value := getattr(self, option)) is not None:
                    raise MisconfigurationException(
                        f"{option}={value!r} applies to torchvision and timm models only, not to {self.name}: set it "
                        "to null."
                    )
        if self.resize_to is not None and self.resize_to < 1:
            raise MisconfigurationException(f"resize_to must be a positive integer; got {self.resize_to}.")
        if self.name == "mlp" and self.channels_last:
            raise MisconfigurationException("channels_last does not apply to mlp, which has no convolutions.")

    @property
    def title(self) -> str:
        """The name in tables of results, such as ``"MLP 100-100"``."""
        if self.name == "mlp":
            return f"MLP {'-'.join(map(str, self.hidden))}"
        return "CNN-BN" if self.name == "cnn_bn" else self.name

    def make(self, input_shape: Sequence[int], num_classes: int) -> TaskNetwork:
        """Build the network, with random parameters from the global generator where no weights are loaded.

        Args:
            input_shape: Shape of one image, (channels, height, width).
            num_classes: Number of outputs of the head.
        """
        if self.name == "mlp":
            network = mlp(input_shape, num_classes, self.hidden)
        elif self.name == "cnn_bn":
            network = cnn_bn(input_shape, num_classes)
        else:
            network = backbone(self.name, num_classes, weights=self.weights)
        if self.resize_to is not None:
            network.body.register_forward_pre_hook(partial(_resize, size=self.resize_to))
        if self.channels_last:
            network.body.register_forward_pre_hook(_to_channels_last)
        return network

    def check(self, input_shape: Sequence[int]) -> None:
        """Check, with one forward pass, that the network can be built and takes such images.

        Args:
            input_shape: Shape of one image, (channels, height, width).

        Raises:
            MisconfigurationException: If the weights cannot be loaded, or the network cannot process the images.
        """
        with random_state_kept(torch.device("cpu")):
            try:
                network = self.make(input_shape, 2)
            except (ValueError, ModuleNotFoundError) as error:
                raise MisconfigurationException(str(error)) from error
            except OSError as error:
                raise MisconfigurationException(
                    f"The weights {self.weights!r} of {self.name} cannot be downloaded ({error}). Set weights to the "
                    "path of a file, or to null for random initialization."
                ) from error
            try:
                with torch.no_grad():
                    network.eval()(torch.zeros(1, *input_shape))
            except Exception as error:  # images that are too small can fail in any layer
                side = self.resize_to
                size = "×".join(map(str, input_shape[1:] if side is None else (side, side)))
                raise MisconfigurationException(
                    f"{self.name} cannot process images of {size} pixels ({error}). Use larger images, or let the "
                    "network enlarge them with resize_to (64 or 224)."
                ) from error


def _resize(body: nn.Module, inputs: tuple[Tensor, ...], size: int) -> Tensor:
    """Resize inside the network rather than in the datamodule, which would hold the larger images in memory."""
    return F.interpolate(inputs[0], (size, size), mode="bilinear", antialias=True)


def _to_channels_last(body: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0].contiguous(memory_format=torch.channels_last)
