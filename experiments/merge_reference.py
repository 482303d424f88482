"""Merge given experts of Numbers with importances from the data, to test merging apart from training.

The experts are a safetensors file with ``task{1..5}.{hidden1,hidden2,head}.{weight,bias}``: MLPs 100-100 on 3×28×28.

    python experiments/merge_reference.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor

from pl_personalize import Importance, estimate_importance
from pl_personalize.datamodules import NumbersDataModule, TaskIncrementalDataModule
from pl_personalize.datamodules.numbers import IMAGE_SHAPE
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.merging import merge_prefixes
from pl_personalize.methods import METHODS
from pl_personalize.methods.experts import Merge
from pl_personalize.metrics import TaskAccuracyMatrix, average_accuracy, forgetting
from pl_personalize.models import TaskNetwork, mlp
from pl_personalize.runner.command_line import run_script
from pl_personalize.runner.results import mean_and_std

MERGES = {name: method for name, method in METHODS.items() if isinstance(method, Merge)}


def load_experts(path: Path) -> list[TaskNetwork]:
    """Networks in the file, by task."""
    entries = load_file(path)
    experts = []
    for task in range(1, 1 + len({name.partition(".")[0] for name in entries})):
        network = mlp(IMAGE_SHAPE, num_classes=len(entries[f"task{task}.head.bias"]))
        prefix = f"task{task}."
        state = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
        network.load_state_dict({n if n.startswith("head") else f"body.{n}": value for n, value in state.items()})
        experts.append(network)
    return experts


def estimate(
    experts: Sequence[TaskNetwork], data: TaskIncrementalDataModule, merge: Merge, reduction: str, seed: int
) -> list[Importance] | None:
    """Importances that a merge needs, for the data's current user; None if it needs none."""
    if merge.kind is None:
        return None
    importances = []
    for task, expert in enumerate(experts):
        loader = data.adapt_dataloader(task) if merge.personal else data.server_dataloader(task)
        generator = torch.Generator().manual_seed(derive_seed(seed, merge.name, task))
        options = {"generator": generator} if merge.kind == "fisher" else {}
        found = estimate_importance(expert, loader, merge.kind, module="body", reduction=reduction, **options)  # type: ignore[arg-type]
        importances.append(found)
    return importances


@torch.no_grad()
def evaluate(
    experts: Sequence[TaskNetwork], importances: Sequence[Importance] | None, data: TaskIncrementalDataModule
) -> Tensor:
    """Accuracy matrix of the merges, in percent, for the data's current user."""
    assert data.user is not None
    matrix, network = TaskAccuracyMatrix(len(experts)), mlp(IMAGE_SHAPE, num_classes=2).eval()
    for t, body in enumerate(merge_prefixes([expert.body.state_dict() for expert in experts], importances)):
        network.body.load_state_dict(body)
        for i in range(t + 1):
            network.head.load_state_dict(experts[i].head.state_dict())
            images, labels = data.user_split(data.user, i)[1]
            matrix.update(network(images).argmax(1), labels, model=t, task=i)
    return 100 * matrix.compute()


def main(
    experts: Path = Path("../shared/reference/numbers-experts.safetensors"),
    data_dir: Path = Path("../shared/data"),
    sources: Sequence[str] = ("../shared/data/meter-digits", "mnist"),
    split_seeds: Sequence[int] = (1, 2, 3, 4, 5),
    methods: Sequence[str] = tuple(MERGES),
    reduction: Literal["sample", "batch"] = "sample",
    num_threads: int = 1,
) -> None:
    """Merge given experts of Numbers with importances from the data, for several divisions of the images.

    Args:
        experts: File with the experts.
        data_dir: Folder of the named sources.
        sources: Sources of the benchmark; each is one user.
        split_seeds: Seeds of the division of the images.
        methods: Methods to compare.
        reduction: ``sample`` (exact) or ``batch`` (the published code's estimate, in batches of 20).
        num_threads: Threads for PyTorch.
    """
    if not experts.is_file():
        raise MisconfigurationException(f"no file of experts at {experts}; say where it is with --experts.")
    if unknown := [method for method in methods if method not in MERGES]:
        raise MisconfigurationException(f"methods must be of {', '.join(MERGES)}; got {unknown[0]!r}.")
    torch.set_num_threads(num_threads)
    networks = load_experts(experts)
    results = pd.DataFrame(columns=["method", "accuracy", "forgetting"])
    for seed in split_seeds:
        data = NumbersDataModule(
            data_dir, sources, split_seed=seed, eval_batch_size=20 if reduction == "batch" else 256
        )
        for method in methods:
            found, importances = [], None
            for user in data.users:
                view = data.view(user=user)
                if importances is None or MERGES[method].personal:
                    importances = estimate(networks, view, MERGES[method], reduction, seed)
                matrix = evaluate(networks, importances, view)
                found.append([float(average_accuracy(matrix)), float(forgetting(matrix))])
            accuracy, lost = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
            results.loc[len(results)] = [method, accuracy, lost]
            print(f"split {seed}  {method:9s} {accuracy:6.2f} ({lost:5.2f})", flush=True)
    print(f"\nMean of {len(split_seeds)} splits, {len(sources)} users, {reduction=}: average accuracy (forgetting)")
    for method, rows in results.groupby("method", sort=False):
        print(f"{method:9s} {mean_and_std(rows['accuracy'], 2)} ({rows['forgetting'].mean():5.2f})")


if __name__ == "__main__":
    run_script(main)
