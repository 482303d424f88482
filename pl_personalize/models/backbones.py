"""Networks of torchvision and timm by name, split into body and head."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import MNASNet, SqueezeNet

from pl_personalize.artifacts import open_state_dict
from pl_personalize.models.splitting import as_conv_head, possible_heads, split_checked, split_in_place, why_no_head
from pl_personalize.models.task_network import TaskNetwork
from pl_personalize.models.weights import efficientnet_lite_to_timm, is_efficientnet_lite, load_weights

_TIMM = "timm:"
# Auxiliary classifiers, whose outputs are returned beside the logits in training, are dropped.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def backbone(
    name: str, num_classes: int, *, weights: str | os.PathLike[str] | None = None, **options: Any
) -> TaskNetwork:
    """Build a torchvision or timm network, with its last linear layer as the head.

    Parameters of the body keep their original names (``body.features.0.weight``). The head has PyTorch's default
    initialization, whatever the original network uses. Differences from torchvision: the head of SqueezeNet is its last
    convolution **without** the following ReLU (which hinders learning few classes), see
    :class:`~pl_personalize.models.ConvHead`; GoogLeNet and Inception v3 have no auxiliary classifiers.

    Args:
        name: The name of a torchvision classification model (``squeezenet1_0``, ``vgg11_bn``, ``resnet18``,
            ``vit_b_16``, …), or ``timm:`` and the name of a timm model, if timm is installed; :func:`backbone_names`
            lists them.
        num_classes: Number of outputs of the head.
        weights: ``None`` for random initialization; the name of published weights (``DEFAULT``, ``IMAGENET1K_V1``, …;
            for timm ``DEFAULT``), which are downloaded unless cached; or the path of a checkpoint, a file of
            ``torch.save`` or a ``.safetensors`` file with a state dict of the whole network. Files of the
            efficientnet-lite-pytorch package fit ``timm:tf_efficientnet_lite0``. The head is loaded only if it has
            ``num_classes`` classes.
        options: Options of torchvision's or timm's model function, such as ``dropout``, ``image_size`` of a vision
            transformer, or ``transform_input=True`` for files of GoogLeNet's or Inception's published weights.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: If the network or the weights are unknown, or the network cannot be split.
        ArtifactError: If a file of weights cannot be read or does not fit; the message lists missing and unexpected
            entries.
        ModuleNotFoundError: If timm is needed but not installed.

    Example:
        >>> network = backbone("squeezenet1_1", num_classes=3)
        >>> network(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 3])
        >>> [name for name, _ in network.named_parameters()][::25]
        ['body.features.0.weight', 'body.features.7.expand3x3.bias', 'head.weight']
    """
    check_backbone(name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}.")
    make = _from_timm if name.startswith(_TIMM) else _from_torchvision
    network, with_head = make(name.removeprefix(_TIMM), num_classes, weights, options)
    if not with_head:
        network.new_head(num_classes)
    return network


def backbone_names() -> list[str]:
    """List the names that :func:`backbone` takes, including timm's if it is installed.

    Example:
        >>> backbone_names()[:3]
        ['alexnet', 'convnext_base', 'convnext_large']
    """
    return [*_torchvision_names(), *(_timm_names() if find_spec("timm") is not None else [])]


def check_backbone(name: str, others: Sequence[str] = ()) -> None:
    """Check the name of a network before building it.

    Args:
        name: The name for :func:`backbone`.
        others: Further valid names.

    Raises:
        ValueError: If the name is unknown; the message suggests similar names.
        ModuleNotFoundError: If it is a timm model and timm is not installed.
    """
    if name in others or name in _torchvision_names():
        return
    if name.startswith(_TIMM) and _timm().is_model(name.removeprefix(_TIMM)):
        return
    names = _timm_names() if name.startswith(_TIMM) else [*others, *backbone_names()]
    # Also find timm's names without their prefix, unless torchvision has the same name.
    known = {one.removeprefix(_TIMM): one for one in reversed(names)}
    close = [known[one] for one in get_close_matches(name.removeprefix(_TIMM).lower(), known)]
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    there = [*others, "torchvision's classification models (resnet18, …) and, if timm is installed, timm's (timm:…)"]
    raise ValueError(
        f"Unknown network {name!r}{meant} Known: {', '.join(there)}; see pl_personalize.models.backbone_names()."
    )


def _torchvision_names() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)  # type: ignore[no-any-return]


def _from_torchvision(
    name: str, num_classes: int, weights: str | os.PathLike[str] | None, options: dict[str, Any]
) -> tuple[TaskNetwork, bool]:
    if name in _AUXILIARY:
        if options.get("aux_logits"):
            raise ValueError(f"{name} has two outputs with aux_logits=True; only one head is supported.")
        # Avoids torchvision's warning, and seconds of drawing parameters that are replaced.
        options = {"init_weights": weights is None} | options | {"aux_logits": False}
    names = {} if weights is None else dict(torchvision_models.get_model_weights(name).__members__)
    published = names.get(str(weights))
    if weights is not None and published is None and not os.path.isfile(weights):
        raise ValueError(
            f"weights={str(weights)!r} is neither a file nor the name of weights of torchvision's {name}, which are: "
            f"{', '.join(names) or 'none'}."
        )
    if published is not None:
        options.pop("init_weights", None)
        model = torchvision_models.get_model(name, weights=published, **options)
    else:
        model = torchvision_models.get_model(name, num_classes=num_classes, **options)
    head = possible_heads(model)[-1]
    with_head = published is not None and model.get_submodule(head).weight.shape[0] == num_classes
    if weights is not None and published is None:
        unused = _AUXILIARY.get(name, ())
        with_head = load_weights(model, open_state_dict(weights), head, source=str(weights), unused=unused)
    if isinstance(model, SqueezeNet):
        return _split_squeezenet(model), with_head
    return _split_mnasnet(model) if isinstance(model, MNASNet) else split_in_place(model, head), with_head


def _split_squeezenet(model: SqueezeNet) -> TaskNetwork:
    """Rebuilt, because the model has a ReLU after the head."""
    dropout, convolution, *_ = model.classifier
    body = OrderedDict(features=model.features, classifier=nn.Sequential(dropout))
    return TaskNetwork(nn.Sequential(body), as_conv_head(convolution))


def _split_mnasnet(model: MNASNet) -> TaskNetwork:
    """Rebuilt, because torchvision's class loads only state dicts that have its version in their metadata."""
    dropout, head = model.classifier
    body: OrderedDict[str, nn.Module] = OrderedDict(
        layers=model.layers, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classifier=nn.Sequential(dropout)
    )
    return TaskNetwork(nn.Sequential(body), head)


