"""How many unlabelled images does it take to adapt the batch norm of a merged network, and does the batch size matter?

python experiments/run_numbers.py --config experiments/configs/numbers-bn.yaml
python experiments/batchnorm_study.py --run_dir runs/numbers-bn
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import torch
from finished_run import DATAMODULES, FinishedRun
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_personalize import BatchNormStatistics, adapt_batchnorm
from pl_personalize.adaptations.expert_statistics import statistics_names
from pl_personalize.artifacts import TensorFile
from pl_personalize.models import MultiHeadNetwork
from pl_personalize.runner.command_line import run_script
from pl_personalize.runner.figures import new_figure, save_figure
from pl_personalize.runner.results import markdown_table, mean_and_std
from pl_personalize.stages.run_folder import check_writable

WAYS = {"one pass": {}, "exact": {"exact": True}, "exact, prior 16": {"exact": True, "prior_samples": 16}}


def main(
    run_dir: Path = Path("runs/numbers-bn"),
    method: str = "FIM-RACL",
    images: Sequence[PositiveInt] = (1, 2, 4, 8, 16, 32, 64, 128),
    batch_sizes: Sequence[PositiveInt] = (2, 4, 8, 20, 100, 1000),
    repeats: PositiveInt = 2,
    num_threads: PositiveInt = 1,
) -> None:
    """Adapt the merged models of a run to some of each user's images, and test them.

    Args:
        run_dir: Folder of a run of ``run_numbers.py`` with batch norm, such as ``--network.name cnn_bn``.
        method: Method whose merged models are adapted.
        images: Numbers of unlabelled images per task; the last row always has all images.
        batch_sizes: Batch sizes for adaptation to all images.
        repeats: Random selections of each number of images; their mean counts for a seed and task.
        num_threads: Threads for PyTorch.
    """
    torch.set_num_threads(num_threads)
    run = FinishedRun(run_dir, DATAMODULES)
    if not statistics_names(run.network(0).body):
        raise MisconfigurationException(f"{run_dir} is a run of {run.network_options.title}, which has no batch norm.")
    tasks, data = range(len(run.data.tasks)), run.data
    fewest = min(len(data.user_split(user, task)[0].labels) for user in data.users for task in tasks)
    if not (seeds := run.seeds("merged")):
        raise MisconfigurationException(f"{run_dir} has no merged models.")
    check_writable(run_dir / "figures", "run_dir")
    by_number: list[dict[str, Any]] = []
    by_size: list[dict[str, Any]] = []
    for seed in seeds:
        for user in data.users:
            study = Study(run, seed, user, method)
            for task in tasks:
                by_number += study.numbers(task, [count for count in images if count < fewest], repeats)
                by_size += study.sizes(task, batch_sizes)
    cells = mean_over_tasks(by_number)
    print(f"{method}, {len(seeds)} seeds, mean ± standard deviation of the average accuracy in percent\n")
    print(f"Unlabelled images per task, in batches of {data.batch_size}:\n\n{table('images', cells)}\n")
    print(f"All images, by batch size:\n\n{table('batch size', mean_over_tasks(by_size))}\n")
    print(f"Figure: {draw(run_dir / 'figures' / 'adabn-images.png', cells, method)}")


class Study:
    """The model that a method merged for a seed and user."""

    def __init__(self, run: FinishedRun, seed: int, user: str, method: str) -> None:
        self.data, self.user, self.seed = run.data, user, seed
        tasks = range(len(run.data.tasks))
        networks = [run.network(task) for task in tasks]
        self.model = MultiHeadNetwork(networks[0].body, [network.head for network in networks]).eval()
        merged = run.path / "merged" / "experts" / f"seed{seed}" / f"{user}-{method}.safetensors"
        self.model.load_state_dict(TensorFile(merged, kind="merged").load())
        experts, names = [run.expert(seed, task) for task in tasks], statistics_names(self.model.body)
        self.average = BatchNormStatistics.average([{n: expert[f"body.{n}"] for n in names} for expert in experts])

    def adapt(self, images: Tensor, batch_size: int, **options: Any) -> BatchNormStatistics:
        """Adapt the statistics, starting from those of the mixture of the experts."""
        self.average.apply(self.model.body)
        return adapt_batchnorm(self.model, images.split(batch_size), forward=lambda model, x: model.body(x), **options)

    @torch.no_grad()
    def accuracy(self, task: int) -> float:
        """Accuracy on the user's eval images, in percent."""
        images, labels = self.data.user_split(self.user, task)[1]
        predicted = torch.cat([self.model(x, task).argmax(1) for x in images.split(500)])
        return 100 * float((predicted == labels).float().mean())

    def numbers(self, task: int, counts: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
        """Accuracies by number of images and kind of adaptation."""
        images = self.data.user_split(self.user, task)[0].images
        self.average.apply(self.model.body)
        unadapted = self.accuracy(task)
        for name, count in [*((str(count), count) for count in counts), ("all", len(images))]:
            for way, options in WAYS.items():
                values = []
                for chosen in selections(len(images), count, repeats):
                    self.adapt(images[chosen], self.data.batch_size, **options)
                    values.append(self.accuracy(task))
                yield self.record(name, way, mean(values))
            yield self.record(name, "not adapted", unadapted)

    def sizes(self, task: int, batch_sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Accuracies, and deviations from the exact statistics, by batch size."""
        images = self.data.user_split(self.user, task)[0].images
        exact = self.adapt(images, 100, exact=True)
        best = self.accuracy(task)
        for size in batch_sizes:
            statistics = self.adapt(images, size)
            yield self.record(str(size), "one pass", self.accuracy(task))
            yield self.record(str(size), "exact", best)
            yield self.record(str(size), "difference of means, in σ (%)", 100 * distance(statistics, exact))

    def record(self, row: str, column: str, value: float) -> dict[str, Any]:
        """An entry of the tables, still of one task."""
        return {"row": row, "user": self.user, "column": column, "seed": self.seed, "value": value}


def selections(available: int, count: int, repeats: int) -> Iterator[Tensor]:
    """Random selections of images."""
    for seed in range(repeats if count < available else 1):
        yield torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]


def distance(statistics: BatchNormStatistics, exact: BatchNormStatistics) -> float:
    """Largest difference between running means, over layers and channels, in standard deviations."""
    return max(
        float(((statistics[name] - value) / exact[name.removesuffix("mean") + "var"].sqrt()).abs().max())
        for name, value in exact.items()
        if name.endswith("running_mean")
    )


def mean_over_tasks(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Mean over tasks, with one column per seed, indexed by row, user and column."""
    keys = ["row", "user", "column", "seed"]
    return pd.DataFrame(records).groupby(keys, sort=False)["value"].mean().unstack("seed")


def table(title: str, cells: pd.DataFrame) -> str:
    """Markdown table of rows × users and columns."""
    texts = {key: mean_and_std(values) for key, values in zip(cells.index, cells.to_numpy(), strict=True)}
    rows, columns = list(dict.fromkeys(row for row, *_ in texts)), list(dict.fromkeys(key[1:] for key in texts))
    lines = [[title, *[f"{user}: {column}" for user, column in columns]]]
    return markdown_table(lines + [[row, *[texts[row, *column] for column in columns]] for row in rows])


def draw(path: Path, cells: pd.DataFrame, method: str) -> Path:
    """Draw accuracy over the number of images, one panel per user."""
    rows, users = (list(dict.fromkeys(cells.index.get_level_values(name))) for name in ("row", "user"))
    figure = new_figure(4.6 * len(users), 3.8)
    axes = figure.subplots(1, len(users), squeeze=False)[0]
    for axis, user in zip(axes, users, strict=True):
        for way in [*WAYS, "not adapted"]:
            values = cells.xs((user, way), level=("user", "column")).loc[rows]
            means, spreads = values.mean(axis=1), values.std(axis=1).fillna(0.0)
            axis.plot(rows, means, "--" if way == "not adapted" else "o-", label=way)
            axis.fill_between(rows, means - spreads, means + spreads, alpha=0.12, linewidth=0)
        axis.set_xlabel("unlabelled images per task")
        axis.set_title(f"{method}, user {user}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("average accuracy (%)")
    axes[-1].legend(frameon=False)
    return save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
