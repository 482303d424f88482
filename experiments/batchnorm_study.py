"""How many unlabelled images it takes to adapt a merged network's batch norm, and what the batch size does.

python experiments/numbers.py --config experiments/configs/numbers-bn.yaml
python experiments/batchnorm_study.py --run_dir runs/numbers-bn
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pl_personalize import BatchNormStatistics, adapt_batchnorm
from pl_personalize.artifacts import TensorFile, read_json
from pl_personalize.datamodules import NumbersDataModule
from pl_personalize.datamodules.numbers import IMAGE_SHAPE
from pl_personalize.models import MultiHeadNetwork, cnn_bn
from pl_personalize.modules.batchnorm_policy import statistics_names
from pl_personalize.runner.command_line import errors_in_one_line
from pl_personalize.runner.results import markdown_table
from pl_personalize.runner.run_folder import check_writable
from pl_personalize.runner.trained import open_expert

Cells = dict[tuple[str, str, str], list[float]]  # by (row, column, user): one accuracy for each seed
WAYS = {"one pass": {}, "exact": {"exact": True}, "exact, prior 16": {"exact": True, "prior_samples": 16}}


def main(
    run_dir: Path = Path("runs/numbers-bn"),
    method: str = "FIM-RACL",
    images: Sequence[PositiveInt] = (1, 2, 4, 8, 16, 32, 64, 128),
    batch_sizes: Sequence[PositiveInt] = (2, 4, 8, 20, 100, 1000),
    draws: PositiveInt = 2,
    num_threads: PositiveInt = 1,
) -> None:
    """Adapt the merged models of a run to some of each user's images, and test them.

    Args:
        run_dir: Folder of a run of ``numbers.py --backbone cnn_bn``.
        method: Whose merged models.
        images: Numbers of unlabelled images of a task, where there are so many; the last row is all that there are.
        batch_sizes: For the adaptation on all images.
        draws: Of that many images; for each seed and task the mean over draws counts.
        num_threads: Threads for PyTorch.
    """
    torch.set_num_threads(num_threads)
    options = read_json(run_dir / "manifest.json")["options"]
    if options["backbone"] != "CNN-BN":
        raise MisconfigurationException(f"{run_dir} is a run with the backbone {options['backbone']}, not CNN-BN.")
    data = NumbersDataModule(
        options["data_dir"],
        options["sources"],
        max_per_source=options["max_per_source"],
        split_seed=options["split_seed"],
        batch_size=options["batch_size"],
    )
    splits = [data.user_split(user, task)[0].labels for user in data.users for task in range(len(data.tasks))]
    images = [count for count in images if count < min(map(len, splits))]
    seeds = sorted(run_dir.glob("merged/IMM/seed*"), key=lambda path: int(path.name.removeprefix("seed")))
    if not seeds:
        raise MisconfigurationException(f"{run_dir} has no merged models.")
    check_writable(run_dir / "figures", "run_dir")
    by_number, by_size = Cells(), Cells()
    for folder in seeds:
        for user in data.users:
            model = load(folder / f"{user}-{method}.safetensors", data)
            average = average_statistics(run_dir / "checkpoints" / "IMM" / folder.name, model)
            for (row, column), accuracies in numbers(model, average, data, user, images, draws).items():
                by_number.setdefault((row, column, user), []).append(mean(accuracies))
            for (row, column), accuracies in sizes(model, average, data, user, batch_sizes).items():
                by_size.setdefault((row, column, user), []).append(mean(accuracies))
    print(f"{method}, {len(seeds)} seeds, mean ± standard deviation of the average accuracy in percent\n")
    print(f"Unlabelled images of a task, in batches of {data.batch_size}:\n\n{table('images', by_number)}\n")
    print(f"All images, in batches of some size:\n\n{table('batch size', by_size)}\n")
    print(f"Figure: {draw(run_dir / 'figures' / 'adabn-images.png', by_number, method)}")


def load(path: Path, data: NumbersDataModule) -> MultiHeadNetwork:
    """A merged model with the heads of all tasks."""
    made = [cnn_bn(IMAGE_SHAPE, data.num_classes(task)) for task in range(len(data.tasks))]
    model = MultiHeadNetwork(made[0].body, [network.head for network in made]).eval()
    model.load_state_dict(TensorFile(path, kind="merged").load())
    return model


def average_statistics(folder: Path, model: MultiHeadNetwork) -> BatchNormStatistics:
    """Those of the mixture of the experts."""
    experts = [open_expert(path) for path in sorted(folder.glob("task*.safetensors"))]
    names = statistics_names(model.body)
    return BatchNormStatistics.average([{name: expert[f"body.{name}"] for name in names} for expert in experts])


def numbers(
    model: MultiHeadNetwork,
    average: BatchNormStatistics,
    data: NumbersDataModule,
    user: str,
    counts: Sequence[int],
    draws: int,
) -> dict[tuple[str, str], list[float]]:
    """Accuracies for each task by (number of images, way)."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for task in range(len(data.tasks)):
        adapt = data.user_split(user, task)[0].images
        average.apply(model.body)
        unadapted = accuracy(model, data, user, task)
        for name, count in [*((str(count), count) for count in counts), ("all", len(adapt))]:
            for way, options in WAYS.items():
                values = []
                for chosen in choices(len(adapt), count, draws):
                    average.apply(model.body)
                    adapt_batchnorm(model, adapt[chosen].split(data.batch_size), forward=body, **options)
                    values.append(accuracy(model, data, user, task))
                found[name, way].append(mean(values))
            found[name, "not adapted"].append(unadapted)
    return found