def _timm() -> Any:
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ModuleNotFoundError(
            "Networks named timm:… need the timm package: pip install timm", name="timm"
        ) from error


def _timm_names() -> list[str]:
    return [f"{_TIMM}{name}" for name in _timm().list_models()]


def _from_timm(
    name: str, num_classes: int, weights: str | os.PathLike[str] | None, options: dict[str, Any]
) -> tuple[TaskNetwork, bool]:
    published = weights is not None and str(weights) == "DEFAULT"
    if weights is not None and not published and not os.path.isfile(weights):
        raise ValueError(f"weights={str(weights)!r} is not a file; the name of timm's own weights is 'DEFAULT'.")
    model = _timm().create_model(name, pretrained=published, num_classes=num_classes, **options)
    layer = model.get_classifier()
    found = [name for name, other in model.named_modules() if name and other is layer]
    why = why_no_head(layer) or ("a layer outside the model" if not found else None)
    if why is not None:
        raise ValueError(f"The head of timm's {name} is not a linear layer or 1×1 convolution but {why}: {layer!r}.")
    with_head = published and model.pretrained_cfg.get("num_classes") == num_classes
    if weights is not None and not published:
        state = open_state_dict(weights)
        if is_efficientnet_lite(state) and hasattr(model, "blocks"):
            state = efficientnet_lite_to_timm(state, [len(stage) for stage in model.blocks])
        with_head = load_weights(model, state, found[0], source=str(weights))
    return split_checked(model, found[0], _example(model, options)), with_head


def _example(model: Any, options: dict[str, Any]) -> torch.Tensor:
    """An image of the network's default size."""
    channels, height, width = model.pretrained_cfg["input_size"]
    size = options.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, options.get("in_chans", channels), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
