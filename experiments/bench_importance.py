"""Cost of exact importances, relative to one batched forward and backward pass of the same batch.

python experiments/bench_importance.py        # or: make bench
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from bench_tools import TITLES, Table, image_shape, machine, make_network, prepare, timed
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from pl_personalize.functional.batches import call_model
from pl_personalize.functional.objectives import fisher_cotangents, mas_cotangent
from pl_personalize.per_sample.power_sums import PerSamplePowerSums
from pl_personalize.runner.command_line import run_script

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
    """Time exact importances and alternatives, taking turns.

    Args:
        networks: ``mlp`` (28×28 images), ``alexnet``, ``vgg11``, ``vgg11_bn``, ``resnet18``, ``vit_b_16`` (224×224).
        alternatives: ``BackPACK``, ``vmap(grad)``, ``batch size 1``; on a CPU, the first two are skipped for the
            transformer because they take many minutes.
        rounds: Rounds of the reference and of our importances, more if they take less than a second; the median counts.
        slow_rounds: Rounds of the alternatives.
        device: Device, such as ``cpu`` or ``cuda``.
        num_threads: Threads for PyTorch.
        output_dir: Folder for the table, as CSV and Markdown.
    """
    prepare(networks, output_dir, num_threads)
    table = Table("network", "batch", "forward+backward (s)", "MAS", "Fisher", *alternatives)
    for name in networks:
        model = make_network(name).eval().to(device)
        x = torch.randn(BATCH_SIZES[name], *image_shape(name)).to(device)
        seconds = time_ours(model, x, rounds, device)
        plain = median(seconds["plain"])
        line = [TITLES[name], str(len(x)), f"{plain:.4f}"]
        line += [f"{median(seconds[kind]) / plain:.2f}" for kind in ("mas", "fisher")]
        known = {"BackPACK": backpack, "vmap(grad)": vmap_of_grad, "batch size 1": one_by_one}
        for alternative in alternatives:
            too_long = device == "cpu" and (name, alternative) in TOO_LONG
            line.append("-" if too_long else ratio(known[alternative], model, x, slow_rounds, plain))
            gc.collect()
        table.add(*line)
    note = "Ratios to the batched forward+backward of the same batch, medians"
    table.write(output_dir, "importance", f"{note}, {machine(device, num_threads)}.")


def time_ours(model: nn.Module, x: Tensor, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of a plain forward and backward pass, MAS and Fisher, in turns; without the engine's self-check."""
    parameters = dict(model.named_parameters())

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()

    def mas(engine: PerSamplePowerSums) -> None:
        engine.add(x, len(x), lambda logits: [mas_cotangent(logits)])

    def fisher(engine: PerSamplePowerSums) -> None:
        engine.add(x, len(x), lambda logits: fisher_cotangents(logits, 1, None))

    kinds = {}
    for kind, power, add in (("mas", 1, mas), ("fisher", 2, fisher)):
        engine = PerSamplePowerSums(model, parameters, power=power, forward=call_model, max_scratch_bytes=2**28)
        with engine:
            mas(engine)  # its self-check runs on the first batch
        kinds[kind] = engine, add
    plain()
    found: dict[str, list[float]] = {"plain": [], "mas": [], "fisher": []}
    for _ in range(max(rounds, int(1 / timed(plain, device)))):
        found["plain"].append(timed(plain, device))
        model.zero_grad(set_to_none=True)
        for kind, (engine, add) in kinds.items():
            with engine:
                found[kind].append(timed(partial(add, engine), device))
    return found


def ratio(
    run: Callable[[nn.Module, Tensor], Callable[[], object]], model: nn.Module, x: Tensor, rounds: int, plain: float
) -> str:
    """Median time of an alternative relative to the plain pass, or the name of its error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = run(model, x)
            return f"{median(timed(call, x.device.type) for _ in range(rounds)) / plain:.2f}"
    except (ImportError, NotImplementedError, RuntimeError, AttributeError, MemoryError) as error:
        return f"no ({type(error).__name__})"


def backpack(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Sum over samples of squared gradients, by BackPACK."""
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
    """Per-sample gradients by ``torch.func``, two samples at a time if all need more than 2 GB."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def objective(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, (values, buffers), (sample.unsqueeze(0),)).square().sum()

    size = sum(p.numel() * 4 for p in parameters.values())
    chunk = None if size * len(x) < 2**31 else 2
    per_sample = vmap(grad(objective), in_dims=(None, 0), chunk_size=chunk)
    return lambda: {name: value.abs().sum(0) for name, value in per_sample(parameters, x).items()}


def one_by_one(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward and backward pass per sample."""
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
    run_script(main)
