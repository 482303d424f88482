"""Networks with a body and a head by name, from torchvision and timm."""

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
# Their second classifiers, which in training come out beside the logits, are left out.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def backbone(
    name: str, num_classes: int, *, weights: str | os.PathLike[str] | None = None, **options: Any
) -> TaskNetwork:
    """A network of torchvision or timm, with its last linear layer as the head.

    Parameters of the body have the names that they have in the original network (``body.features.0.weight``). The head
    has PyTorch's default initialisation, whatever the original network does. Differences from torchvision: SqueezeNet's
    head is its last convolution **without** the ReLU after it (which hinders learning from a few classes), see
    :class:`~pl_personalize.models.ConvHead`; GoogLeNet and Inception v3 have no auxiliary classifiers.

    Args:
        name: Of a classification model of torchvision (``squeezenet1_0``, ``vgg11_bn``, ``resnet18``,
            ``vit_b_16``, …), or ``timm:`` and a name of timm, if timm is installed; :func:`backbone_names` lists them.
        num_classes: Outputs of the head.
        weights: ``None`` for random ones; a name of torchvision's published weights (``DEFAULT``,
            ``IMAGENET1K_V1``, …; for timm ``DEFAULT``), which are downloaded if they are not in the cache; or the path
            of a file with a state dict of the whole network: ``.safetensors``, or written by ``torch.save``. The file
            of the package efficientnet-lite-pytorch fits ``timm:tf_efficientnet_lite0``. The head is loaded only where
            it is of ``num_classes`` classes.
        options: For torchvision's or timm's function that makes the network: ``dropout``, ``image_size`` of a vision
            transformer, ``transform_input=True`` for a file of GoogLeNet's or Inception's published weights.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: If there is no such network or no such weights, or the network cannot be taken apart.
        ArtifactError: If a file of weights cannot be read or does not fit; the message has what is missing and what is
            unexpected.
        ModuleNotFoundError: If timm is needed and not installed.

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
    if name.startswith(_TIMM):
        return _from_timm(name.removeprefix(_TIMM), num_classes, weights, options)
    return _from_torchvision(name, num_classes, weights, options)


def backbone_names() -> list[str]:
    """The names that :func:`backbone` takes; those of timm if it is installed.

    Example:
        >>> backbone_names()[:3]
        ['alexnet', 'convnext_base', 'convnext_large']
    """
    return [*_torchvision_names(), *(_timm_names() if find_spec("timm") is not None else [])]


def check_backbone(name: str, others: Sequence[str] = ()) -> None:
    """Check the name of a network before it is needed.

    Args:
        name: For :func:`backbone`.
        others: Further names that are allowed.

    Raises:
        ValueError: If there is no such network; the message has similar names.
        ModuleNotFoundError: If it is one of timm's, which is not installed.
    """
    if name in others or name in _torchvision_names():
        return
    if name.startswith(_TIMM) and _timm().is_model(name.removeprefix(_TIMM)):
        return
    names = _timm_names() if name.startswith(_TIMM) else [*others, *backbone_names()]
    # A name of timm may lack its prefix; torchvision has the better claim to a name that both have.
    known = {one.removeprefix(_TIMM): one for one in reversed(names)}
    close = [known[one] for one in get_close_matches(name.removeprefix(_TIMM).lower(), known)]
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    there = [*others, "torchvision's classification models (resnet18, …) and, if timm is installed, timm's (timm:…)"]
    raise ValueError(
        f"There is no network {name!r}{meant} There are {', '.join(there)}; pl_personalize.models.backbone_names() "
        "lists them."
    )


def _torchvision_names() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)  # type: ignore[no-any-return]


def _from_torchvision(
    name: str, num_classes: int, weights: str | os.PathLike[str] | None, options: dict[str, Any]
) -> TaskNetwork:
    if name in _AUXILIARY:
        if options.get("aux_logits"):
            raise ValueError(f"{name} has two outputs with aux_logits=True; a network with one head has one.")
        # Without this torchvision warns; drawing parameters that are to be replaced takes seconds.
        options = {"init_weights": weights is None} | options | {"aux_logits": False}
    published = None
    if weights is not None and str(weights) in (names := _published(name)):
        published = names[str(weights)]
    elif weights is not None and not os.path.isfile(weights):
        raise ValueError(
            f"weights={str(weights)!r} is no file, and torchvision's {name} has no weights of that name; it has "
            f"{', '.join(_published(name)) or 'none'}."
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
        network = _split_squeezenet(model)
    elif isinstance(model, MNASNet):
        network = _split_mnasnet(model)
    else:
        network = split_in_place(model, head)
    if not with_head:
        network.new_head(num_classes)
    return network


def _published(name: str) -> dict[str, Any]:
    """The weights that torchvision has for a network, by name."""
    return dict(torchvision_models.get_model_weights(name).__members__)


def _split_squeezenet(model: SqueezeNet) -> TaskNetwork:
    """Without the ReLU after the head, which is why the model cannot be taken as it is."""
    dropout, convolution, *_ = model.classifier
    body = OrderedDict(features=model.features, classifier=nn.Sequential(dropout))
    return TaskNetwork(nn.Sequential(body), as_conv_head(convolution))


def _split_mnasnet(model: MNASNet) -> TaskNetwork:
    """Torchvision's class loads no state dict that has not been one of torch.save: it wants to know its version."""
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
            "Networks named timm:… need the package timm, which is not installed: pip install timm", name="timm"
        ) from error


def _timm_names() -> list[str]:
    return [f"{_TIMM}{name}" for name in _timm().list_models()]


def _from_timm(
    name: str, num_classes: int, weights: str | os.PathLike[str] | None, options: dict[str, Any]
) -> TaskNetwork:
    published = weights is not None and str(weights) == "DEFAULT"
    if weights is not None and not published and not os.path.isfile(weights):
        raise ValueError(f"weights={str(weights)!r} is no file; the name of timm's own weights is 'DEFAULT'.")
    model = _timm().create_model(name, pretrained=published, num_classes=num_classes, **options)
    layer = model.get_classifier()
    found = [name for name, other in model.named_modules() if name and other is layer]
    why = why_no_head(layer) or ("a layer that is no part of it" if not found else None)
    if why is not None:
        raise ValueError(f"timm's {name} has no linear layer or 1×1 convolution as its one head, but {why}: {layer!r}.")
    with_head = published and model.pretrained_cfg.get("num_classes") == num_classes
    if weights is not None and not published:
        state = open_state_dict(weights)
        if is_efficientnet_lite(state) and hasattr(model, "blocks"):
            state = efficientnet_lite_to_timm(state, [len(stage) for stage in model.blocks])
        with_head = load_weights(model, state, found[0], source=str(weights))
    network = split_checked(model, found[0], _example(model, options))
    if not with_head:
        network.new_head(num_classes)
    return network


def _example(model: Any, options: dict[str, Any]) -> torch.Tensor:
    """An image of the size that the network is made for."""
    channels, height, width = model.pretrained_cfg["input_size"]
    size = options.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, options.get("in_chans", channels), height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
