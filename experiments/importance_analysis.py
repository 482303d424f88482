r"""Do importances describe the model more than the data? The claim of the paper's slides, measured.

It says that importances of one model on different data correlate highly, those of different models on the same data
little. Here are the correlations, for the experts of a finished run, of a file, or trained for it.

    python experiments/importance_analysis.py                                   # trains on handwritten digits first
    python experiments/importance_analysis.py --run_dir runs/numbers            # a finished run of numbers.py
    python experiments/importance_analysis.py --experts ../shared/reference/numbers-experts.safetensors \
        --data_dir ../shared/data --sources '[../shared/data/meter-digits, mnist]' --reduction batch
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from importance_study.pairs import (
    KINDS,
    Estimate,
    Images,
    ImportanceName,
    PairRow,
    correlate,
    estimate_all,
    groups,
    title,
)
from importance_study.plots import draw_correlations, draw_scatter
from importance_study.report import plain, report, summed, typical
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from merge_reference import load_experts

from pl_personalize import Importance
from pl_personalize.artifacts import read_json
from pl_personalize.datamodules import DigitsDataModule, NumbersDataModule, TaskIncrementalDataModule
from pl_personalize.importance import Reduction
from pl_personalize.models import TaskNetwork, cnn_bn, mlp
from pl_personalize.runner import ImportanceOptions, TrainingOptions
from pl_personalize.runner.command_line import errors_in_one_line
from pl_personalize.runner.run_folder import check_writable
from pl_personalize.runner.trained import open_expert

PAPER_SOURCES = ("svhn", "mnist")
SEEDS = (1, 2, 3, 4, 5)


@dataclass
class ExpertSet:
    """The experts of a sequence of tasks."""

    name: str
    seed: int
    experts: list[TaskNetwork]


def main(
    run_dir: Path | None = None,
    experts: Path | None = None,
    benchmark: Literal["digits", "numbers"] = "digits",
    data_dir: Path = Path("data"),
    sources: Sequence[str] = PAPER_SOURCES,
    download: bool = False,
    max_per_source: PositiveInt | None = 10_000,
    split_seed: int = 27,
    seeds: Sequence[int] | None = None,
    hidden: Sequence[PositiveInt] = (100, 100),
    epochs: PositiveInt | None = None,
    kinds: Sequence[ImportanceName] = ("mas", "fisher"),
    reduction: Reduction = "sample",
    fisher_draws: PositiveInt | Literal["all"] = "all",
    batch_size: PositiveInt = 20,
    fixed_user: str | None = None,
    fixed_task: str | None = None,
    num_threads: PositiveInt = 1,
    output_dir: Path = Path("runs/importance-analysis"),
) -> None:
    """Correlate importances: one expert on different images, and different experts on the same images.

    Args:
        run_dir: Folder of a finished run of ``digits.py`` or ``numbers.py``, whose experts and options are taken.
        experts: File of experts as ``merge_reference.py`` takes it. Without this and ``run_dir``, experts are trained
            in ``output_dir/experts``.
        benchmark: What to train on.
        data_dir: Of Numbers, folder of the collections that have names.
        sources: Of Numbers: ``svhn``, ``mnist``, ``usps`` or folders with ``{train,test}/<digit>/*``.
        download: Of Numbers: fetch collections that are missing.
        max_per_source: Of Numbers: cap on the server's images of a task and source; null for all.
        split_seed: Seed of the choice and the division of the images.
        seeds: Of the experts: by default 1 to 5 where they are trained, and all that ``run_dir`` has.
        hidden: Widths of the hidden layers of the experts that are trained.
        epochs: For each task, of the experts that are trained; by default the benchmark's.
        kinds: ``mas``, ``fisher``.
        reduction: ``sample``: exact; ``batch``: the published code's estimate, in batches of ``batch_size``.
        fisher_draws: Labels drawn for each sample, or ``all`` for the exact expectation; one with ``batch``.
        batch_size: For ``--reduction batch``.
        fixed_user: The claim's second half is read on the images of this user, by default the last,
        fixed_task: … and of this task, by default the first.
        num_threads: Threads for PyTorch.
        output_dir: Where tables and figures go.
    """
    torch.set_num_threads(num_threads)
    if not kinds:
        raise MisconfigurationException("kinds must be at least one of mas, fisher.")
    if run_dir is not None and experts is not None:
        raise MisconfigurationException(f"Give run_dir or experts, not both; got {run_dir} and {experts}.")
    data: TaskIncrementalDataModule
    if experts is not None:
        if not experts.is_file():
            raise MisconfigurationException(f"no file of experts at {experts}; say where it is with --experts.")
        data = NumbersDataModule(
            data_dir, sources, download=download, max_per_source=max_per_source, split_seed=split_seed
        )
        networks = load_experts(experts)
        if len(networks) != len(data.tasks):
            raise MisconfigurationException(f"{experts} has {len(networks)} experts for {len(data.tasks)} tasks.")
        where, sets = str(experts), iter([ExpertSet(experts.stem, split_seed, networks)])
    else:
        if run_dir is None:
            run_dir, seeds = output_dir / "experts", SEEDS if seeds is None else seeds
            numbers = {"data_dir": data_dir, "sources": sources, "download": download, "max_per_source": max_per_source}
            train(benchmark, run_dir, numbers, seeds, hidden, epochs, split_seed, num_threads)
        options = read_json(run_dir / "manifest.json")["options"]
        data = data_of(options, run_dir)
        where, sets = str(run_dir), expert_sets(run_dir, options, data, seeds)
    data.prepare_data()
    data.eval_batch_size = batch_size if reduction == "batch" else 256
    if len(data.tasks) < 2:
        raise MisconfigurationException(f"{where} has one task; experts are compared with each other.")
    user = data.users[-1] if fixed_user is None else data.users[data.user_index(fixed_user)]
    fixed = Images(user, 0 if fixed_task is None else data.task_index(fixed_task))
    importance = ImportanceOptions(reduction, fisher_draws)
    check_writable(output_dir / "figures", "output_dir")
    rows: list[PairRow] = []
    shown: dict[ImportanceName, dict[Estimate, Importance]] = {}
    names = []
    for one in sets:
        names.append(one.name)
        for kind in kinds:
            begun = time.perf_counter()
            found = estimate_all(one.experts, data, kind, importance, one.seed)
            estimated = time.perf_counter()
            rows += correlate(one.name, kind, reduction, found, data)
            shown.setdefault(kind, found)
            spent = f"{estimated - begun:.1f} s, correlations {time.perf_counter() - estimated:.1f} s"
            print(f"{one.name}: {len(found)} {KINDS[kind]} importances {spent}", flush=True)
    known = groups(title(fixed, data), data.users)
    settings = {
        "experts": f"{where}: {', '.join(names)}",
        "users": ", ".join(data.users),
        "reduction": reduction if reduction == "sample" else f"batch, of {batch_size}",
        "fisher_draws": fisher_draws if reduction == "sample" else 1,
        "split_seed": getattr(data, "split_seed", split_seed),
    }
    report(output_dir, rows, known, settings)
    figures = [draw_correlations(output_dir / "figures" / "layers.png", rows, known, plain(rows))]
    if summed(rows):
        figures.append(draw_correlations(output_dir / "figures" / "units-and-inputs.png", rows, known, summed(rows)))
    for kind, found in shown.items():
        pairs = typical(rows, known, kind, names[0], found, data)
        figures.append(draw_scatter(output_dir / "figures" / f"scatter-{kind}.png", KINDS[kind], pairs))
    print("Figures:     " + ", ".join(map(str, figures)))


def train(
    benchmark: str,
    folder: Path,
    numbers: dict[str, Any],
    seeds: Sequence[int],
    hidden: Sequence[int],
    epochs: int | None,
    split_seed: int,
    num_threads: int,
) -> None:
    """Train experts as the benchmark's own script does; what is finished is not done again."""
    common: dict[str, Any] = {
        "seeds": seeds,
        "methods": ["Experts"],
        "hidden": hidden,
        "split_seed": split_seed,
        "loggers": [],
        "num_threads": num_threads,
        "output_dir": folder,
    }
    if benchmark == "digits":
        from digits import TRAINING, main

        main(training=replace(TRAINING, epochs=epochs or TRAINING.epochs), **common)
    else:
        from numbers_benchmark import main as numbers_main

        training = TrainingOptions() if epochs is None else TrainingOptions(epochs=epochs)
        numbers_main(training=training, **numbers, **common)
    print()


def data_of(options: dict[str, Any], run_dir: Path) -> TaskIncrementalDataModule:
    """The images of a run.

    Raises:
        MisconfigurationException: If it is a run of another benchmark.
    """
    if options.get("benchmark") == "Digits":
        return DigitsDataModule(split_seed=options["split_seed"])
    if options.get("benchmark") == "Numbers":
        return NumbersDataModule(
            options["data_dir"],
            options["sources"],
            max_per_source=options["max_per_source"],
            split_seed=options["split_seed"],
        )
    raise MisconfigurationException(f"{run_dir} is a run of {options.get('benchmark')}, not of Digits or Numbers.")


def expert_sets(
    run_dir: Path, options: dict[str, Any], data: TaskIncrementalDataModule, seeds: Sequence[int] | None = None
) -> Iterator[ExpertSet]:
    """The experts of some seeds of a run, by default of all.

    Raises:
        MisconfigurationException: If there are none, or some are missing.
    """
    there = sorted(int(path.name.removeprefix("seed")) for path in run_dir.glob("checkpoints/IMM/seed*"))
    if not there:
        raise MisconfigurationException(f"{run_dir} has no experts.")
    if missing := [seed for seed in seeds or () if seed not in there]:
        raise MisconfigurationException(f"{run_dir} has no experts of seed {missing[0]}; it has those of {there}.")
    for seed in there if seeds is None else seeds:
        folder = run_dir / "checkpoints" / "IMM" / f"seed{seed}"
        networks = []
        for task in range(len(data.tasks)):
            path = folder / f"task{task + 1}.safetensors"
            if not path.is_file():
                raise MisconfigurationException(f"{folder.name} is not finished: there is no {path}.")
            network = network_of(options, data, task)
            network.load_state_dict(open_expert(path).load())
            networks.append(network)
        yield ExpertSet(folder.name, seed, networks)


def network_of(options: dict[str, Any], data: TaskIncrementalDataModule, task: int) -> TaskNetwork:
    """The network of a run, with other parameters."""
    name, shape = options["backbone"], tuple(data.user_split(0, task)[0].images.shape[1:])
    if name.startswith("MLP "):
        return mlp(shape, data.num_classes(task), [int(width) for width in name.removeprefix("MLP ").split("-")])
    if name == "CNN-BN":
        return cnn_bn(shape, data.num_classes(task))
    from numbers_benchmark import PAPER_HIDDEN, network_maker

    return network_maker(name, PAPER_HIDDEN, None, options["image_size"])(data.num_classes(task))


if __name__ == "__main__":
    with errors_in_one_line():
        auto_cli(main, as_positional=False)
