"""Importances of every family of torchvision's classification models are exact."""

from __future__ import annotations

import pytest
import torch
import torchvision
from reference import naive_importance, relative_error
from torch import nn

from pl_personalize import estimate_importance

# The smallest of each family, the size of its images, and what has no closed form, by a part of the names.
FAMILIES = {
    "alexnet": (96, {}),
    "convnext_tiny": (
        64,
        {"layer": (".0.weight", ".0.bias", ".1.weight", ".1.bias")},
    ),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "googlenet": (64, {}),
    "inception_v3": (96, {}),
    "maxvit_t": (224, {"layer": ("relative_position_bias_table",)}),
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


def _family(name: str, size: int) -> nn.Module:
    """Random weights, and batch norm away from its initial values."""
    plain = {"aux_logits": False, "init_weights": False}
    options = {"googlenet": plain, "inception_v3": plain, "vit_b_32": {"image_size": size}}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=4, **options.get(name, {})).eval()
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
    families = {
        torchvision.models.get_model_builder(name).__module__
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    assert {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES} >= {
        family for family in families if "quantization" not in family
    }
