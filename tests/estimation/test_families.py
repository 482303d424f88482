"""Importances of every family of torchvision's classification models are exact."""

from __future__ import annotations

import pytest
import torch
from reference import naive_importance, relative_error
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import make_layers

from pl_personalize import estimate_importance

# One of each family, the size of its images, and what has no closed form, by a part of the names.
FAMILIES = {
    "alexnet": (96, {}),
    "convnext_tiny": (64, {"layer": (".0.weight", ".0.bias", ".1.weight", ".1.bias")}),
    "densenet121": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "googlenet": (64, {}),
    "inception_v3": (96, {}),
    "maxvit_t": (64, {"layer": ("relative_position_bias_table",)}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "resnext50_32x4d": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {"model": (".attn.",), "layer": (".attn.",)}),
    "vgg11_bn": (32, {}),
    "vit_b_32": (64, {}),
}


def _small_maxvit() -> nn.Module:
    sizes = {"input_size": (64, 64), "partition_size": 2, "head_dim": 4, "stem_channels": 8}
    return models.MaxVit(block_channels=[8, 16], block_layers=[1, 1], stochastic_depth_prob=0.1, num_classes=4, **sizes)


def _small_efficientnet() -> nn.Module:
    fused, plain = FusedMBConvConfig(2, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 1)
    return models.EfficientNet([fused, plain], dropout=0.1, num_classes=4, last_channel=32)


def _with_small_head(model: nn.Module, width: int) -> nn.Module:
    """A VGG or AlexNet without the first two layers of its head, which would take most of the time."""
    places = [k for k, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    for place, sizes in zip(places, ((width, 8), (8, 8), (8, 4)), strict=True):
        model.classifier[place] = nn.Linear(*sizes)
    return model


def _small_vgg() -> nn.Module:
    features = make_layers([8, "M", 16, "M"], batch_norm=True)
    with torch.device("meta"):
        model = models.VGG(features, init_weights=False)
    return _with_small_head(model, 16 * 7 * 7)


# Families whose smallest member is large: the same blocks, fewer and narrower.
SMALLER = {
    "alexnet": lambda: _with_small_head(models.alexnet(), 256 * 6 * 6),
    "convnext_tiny": lambda: models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=4),
    "densenet121": lambda: models.DenseNet(8, (2, 2), 16, num_classes=4),
    "efficientnet_v2_s": _small_efficientnet,
    "maxvit_t": _small_maxvit,
    "mobilenet_v2": lambda: models.mobilenet_v2(width_mult=0.25, num_classes=4),
    "resnet18": lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4, width_per_group=64),
    "resnext50_32x4d": lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, groups=32, width_per_group=4),
    "swin_t": lambda: models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=4),
    "vgg11_bn": _small_vgg,
    "vit_b_32": lambda: models.VisionTransformer(64, 32, 2, 2, 16, 32, num_classes=4),
}


def _family(name: str, size: int) -> nn.Module:
    """Random weights, and batch norm away from its initial values."""
    plain = {"aux_logits": False, "init_weights": False}
    options = {"googlenet": plain, "inception_v3": plain}
    torch.manual_seed(0)
    model = SMALLER[name]() if name in SMALLER else models.get_model(name, num_classes=4, **options.get(name, {}))
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    if name == "vit_b_32":
        nn.init.normal_(model.heads.head.weight)  # zero at first, and with it every other gradient
    return model.double()  # in single precision, some of these random networks lose most digits on their own


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision(name: str) -> None:
    size, slower = FAMILIES[name]
    model, x = _family(name, size), torch.randn(2, 3, size, size, dtype=torch.float64)

    found = estimate_importance(model, [x], "mas")

    assert relative_error(found, naive_importance(model, x, "mas")) < 1e-8
    for parameter, path in found.routes.items():
        expected = {path for path, parts in slower.items() if any(part in parameter for part in parts)}
        assert {path} <= (expected | {"closed form"}), parameter
        assert expected or path == "closed form", parameter


def test_no_family_of_torchvision_is_missing() -> None:
    families = {models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    assert {models.get_model_builder(name).__module__ for name in FAMILIES} >= {
        family for family in families if "quantization" not in family
    }
