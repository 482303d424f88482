"""The networks that the benchmarks measure, and what their tables have in common."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import nn

from pl_personalize.models import mlp
from pl_personalize.runner.results import markdown_table

TITLES = {
    "mlp": "MLP 100-100",
    "alexnet": "AlexNet",
    "vgg11": "VGG-11",
    "vgg11_bn": "VGG-11-BN",
    "resnet18": "ResNet-18",
    "vit_b_16": "ViT-B/16",
}


def check_networks(networks: Sequence[str]) -> None:
    """End the program if there is a name that is not known."""
    if unknown := [name for name in networks if name not in TITLES]:
        raise SystemExit(f"networks must be of {', '.join(TITLES)}; got {unknown[0]!r}.")


def make_network(name: str) -> nn.Module:
    """The network, with the parameters that a seed gives."""
    torch.manual_seed(0)
    return mlp(image_shape(name), 10) if name == "mlp" else torchvision.models.get_model(name)


def image_shape(name: str) -> tuple[int, int, int]:
    """What goes in: (channels, height, width)."""
    return (3, 28, 28) if name == "mlp" else (3, 224, 224)


def machine(device: str, num_threads: int) -> str:
    """What was measured on."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {num_threads} thread(s)"


def write_table(folder: Path, name: str, lines: Sequence[Sequence[str]]) -> str:
    """Write a table, the first line of which is its header, as CSV and Markdown; the latter is returned."""
    table = markdown_table(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    return table
