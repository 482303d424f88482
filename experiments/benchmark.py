"""Command line of the benchmarks, which the scripts ``run_….py`` share; also for a datamodule of your own.

python experiments/benchmark.py my_package.MyDataModule --network.name resnet18 --seeds '[1]'
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.runner import Experiment, NetworkOptions, paper_by_label, run_experiment
from pl_personalize.runner.command_line import errors_in_one_line

PAPER_NETWORKS = {"MLP 100-100": "MLP", "alexnet": "AlexNet", "vgg11": "VGG11", "vgg11_bn": "VGG11-BN"}
SET_BY_THE_RUNNER = {"task", "user", "seed"}
SET_BELOW = {"benchmark", "data", "network", "backbone", "options", "paper", "paper_note"}


def run(
    benchmark: str,
    datamodule: type[TaskIncrementalDataModule],
    description: str,
    defaults: Mapping[str, Any],
    paper_note: Callable[[Any], str] = lambda data: "",
) -> None:
    """Run an experiment on a benchmark with the options of the command line.

    ``defaults`` are those that differ from the library's; ``paper_note`` makes a note for the comparison with the paper
    from an instance of the datamodule.
    """
    parser = ArgumentParser(description=description.partition("\n\n    python")[0])  # which would lose its line breaks
    parser.add_argument("--config", action="config", help="Path to a configuration file.")
    names = parser.add_class_arguments(datamodule, skip=SET_BY_THE_RUNNER)
    parser.add_class_arguments(NetworkOptions, "network", instantiate=True)
    parser.add_class_arguments(Experiment, skip=SET_BELOW)
    parser.add_argument(
        "--num_threads", type=PositiveInt | None, help="Number of PyTorch threads; null for PyTorch's default."
    )
    parser.set_defaults(dict(defaults))
    with errors_in_one_line():
        chosen = dict(parser.instantiate(parser.parse_args()))
        if (threads := chosen.pop("num_threads")) is not None:
            torch.set_num_threads(threads)
        chosen.pop("config")
        data = datamodule(**{name: chosen.pop(name) for name in names})
        network = chosen.pop("network")
        published = PAPER_NETWORKS.get(network.title)
        run_experiment(
            Experiment(
                benchmark,
                data,
                network,
                published if network.name != "mlp" else None,
                paper=None if published is None else paper_by_label(benchmark, published),
                paper_note=paper_note(data),
                **chosen,
            )
        )


if __name__ == "__main__":
    if len(sys.argv) < 2 or "." not in sys.argv[1]:
        sys.exit(f"usage: {sys.argv[0]} my_package.MyDataModule [options]")
    module, _, name = sys.argv.pop(1).rpartition(".")
    run(name.removesuffix("DataModule"), getattr(import_module(module), name), f"Experiment on {name}.", {})
