"""Throughput of a merge relative to a plain copy of the same tensors, and its peak memory.

python experiments/bench_merge.py        # or: make bench
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from bench_tools import TITLES, Table, machine, make_network, prepare, take_turns
from jsonargparse.typing import PositiveInt

from pl_personalize import Importance, merge
from pl_personalize.runner.command_line import run_script

MIB = 2**20


def main(
    networks: Sequence[str] = ("vgg11",),
    num_experts: PositiveInt = 4,
    rounds: PositiveInt = 5,
    device: str = "cpu",
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/bench-merge"),
) -> None:
    """Merge experts of random parameters and importances, and copy the same tensors, taking turns.

    A merge reads each expert and its importances and writes one model; a copy reads and writes each of them. In the
    last row, a tenth of the importances are zero in all experts, as for units that are never active.

    Args:
        networks: ``mlp``, ``alexnet``, ``vgg11``, ``vgg11_bn``, ``resnet18``, ``vit_b_16``.
        num_experts: Number of experts.
        rounds: Rounds of each; the median counts.
        device: Device, such as ``cpu`` or ``cuda``.
        num_threads: Threads for PyTorch.
        output_dir: Folder for the table, as CSV and Markdown.
    """
    prepare(networks, output_dir, num_threads)
    table = Table("network", "memory", "copy (GB/s)", "merge (GB/s)", "merge / copy", "merge (s)")
    notes = [measure(table, network, num_experts, rounds, device) for network in networks]
    table.write(output_dir, "merge", "\n".join([f"{machine(device, num_threads)}; medians of {rounds}.", *notes]))


def measure(table: Table, network: str, num_experts: int, rounds: int, device: str) -> str:
    """Add the lines of a network to the table; return a note about its memory."""
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
    sizes = [value.numel() * value.element_size() for value in out.values()]
    size, read = sum(sizes), 2 * num_experts * sum(sizes)

    def copy() -> None:
        for source in (*experts, *importances):
            for name, value in source.items():
                out[name].copy_(value)

    def clone() -> None:
        for source in (*experts, *importances):
            {name: value.clone() for name, value in source.items()}

    extra = extra_memory(lambda: merge(experts, importances, out=out), device)
    runs: dict[str, Callable[[], object]] = {
        "copy": copy,
        "merge": lambda: merge(experts, importances, out=out),
        "clone": clone,
        "new": lambda: merge(experts, importances),
    }
    seconds = take_turns(runs, rounds, device)
    for name, shape in shapes.items():
        inactive = torch.rand(shape, device=device) < 0.1
        for importance in importances:
            importance[name].masked_fill_(inactive, 0.0)
    importances = [importance.to(device, copy=True) for importance in importances]
    seconds |= take_turns({"zeros": lambda: merge(experts, importances, out=out)}, rounds + 1, device)
    for memory, copying, merging in (
        ("allocated before", "copy", "merge"),
        ("new", "clone", "new"),
        ("allocated before; zeros", "copy", "zeros"),
    ):
        rates = [2 * read / seconds[copying] / 1e9, (read + size) / seconds[merging] / 1e9]
        ratio = f"{rates[1] / rates[0]:.2f}"
        table.add(TITLES[network], memory, *(f"{r:.1f}" for r in rates), ratio, f"{seconds[merging]:.3f}")
    return (
        f"{num_experts} {TITLES[network]} experts of {size / MIB:.0f} MiB with importances: at its peak, a merge took "
        f"{extra / MIB:.0f} MiB besides input and output; the largest parameter has {max(sizes) / MIB:.0f} MiB."
    )


def extra_memory(run: Callable[[], object], device: str) -> float:
    """Bytes that a call allocates at its peak; NaN if the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return math.nan
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Resident bytes of this process: now (``VmRSS``) or at its peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    run_script(main)
