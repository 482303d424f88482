"""What exact importances cost: ratios to one batched forward and backward pass of the same batch, in one process.

python experiments/bench_importance.py        # or: make bench
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from bench_networks import TITLES, check_networks, image_shape, machine, make_network, write_table
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pl_personalize.functional.batches import call_model
from pl_personalize.functional.objectives import fisher_cotangents, mas_cotangent
from pl_personalize.per_sample.power_sums import PerSamplePowerSums
from pl_personalize.runner.command_line import errors_in_one_line
from pl_personalize.runner.run_folder import check_writable

BATCH_SIZES = {"mlp": 256, "alexnet": 16, "vgg11": 8, "vgg11_bn": 8, "resnet18": 16, "vit_b_16": 4}
TOO_LONG = {("vit_b_16", "vmap(grad)"), ("vit_b_16", "BackPACK")}


def main(
    networks: Sequence[str] = ("mlp", "alexnet", "vgg11_bn", "resnet18", "vit_b_16"),
    alternatives: Sequence[str] = ("BackPACK", "vmap(grad)", "batch size 1"),
    rounds: PositiveInt = 5,
    slow_rounds: PositiveInt = 1,
    device: str = "cpu",
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/bench-importance"),
) -> None:
    """Time exact importances and their alternatives, taking turns.

    Args:
        networks: Of ``mlp`` (on images of 28 pixels), ``alexnet``, ``vgg11``, ``vgg11_bn``, ``resnet18``, ``vit_b_16``
            (of 224).
        alternatives: What ours is compared with: ``BackPACK``, ``vmap(grad)``, ``batch size 1``; on a CPU neither
            of the first two for the transformer, which they take many minutes for.
        rounds: Of the reference and of ours, more where they take less than a second; the median counts.
        slow_rounds: Of the alternatives.
        device: Such as ``cpu`` or ``cuda``.
        num_threads: Threads for PyTorch.
        output_dir: Folder of the table, as CSV and Markdown.
    """
    check_networks(networks)
    check_writable(output_dir, "output_dir")
    torch.set_num_threads(num_threads)
    lines = [["network", "batch", "forward+backward (s)", "MAS", "Fisher", *alternatives]]
    for name in networks:
        model = make_network(name).eval().to(device)
        x = torch.randn(BATCH_SIZES[name], *image_shape(name)).to(device)
        seconds = time_ours(model, x, rounds)
        plain = median(seconds["plain"])
        line = [
            TITLES[name],
            str(len(x)),
            f"{plain:.4f}",
            *(f"{median(seconds[kind]) / plain:.2f}" for kind in ("mas", "fisher")),
        ]
        known = {"BackPACK": backpack, "vmap(grad)": vmap_of_grad, "batch size 1": one_by_one}
        for alternative in alternatives:
            too_long = device == "cpu" and (name, alternative) in TOO_LONG
            line.append("-" if too_long else ratio(known[alternative], model, x, slow_rounds, plain))
            gc.collect()
        lines.append(line)
        print("  ".join(line), flush=True)
    table, where = write_table(output_dir, "importance", lines), machine(device, num_threads)
    print(f"\n{table}\n\nRatios to the batched forward+backward of the same batch, medians, {where}.")


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def time_ours(model: nn.Module, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """A plain forward and backward pass, MAS and Fisher, in turns; the engine's check of itself is not counted."""
    parameters = dict(model.named_parameters())

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()

    found: dict[str, list[float]] = {"plain": [], "mas": [], "fisher": []}
    engines = {}
    for kind, power in (("mas", 1), ("fisher", 2)):
        engine = PerSamplePowerSums(model, parameters, power=power, forward=call_model, max_scratch_bytes=2**28)
        with engine:
            engine.add(x, len(x), lambda logits: [mas_cotangent(logits)])  # checks itself on the first batch
        engines[kind] = engine
    plain()
    for _ in range(max(rounds, int(1 / timed(plain)))):
        found["plain"].append(timed(plain))
        model.zero_grad(set_to_none=True)
        with engines["mas"] as engine:
            found["mas"].append(timed(lambda e=engine: e.add(x, len(x), lambda logits: [mas_cotangent(logits)])))
        with engines["fisher"] as engine:
            found["fisher"].append(
                timed(lambda e=engine: e.add(x, len(x), lambda logits: fisher_cotangents(logits, 1, None)))
            )
    return found


def ratio(
    run: Callable[[nn.Module, Tensor], Callable[[], object]], model: nn.Module, x: Tensor, rounds: int, plain: float
) -> str:
    """Median time of an alternative over the plain pass, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = run(model, x)
            return f"{median(timed(call) for _ in range(rounds)) / plain:.2f}"
    except (ImportError, NotImplementedError, RuntimeError, AttributeError, MemoryError) as error:
        return f"no ({type(error).__name__})"


def backpack(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """BackPACK's sum over samples of squared gradients."""
    if find_spec("backpack") is None:
        raise ImportError("backpack-for-pytorch is not installed")
    from backpack import backpack as extension
    from backpack import extend
    from backpack.extensions import SumGradSquared

    copied = deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    network, loss = extend(copied), extend(nn.CrossEntropyLoss(reduction="sum"))
    labels = model(x).argmax(1)

    def call() -> None:
        with extension(SumGradSquared()):
            loss(network(x), labels).backward()

    call()
    return call


def vmap_of_grad(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Per-sample gradients of ``torch.func``, two samples at a time where all do not fit."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def objective(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, (values, buffers), (sample.unsqueeze(0),)).square().sum()

    size = sum(p.numel() * 4 for p in parameters.values())
    chunk = None if size * len(x) < 2**31 else 2
    return lambda: add_up(vmap(grad(objective), in_dims=(None, 0), chunk_size=chunk)(parameters, x))


def add_up(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of absolute values over samples."""
    return {name: value.abs().sum(0) for name, value in gradients.items()}


def one_by_one(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward and backward pass for each sample."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]

    def call() -> None:
        for sample in x:
            output = model(sample[None])
            loss = -F.log_softmax(output, 1).max()
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total.add_(gradient.abs())

    return call


if __name__ == "__main__":
    with errors_in_one_line():
        auto_cli(main, as_positional=False)
