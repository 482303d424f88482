"""How fast a merge is: bytes moved per second over those of a plain copy of the same tensors, and its peak memory.

python experiments/bench_merge.py        # or: make bench
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from bench_networks import TITLES, check_networks, machine, make_network, write_table
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torch import Tensor

from pl_personalize import Importance, merge
from pl_personalize.runner.command_line import errors_in_one_line
from pl_personalize.runner.run_folder import check_writable

MIB = 2**20
StateDict = dict[str, Tensor]


def main(
    networks: Sequence[str] = ("vgg11",),
    num_experts: PositiveInt = 4,
    rounds: PositiveInt = 5,
    device: str = "cpu",
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/bench-merge"),
) -> None:
    """Merge experts of random parameters and importances, and copy the same tensors, taking turns.

    A merge reads each expert and its importances and writes one model; a copy reads and writes each of them. The last
    row is of importances of which a tenth is zero in all experts, as with units that are never active.

    Args:
        networks: Of ``mlp``, ``alexnet``, ``vgg11``, ``vgg11_bn``, ``resnet18``, ``vit_b_16``.
        num_experts: How many.
        rounds: Of each; the median counts.
        device: Such as ``cpu`` or ``cuda``.
        num_threads: Threads for PyTorch.
        output_dir: Folder of the table, as CSV and Markdown.
    """
    check_networks(networks)
    check_writable(output_dir, "output_dir")
    torch.set_num_threads(num_threads)
    lines = [["network", "memory", "copy (GB/s)", "merge (GB/s)", "merge / copy", "merge (s)"]]
    notes = []
    for network in networks:
        found, note = measure(network, num_experts, rounds, device)
        lines += found
        notes.append(note)
    table = write_table(output_dir, "merge", lines)
    print(f"{table}\n\n{machine(device, num_threads)}; medians of {rounds}.", *notes, sep="\n")


def measure(network: str, num_experts: int, rounds: int, device: str) -> tuple[list[list[str]], str]:
    """The lines of the table for a network, and what is said of it besides."""
    torch.manual_seed(0)
    shapes = {name: p.shape for name, p in make_network(network).named_parameters()}
    experts = [{n: torch.randn(s, device=device) for n, s in shapes.items()} for _ in range(num_experts)]
    importances = [
        Importance(
            {n: torch.rand(s, device=device) ** 2 + 1e-6 for n, s in shapes.items()}, kind="fisher", num_samples=1
        )
        for _ in range(num_experts)
    ]
    out = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    size = sum(value.numel() * value.element_size() for value in out.values())
    read = 2 * num_experts * size

    extra = extra_memory(lambda: merge(experts, importances, out=out), device)
    largest = max(value.numel() * value.element_size() for value in out.values())

    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "merge", "clone", "new", "zeros")}
    for _ in range(rounds):
        seconds["copy"].append(timed(lambda: copy_all([*experts, *importances], out), device))
        seconds["merge"].append(timed(lambda: merge(experts, importances, out=out), device))
        seconds["clone"].append(timed(lambda: clone_all([*experts, *importances]), device))
        seconds["new"].append(timed(lambda: merge(experts, importances), device))
    for name, shape in shapes.items():
        inactive = torch.rand(shape, device=device) < 0.1
        for importance in importances:
            importance[name].masked_fill_(inactive, 0.0)
    importances = [importance.to(device, copy=True) for importance in importances]
    for _ in range(rounds + 1):
        seconds["zeros"].append(timed(lambda: merge(experts, importances, out=out), device))
    lines = []
    for memory, copy, merging in (
        ("there before", "copy", "merge"),
        ("new", "clone", "new"),
        ("there before; zeros", "copy", "zeros"),
    ):
        rates = [2 * read / median(seconds[copy]) / 1e9, (read + size) / median(seconds[merging]) / 1e9]
        figures = [*(f"{r:.1f}" for r in rates), f"{rates[1] / rates[0]:.2f}", f"{median(seconds[merging]):.3f}"]
        lines.append([TITLES[network], memory, *figures])
    note = (
        f"{num_experts} {TITLES[network]} experts of {size / MIB:.0f} MiB with importances: beside input and output, a "
        f"merge took {extra / MIB:.0f} MiB at its peak; the largest parameter has {largest / MIB:.0f}."
    )
    return lines, note


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    wait(device)
    begun = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begun


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def copy_all(sources: list[StateDict | Importance], target: StateDict) -> None:
    """Each tensor into memory that is there."""
    for source in sources:
        for name, value in source.items():
            target[name].copy_(value)


def clone_all(sources: list[StateDict | Importance]) -> None:
    """Each tensor into new memory, one state dict after the other."""
    for source in sources:
        {name: value.clone() for name, value in source.items()}


def extra_memory(run: Callable[[], object], device: str) -> float:
    """Bytes that a call takes at its peak beside what is there before; NaN where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        run()
        return math.nan
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    with errors_in_one_line():
        auto_cli(main, as_positional=False)
