"""Networks, timing and tables shared by the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_personalize.models import mlp
from pl_personalize.runner.results import markdown_table, write_csv
from pl_personalize.stages.run_folder import check_writable

TITLES = {
    "mlp": "MLP 100-100",
    "alexnet": "AlexNet",
    "vgg11": "VGG-11",
    "vgg11_bn": "VGG-11-BN",
    "resnet18": "ResNet-18",
    "vit_b_16": "ViT-B/16",
}


def prepare(networks: Sequence[str], output_dir: Path, num_threads: int) -> None:
    """Check the options that all benchmarks have, and set the number of threads."""
    if unknown := [name for name in networks if name not in TITLES]:
        raise MisconfigurationException(f"networks must be of {', '.join(TITLES)}; got {unknown[0]!r}.")
    check_writable(output_dir, "output_dir")
    torch.set_num_threads(num_threads)


def make_network(name: str) -> nn.Module:
    """The network, always with the same parameters."""
    torch.manual_seed(0)
    return mlp(image_shape(name), 10) if name == "mlp" else torchvision.models.get_model(name)


def image_shape(name: str) -> tuple[int, int, int]:
    """Shape of the network's inputs: (channels, height, width)."""
    return (3, 28, 28) if name == "mlp" else (3, 224, 224)


def timed(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def take_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm_up: int = 0
) -> dict[str, float]:
    """Median seconds of calls that take turns, after some rounds that do not count."""
    seconds = [{name: timed(run, device) for name, run in runs.items()} for _ in range(warm_up + rounds)]
    return {name: median(turn[name] for turn in seconds[warm_up:]) for name in runs}


def machine(device: str, num_threads: int) -> str:
    """Description of the device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {num_threads} thread(s)"


class Table:
    """Table that grows line by line and is printed as it does."""

    def __init__(self, *columns: str) -> None:
        self.lines = [list(columns)]

    def add(self, *cells: str) -> None:
        """Add and print a line."""
        self.lines.append(list(cells))
        print("  ".join(cells), flush=True)

    def write(self, folder: Path, name: str, note: str) -> None:
        """Write the table as CSV and Markdown, and print it with a note."""
        table = markdown_table(self.lines)
        write_csv(folder / f"{name}.csv", pd.DataFrame(self.lines[1:], columns=self.lines[0]))
        (folder / f"{name}.md").write_text(table + "\n")
        print(f"\n{table}\n\n{note}")
