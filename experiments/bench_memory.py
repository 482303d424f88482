"""How much memory exact importances take beside a plain backward pass: the peak of a fresh process for each case.

python experiments/bench_memory.py        # or: make bench
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import nn

from pl_personalize import estimate_importance
from pl_personalize.runner.results import markdown_table

NETWORKS = {"AlexNet": "alexnet", "VGG-11-BN": "vgg11_bn", "ResNet-18": "resnet18", "ViT-B/16": "vit_b_16"}
MIB = 2**20


def main(
    network: str = "VGG-11-BN",
    batch_sizes: Sequence[PositiveInt] = (4, 32),
    max_scratch_mb: PositiveFloat = 256,
    device: str = "cpu",
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/bench-memory"),
) -> None:
    """Compare peaks: of a forward and backward pass, of MAS and of Fisher on the same batch of images of 224 pixels.

    Args:
        network: ``AlexNet``, ``VGG-11-BN``, ``ResNet-18`` or ``ViT-B/16``.
        batch_sizes: Images in a batch.
        max_scratch_mb: What the estimates may take for per-sample gradients.
        device: ``cpu``: the process's peak resident size; ``cuda``: the peak of PyTorch's allocator.
        num_threads: Threads for PyTorch.
        output_dir: Folder of the table, as CSV and Markdown.
    """
    parameters = sum(p.numel() * p.element_size() for p in _network(network).parameters()) / MIB
    header = ["network", "batch", "plain (MiB)", "MAS", "Fisher", "allowed", "per-sample gradients"]
    lines: list[list[str]] = []
    for size in batch_sizes:
        peaks = {
            case: _peak_of_a_process(network, case, size, max_scratch_mb, device, num_threads)
            for case in ("plain", "mas", "fisher")
        }
        over = [f"{peaks[case] - peaks['plain']:+.0f}" for case in ("mas", "fisher")]
        allowed = f"+{1.1 * max_scratch_mb:.0f}"
        lines.append([network, str(size), f"{peaks['plain']:.0f}", *over, allowed, f"{size * parameters:.0f}"])
        print("  ".join(lines[-1]), flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {num_threads} thread(s)"
    table = markdown_table([header, *lines])
    print(
        f"\n{table}\n\nPeaks in MiB on {name}; MAS and Fisher: over the plain pass. The last column is what "
        "per-sample gradients would take that are all held at once."
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "memory.md").write_text(table + "\n")
    with (output_dir / "memory.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])


def _network(name: str) -> nn.Module:
    if name not in NETWORKS:
        raise SystemExit(f"network must be one of {', '.join(NETWORKS)}; got {name!r}.")
    torch.manual_seed(0)
    return torchvision.models.get_model(NETWORKS[name])


def _peak_of_a_process(network: str, case: str, size: int, scratch: float, device: str, threads: int) -> float:
    """In MiB. A fresh process: a peak never falls, and freed memory may be kept."""
    arguments = json.dumps([network, case, size, scratch, device, threads])
    done = subprocess.run(
        [sys.executable, __file__, "--in-a-process", arguments], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def _measure(network: str, case: str, size: int, scratch: float, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    model, x = _network(network).eval().to(device), torch.randn(size, 3, 224, 224, device=device)
    if case == "plain":
        model(x).square().sum().backward()
    else:
        estimate_importance(model, [x], case, max_scratch_mb=scratch)  # type: ignore[arg-type]
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-a-process"]:
        print(_measure(*json.loads(sys.argv[2])))
    else:
        auto_cli(main, as_positional=False)
