r"""Do importances describe the model more than the data? The claim of the paper's slides, measured.

The claim: importances of one model on different data correlate highly, those of different models on the same data
hardly. This script computes the correlations for the experts of a finished run, of a file, or trained for it.

    python experiments/importance_analysis.py                                   # trains on handwritten digits first
    python experiments/importance_analysis.py --run_dir runs/numbers            # a finished run of run_numbers.py
    python experiments/importance_analysis.py --experts ../shared/reference/numbers-experts.safetensors \
        --data_dir ../shared/data --sources '[../shared/data/meter-digits, mnist]' --reduction batch
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from finished_run import DATAMODULES, FinishedRun
from importance_study.pairs import ALL, KINDS, Images, ImportanceName, correlate, estimate_all, groups, title
from importance_study.report import draw_scatter, report, typical
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from merge_reference import load_experts
from run_digits import DEFAULTS as DIGITS_DEFAULTS

from pl_personalize.datamodules import DigitsDataModule, NumbersDataModule, TaskIncrementalDataModule
from pl_personalize.importance import Reduction
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import (
    Experiment,
    ImportanceOptions,
    NetworkOptions,
    TrainerOptions,
    TrainingOptions,
    run_experiment,
)
from pl_personalize.runner.command_line import run_script
from pl_personalize.stages.run_folder import check_writable

PAPER_SOURCES = ("svhn", "mnist")
SEEDS = (1, 2, 3, 4, 5)


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
    """Correlate importances of one expert on different images, and of different experts on the same images.

    Args:
        run_dir: Folder of a finished run of ``run_digits.py`` or ``run_numbers.py`` with the experts and the data.
        experts: File of experts in the format of ``merge_reference.py``. Without this and ``run_dir``, experts are
            trained in ``output_dir/experts``.
        benchmark: Benchmark to train on.
        data_dir: Numbers: folder of the named collections.
        sources: Numbers: ``svhn``, ``mnist``, ``usps`` or folders with ``{train,test}/<digit>/*``.
        download: Numbers: download missing collections.
        max_per_source: Numbers: maximum number of the server's images per task and source; null for all.
        split_seed: Seed of the selection and division of the images.
        seeds: Seeds of the experts; defaults to 1 to 5 for training, and to all seeds of ``run_dir``.
        hidden: Widths of the hidden layers of trained experts.
        epochs: Epochs per task of trained experts; defaults to the benchmark's.
        kinds: Importances: ``mas``, ``fisher``.
        reduction: ``sample`` (exact) or ``batch`` (the published code's estimate, in batches of ``batch_size``).
        fisher_draws: Labels drawn per sample, or ``all`` for the exact expectation; always 1 with ``batch``.
        batch_size: Batch size for ``--reduction batch``.
        fixed_user: User whose images the second half of the claim is tested on; defaults to the last.
        fixed_task: Task of these images; defaults to the first.
        num_threads: Threads for PyTorch.
        output_dir: Folder for tables and figures.
    """
    torch.set_num_threads(num_threads)
    if not kinds:
        raise MisconfigurationException("kinds is empty: pass mas, fisher or both.")
    if run_dir is not None and experts is not None:
        raise MisconfigurationException(f"Give run_dir or experts, not both; got {run_dir} and {experts}.")
    data: TaskIncrementalDataModule = NumbersDataModule(
        data_dir, sources, max_per_source=max_per_source, split_seed=split_seed, download=download
    )
    if experts is not None:
        if not experts.is_file():
            raise MisconfigurationException(f"no file of experts at {experts}; say where it is with --experts.")
        networks = load_experts(experts)
        if len(networks) != len(data.tasks):
            raise MisconfigurationException(f"{experts} has {len(networks)} experts for {len(data.tasks)} tasks.")
        where, sets = str(experts), iter([(experts.stem, split_seed, networks)])
    else:
        if run_dir is None:
            run_dir, seeds = output_dir / "experts", SEEDS if seeds is None else seeds
            if benchmark == "digits":
                data = DigitsDataModule(split_seed=split_seed)
            train(benchmark, data, NetworkOptions(hidden=hidden), epochs, seeds, run_dir)
        run = FinishedRun(run_dir, DATAMODULES)
        data = run.data
        where, sets = str(run_dir), expert_sets(run, seeds)
    data.prepare_data()
    data.eval_batch_size = batch_size if reduction == "batch" else 256
    if len(data.tasks) < 2:
        raise MisconfigurationException(f"{where} has only one task, so there are no experts to compare.")
    user = data.users[-1] if fixed_user is None else data.users[data.user_index(fixed_user)]
    fixed = Images(user, 0 if fixed_task is None else data.task_index(fixed_task))
    importance = ImportanceOptions(reduction, fisher_draws)
    check_writable(output_dir / "figures", "output_dir")
    known = groups(title(fixed, data), data.users)
    frames, scatter, names = [], {}, []
    for name, seed, networks in sets:
        names.append(name)
        for kind in kinds:
            start = time.perf_counter()
            found = estimate_all(networks, data, kind, importance, seed)
            estimated = time.perf_counter()
            frames.append(correlate(found, data, name, kind, reduction))
            if kind not in scatter:
                scatter[kind] = typical(frames[-1][frames[-1]["parameters"] == ALL], known, found, data)
            spent = f"{estimated - start:.1f} s, correlations {time.perf_counter() - estimated:.1f} s"
            print(f"{name}: {len(found)} {KINDS[kind]} importances {spent}", flush=True)
    pairs = pd.concat(frames, ignore_index=True)
    settings = {
        "experts": f"{where}: {', '.join(names)}",
        "users": ", ".join(data.users),
        "reduction": reduction if reduction == "sample" else f"batch, of {batch_size}",
        "fisher_draws": fisher_draws if reduction == "sample" else 1,
        "split_seed": getattr(data, "split_seed", split_seed),
    }
    figures = report(output_dir, pairs, known, settings)
    for kind, chosen in scatter.items():
        figures.append(draw_scatter(output_dir / "figures" / f"scatter-{kind}.png", KINDS[kind], chosen))
    print("Figures:     " + ", ".join(map(str, figures)))


def train(
    benchmark: str,
    data: TaskIncrementalDataModule,
    network: NetworkOptions,
    epochs: int | None,
    seeds: Sequence[int],
    folder: Path,
) -> None:
    """Train experts as the benchmark's own script does, unless they are already in the folder."""
    own = DIGITS_DEFAULTS if benchmark == "digits" else {}
    chosen = {name: own[f"training.{name}"] for name in ("epochs", "lr") if f"training.{name}" in own}
    if epochs is not None:
        chosen["epochs"] = epochs
    run_experiment(
        Experiment(
            benchmark.capitalize(),
            data,
            network,
            methods=["Experts"],
            seeds=seeds,
            training=TrainingOptions(**chosen),
            trainer=TrainerOptions("cpu"),
            loggers=[],
            output_dir=folder,
        )
    )
    print()


def expert_sets(run: FinishedRun, seeds: Sequence[int] | None = None) -> Iterator[tuple[str, int, list[TaskNetwork]]]:
    """Name, seed and experts for some seeds of a run, by default all."""
    if not (there := run.seeds("checkpoints")):
        raise MisconfigurationException(f"{run.path} has no experts.")
    if missing := [seed for seed in seeds or () if seed not in there]:
        raise MisconfigurationException(f"{run.path} has no experts of seed {missing[0]}; it has those of {there}.")
    for seed in there if seeds is None else seeds:
        networks = [run.network(task) for task in range(len(run.data.tasks))]
        for task, network in enumerate(networks):
            network.load_state_dict(run.expert(seed, task))
        yield f"seed{seed}", seed, networks


if __name__ == "__main__":
    run_script(main)
