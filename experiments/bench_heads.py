"""Cost of refitting and adapting a head, relative to plain forward passes over the same images.

python experiments/bench_heads.py        # or: make bench
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_tools import Table, machine, take_turns
from jsonargparse.typing import PositiveInt

from pl_personalize import adapt_head, refit_head
from pl_personalize.models import backbone
from pl_personalize.runner.command_line import run_script
from pl_personalize.stages.run_folder import check_writable


def main(
    networks: Sequence[str] = ("squeezenet1_0", "resnet18"),
    image_size: PositiveInt = 128,
    classes: PositiveInt = 10,
    server_images: PositiveInt = 640,
    user_images: PositiveInt = 80,
    rounds: PositiveInt = 3,
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/bench-heads"),
) -> None:
    """Time ``refit_head`` and ``adapt_head`` on random images and weights, taking turns with forward passes.

    Args:
        networks: Names of torchvision models.
        image_size: Side length of the images in pixels.
        classes: Number of classes.
        server_images: Number of the server's images, a fifth of them for validation.
        user_images: Number of the user's images.
        rounds: Rounds of each; the median counts.
        num_threads: Threads for PyTorch.
        output_dir: Folder for the table, as CSV and Markdown.
    """
    check_writable(output_dir, "output_dir")
    torch.set_num_threads(num_threads)
    table = Table("network", "features", "refit / forward", "adapt / forward", "reference (kB)")
    for name in networks:
        measure(table, name, image_size, classes, server_images, user_images, rounds)
    counts = f"{server_images} and {user_images} images of {image_size} pixels, {classes} classes"
    table.write(output_dir, "heads", f"{machine('cpu', num_threads)}; medians of {rounds}; {counts}.")


def measure(
    table: Table, name: str, image_size: int, classes: int, server_images: int, user_images: int, rounds: int
) -> None:
    """Add the line of a network to the table."""
    torch.manual_seed(0)
    model = backbone(name, classes).eval()
    labels = torch.arange(server_images) % classes
    images = torch.randn(server_images, 3, image_size, image_size) + 0.1 * labels[:, None, None, None]
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    val, train = batches[::5], [batch for k, batch in enumerate(batches) if k % 5]
    user = images[:user_images].split(32)
    reference = refit_head(model, train, val)

    def forward(inputs: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode():
            for batch in inputs:
                model(batch)

    runs = {
        "server": lambda: forward([x for x, _ in batches]),
        "refit": lambda: refit_head(copy.deepcopy(model), train, val),
        "user": lambda: forward(user),
        "adapt": lambda: adapt_head(model, user, reference).undo(model),
    }
    seconds = take_turns(runs, rounds, warm_up=1)
    ratios = (seconds["refit"] / seconds["server"], seconds["adapt"] / seconds["user"])
    size = f"{reference.num_bytes / 1000:.0f}"
    table.add(name, str(len(reference.mean)), *(f"{ratio:.2f}" for ratio in ratios), size)


if __name__ == "__main__":
    run_script(main)
