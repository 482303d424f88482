"""Networks with a body that is shared by all tasks, and a head per task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn


class ConvHead(nn.Conv2d):
    """Head of a fully convolutional network such as SqueezeNet: a 1×1 convolution and the mean over positions.

    Weights are drawn from a normal distribution with std 0.01 and biases are zero, as in torchvision's SqueezeNet: with
    PyTorch's default initialization, training at common learning rates stays at chance.

    Args:
        in_channels: Number of features.
        out_channels: Number of classes.
        bias: Whether to add a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, features, height, width), or (n, features) of one position."""
        maps = x if x.dim() == 4 else x[:, :, None, None]
        return super().forward(maps).mean((2, 3))


class TaskNetwork(nn.Module):
    """A body and the head of one task: ``head(body(x))``.

    :func:`~pl_personalize.models.backbone` makes one from torchvision or timm models,
    :func:`~pl_personalize.models.split` from any other network.

    Args:
        body: Everything but the last linear layer; its parameters are shared, regularized and merged.
        head: The last linear layer, (n, features) to (n, classes), or 1×1 convolution; one per task.
    """

    def __init__(self, body: nn.Module, head: nn.Linear | ConvHead) -> None:
        super().__init__()
        self.body = body
        self.head = head

    @property
    def num_classes(self) -> int:
        """Number of classes of the head."""
        return self.head.out_channels if isinstance(self.head, ConvHead) else self.head.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of the task."""
        logits: Tensor = self.head(self.body(x))
        return logits

    def new_head(self, num_classes: int) -> nn.Linear | ConvHead:
        """Replace the head by a newly initialized one with ``num_classes`` outputs, and return it."""
        old, bias = self.head, self.head.bias is not None
        device, dtype = old.weight.device, old.weight.dtype
        if isinstance(old, ConvHead):
            self.head = ConvHead(old.in_channels, num_classes, bias, device, dtype)
        else:
            self.head = nn.Linear(old.in_features, num_classes, bias, device, dtype)
        return self.head


class MultiHeadNetwork(nn.Module):
    """A merged body with the heads of all tasks, for use with a known task.

    Args:
        body: See :class:`TaskNetwork`.
        heads: One per task, in order.
    """

    def __init__(self, body: nn.Module, heads: Sequence[nn.Linear | ConvHead]) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor, task: int) -> Tensor:
        """Logits (n, classes) of ``task``, counted from 0."""
        logits: Tensor = self.heads[task](self.body(x))
        return logits


def mlp(input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (100, 100)) -> TaskNetwork:
    """A multi-layer perceptron with ReLU, the paper's ``MLP_cl_100_100`` by default.

    Args:
        input_shape: Shape of one image; it is flattened.
        num_classes: Number of outputs of the head.
        hidden: Widths of the hidden layers.

    Example:
        >>> network = mlp((3, 28, 28), num_classes=2)
        >>> [name for name, _ in network.named_parameters()][::2]
        ['body.hidden1.weight', 'body.hidden2.weight', 'head.weight']
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = prod(input_shape)
    for k, width in enumerate(hidden, start=1):
        layers[f"hidden{k}"] = nn.Linear(features, width)
        layers[f"relu{k}"] = nn.ReLU()
        features = width
    return TaskNetwork(nn.Sequential(layers), nn.Linear(features, num_classes))


def cnn_bn(input_shape: Sequence[int], num_classes: int, widths: Sequence[int] = (8, 16, 32, 64)) -> TaskNetwork:
    """A small convolutional network with batch norm: blocks of 3×3 convolution, batch norm, ReLU and 2×2 pooling.

    The last block ends with the mean over positions. Images of 28×28 pixels are large enough for four blocks.

    Args:
        input_shape: Shape of one image, (channels, height, width).
        num_classes: Number of outputs of the head.
        widths: Number of channels of each block.

    Example:
        >>> network = cnn_bn((3, 28, 28), num_classes=2)
        >>> [name for name, _ in network.body.named_buffers()][:2]
        ['block1.norm.running_mean', 'block1.norm.running_var']
    """
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    channels = input_shape[0]
    for k, width in enumerate(widths, start=1):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width), relu=nn.ReLU()
        )
        layers["pool"] = nn.MaxPool2d(2) if k < len(widths) else nn.AdaptiveAvgPool2d(1)
        blocks[f"block{k}"] = nn.Sequential(layers)
        channels = width
    blocks["flatten"] = nn.Flatten()
    return TaskNetwork(nn.Sequential(blocks), nn.Linear(channels, num_classes))