def body(model: MultiHeadNetwork, x: Tensor) -> Tensor:
    """The part of the network that has batch norm."""
    features: Tensor = model.body(x)
    return features


def choices(available: int, count: int, draws: int) -> Iterator[Tensor]:
    """Random choices of images."""
    for draw in range(draws if count < available else 1):
        yield torch.randperm(available, generator=torch.Generator().manual_seed(draw))[:count]


def sizes(
    model: MultiHeadNetwork,
    average: BatchNormStatistics,
    data: NumbersDataModule,
    user: str,
    batch_sizes: Sequence[int],
) -> dict[tuple[str, str], list[float]]:
    """Accuracies for each task by (batch size, way), and how far the statistics are from the exact ones."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for task in range(len(data.tasks)):
        adapt = data.user_split(user, task)[0].images
        average.apply(model.body)
        exact = adapt_batchnorm(model, adapt.split(100), exact=True, forward=body)
        best = accuracy(model, data, user, task)
        for size in batch_sizes:
            average.apply(model.body)
            statistics = adapt_batchnorm(model, adapt.split(size), forward=body)
            found[str(size), "one pass"].append(accuracy(model, data, user, task))
            found[str(size), "exact"].append(best)
            found[str(size), "difference of means, in σ (%)"].append(100 * distance(statistics, exact))
    return found


def distance(statistics: BatchNormStatistics, exact: BatchNormStatistics) -> float:
    """Largest difference between running means, over layers and channels, in standard deviations."""
    return max(
        float(((statistics[name] - value) / exact[name.removesuffix("mean") + "var"].sqrt()).abs().max())
        for name, value in exact.items()
        if name.endswith("running_mean")
    )


@torch.no_grad()
def accuracy(model: MultiHeadNetwork, data: NumbersDataModule, user: str, task: int) -> float:
    """On the user's eval images, in percent."""
    images, labels = data.user_split(user, task)[1]
    predicted = torch.cat([model(x, task).argmax(1) for x in images.split(500)])
    return 100 * float((predicted == labels).float().mean())


def table(title: str, cells: Cells) -> str:
    """Rows by users and columns."""
    users = list(dict.fromkeys(user for *_, user in cells))
    rows = list(dict.fromkeys(row for row, *_ in cells))
    columns = list(dict.fromkeys(column for _, column, _ in cells))
    lines = [[title, *[f"{user}: {column}" for user in users for column in columns]]]
    for row in rows:
        values = [cells.get((row, column, user), []) for user in users for column in columns]
        lines.append(
            [row, *[f"{mean(v):.1f} ± {stdev(v):.1f}" if len(v) > 1 else f"{v[0]:.1f}" if v else "" for v in values]]
        )
    return markdown_table(lines)


def draw(path: Path, cells: Cells, method: str) -> Path:
    """Accuracy over the number of images, a panel for each user."""
    users = list(dict.fromkeys(user for *_, user in cells))
    rows = list(dict.fromkeys(row for row, *_ in cells))
    figure = Figure(figsize=(4.6 * len(users), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(users), squeeze=False)[0]
    for axis, user in zip(axes, users, strict=True):
        for way in [*WAYS, "not adapted"]:
            groups = [cells[row, way, user] for row in rows]
            means: list[Any] = [mean(group) for group in groups]
            (line,) = axis.plot(range(len(rows)), means, "--" if way == "not adapted" else "o-", label=way)
            spreads = [stdev(group) if len(group) > 1 else 0.0 for group in groups]
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axis.fill_between(range(len(rows)), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set_xticks(range(len(rows)), rows)
        axis.set_xlabel("unlabelled images of a task")
        axis.set_title(f"{method}, user {user}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("average accuracy (%)")
    axes[-1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


if __name__ == "__main__":
    with errors_in_one_line():
        auto_cli(main, as_positional=False)
