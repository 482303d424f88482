"""Memory of exact importances beside that of a plain backward pass, as peaks of fresh processes.

python experiments/bench_memory.py        # or: make bench
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_tools import TITLES, Table, image_shape, machine, make_network, prepare
from jsonargparse.typing import PositiveFloat, PositiveInt

from pl_personalize import estimate_importance
from pl_personalize.runner.command_line import run_script

MIB = 2**20


def main(
    networks: Sequence[str] = ("vgg11_bn",),
    batch_sizes: Sequence[PositiveInt] = (4, 32),
    max_scratch_mb: PositiveFloat = 256,
    device: str = "cpu",
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/bench-memory"),
) -> None:
    """Compare the peaks of a forward and backward pass, of MAS and of Fisher on the same batch.

    Args:
        networks: ``mlp`` (28×28 images), ``alexnet``, ``vgg11``, ``vgg11_bn``, ``resnet18``, ``vit_b_16`` (224×224).
        batch_sizes: Batch sizes.
        max_scratch_mb: Memory limit of per-sample gradients, in MiB.
        device: Device, such as ``cpu`` (peak resident size of the process) or ``cuda`` (peak of PyTorch's allocator).
        num_threads: Threads for PyTorch.
        output_dir: Folder for the table, as CSV and Markdown.
    """
    prepare(networks, output_dir, num_threads)
    table = Table("network", "batch", "plain (MiB)", "MAS", "Fisher", "allowed", "per-sample gradients")
    for network in networks:
        parameters = sum(p.numel() * p.element_size() for p in make_network(network).parameters()) / MIB
        for size in batch_sizes:
            peaks = {
                case: _peak_of_a_process(network, case, size, max_scratch_mb, device, num_threads)
                for case in ("plain", "mas", "fisher")
            }
            over = [f"{peaks[case] - peaks['plain']:+.0f}" for case in ("mas", "fisher")]
            allowed = f"+{1.1 * max_scratch_mb:.0f}"
            table.add(TITLES[network], str(size), f"{peaks['plain']:.0f}", *over, allowed, f"{size * parameters:.0f}")
    where = machine(device, num_threads)
    table.write(
        output_dir,
        "memory",
        f"Peaks in MiB on {where}; MAS and Fisher: relative to the plain pass. The last column is the size of all "
        "per-sample gradients together.",
    )


def _peak_of_a_process(*arguments: object) -> float:
    """Peak in MiB of a fresh process, because peaks never fall and freed memory may be kept."""
    command = [sys.executable, __file__, "--in-a-process", json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def _measure(network: str, case: str, size: int, scratch: float, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    model, x = make_network(network).eval().to(device), torch.randn(size, *image_shape(network), device=device)
    if case == "plain":
        model(x).square().sum().backward()
    else:
        estimate_importance(model, [x], case, max_scratch_mb=scratch)  # type: ignore[arg-type]
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-a-process"]:
        print(_measure(*json.loads(sys.argv[2])))
    else:
        run_script(main)
