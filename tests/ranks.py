"""Importances that several processes estimate together.

``main`` runs all cases in a group of three forks of this process; each writes its results to
``{folder}/{number of ranks}/rank-{rank}.pt``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pl_personalize import Importance
from pl_personalize.callbacks import FisherImportance, MASImportance
from pl_personalize.callbacks.importance_callback import ImportanceCallback

GROUPS = (3,)
NUM_ROWS, NUM_ALIKE, NUM_CLASSES = 10, 36, 3
ALIKE_CASES = [f"sampled-alike-{seed}" for seed in range(8)]
SUBSET = [8, 1, 5, 2, 9]
Make = Callable[..., ImportanceCallback]


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The first of some rows that differ, or as many times the first."""

    def __init__(self, rows: int = NUM_ROWS, alike: bool = False) -> None:
        x = torch.randn(NUM_ROWS, 6, generator=torch.Generator().manual_seed(1))
        self.x = x[:1].expand(rows, 6) if alike else x[:rows]
        self.y = torch.arange(rows) % NUM_CLASSES

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.y[row]


class Net(LightningModule):
    """Batch norm, whose statistics differ from rank to rank after training, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, NUM_CLASSES)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=5, shuffle=True)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(Rows(7), batch_size=3), DataLoader(Rows(1), batch_size=3)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([Rows()[row] for row in range(NUM_ROWS)])


class Reversed(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return reversed(list(super().__iter__()))


def mas(loader: Any = None, **options: Any) -> ImportanceCallback:
    return MASImportance(loader, **options)


def expected(loader: Any = None, **options: Any) -> ImportanceCallback:
    return FisherImportance(loader, draws="all", **options)


def empirical(loader: Any = None, **options: Any) -> ImportanceCallback:
    return FisherImportance(loader, labels="true", **options)


KINDS: dict[str, Make] = {"mas": mas, "expected": expected, "empirical": empirical}


@dataclass(frozen=True)
class Case:
    """An importance and the rows it is of, in the order of :class:`Rows`."""

    rows: Sequence[int]
    make: Make
    loader: Callable[[], Any] = lambda: None
    options: dict[str, Any] = field(default_factory=dict)


def loader_of(rows: int, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(Rows(rows), **({"batch_size": 4} | options))


def whole_batches() -> DataLoader[Any]:
    """A dataset whose items are batches, of different sizes."""
    rows = Rows()
    return DataLoader(list(zip(rows.x.split([4, 1, 3, 2]), rows.y.split([4, 1, 3, 2]), strict=True)), batch_size=None)


# By the end of a fit, of data of all kinds; sizes that do not divide by the ranks, and fewer samples than ranks.
FIT_CASES: dict[str, Case] = {
    **{f"mas-{rows}": Case(range(rows), mas, loader_of(rows)) for rows in (1, 2, 7, NUM_ROWS)},
    **{
        f"{kind}-{rows}": Case(range(rows), KINDS[kind], loader_of(rows))
        for kind, rows in (("expected", 1), ("empirical", 7))
    },
    "train": Case(range(NUM_ROWS), mas),
    "shuffled": Case(range(7), mas, loader_of(7, batch_size=3, shuffle=True)),
    "sampler": Case(SUBSET, mas, loader_of(NUM_ROWS, batch_size=2, sampler=SUBSET)),
    "batch-sampler": Case(SUBSET, mas, loader_of(NUM_ROWS, batch_size=1, batch_sampler=BatchSampler(SUBSET, 2, False))),
    "drawn": Case(
        range(NUM_ROWS),
        mas,
        loader_of(NUM_ROWS, sampler=WeightedRandomSampler([1.0] * NUM_ROWS, NUM_ROWS, replacement=False)),
    ),
    "subset-sampler": Case(SUBSET, empirical, loader_of(NUM_ROWS, sampler=SubsetRandomSampler(SUBSET))),
    "subset": Case(SUBSET, mas, lambda: DataLoader(Subset(Rows(), SUBSET), batch_size=2)),
    "two-loaders": Case([*range(7), *range(2)], mas, lambda: [loader_of(7)(), loader_of(2)()]),
    "whole-batches": Case(range(NUM_ROWS), mas, whole_batches),
    "predict-stage": Case([*range(7), 0], mas, lambda: "predict"),
    "predict-stage-expected": Case([*range(7), 0], expected, lambda: "predict"),
}
# Their labels are drawn.
SAMPLED_CASES: dict[str, Case] = {
    "sampled": Case(range(NUM_ROWS), FisherImportance, loader_of(NUM_ROWS), {"draws": 400}),
    "sampled-generator": Case(
        range(NUM_ROWS),
        FisherImportance,
        loader_of(NUM_ROWS),
        {"draws": 400, "generator": torch.Generator().manual_seed(3)},
    ),
    **{
        name: Case(
            range(NUM_ALIKE),
            FisherImportance,
            lambda: DataLoader(Rows(NUM_ALIKE, alike=True), batch_size=5),
            {"draws": 1, "generator": torch.Generator().manual_seed(seed)},
        )
        for seed, name in enumerate(ALIKE_CASES)
    },
}
# Of what is predicted: the loaders, and how many batches of each.
PREDICT_RUNS: dict[str, tuple[Callable[[], Any], int | None]] = {
    "predict": (loader_of(7, batch_size=3), None),
    "predict-subset": (loader_of(NUM_ROWS, batch_size=2, sampler=SubsetRandomSampler(SUBSET)), None),
    "predict-two": (lambda: [loader_of(7)(), loader_of(NUM_ROWS)()], None),
    "predict-sampler": (loader_of(NUM_ROWS, batch_size=2, sampler=SUBSET), None),
    "predict-drawn": (  # each process draws an order of its own
        loader_of(NUM_ROWS, batch_size=3, sampler=WeightedRandomSampler([1.0] * NUM_ROWS, NUM_ROWS, replacement=False)),
        None,
    ),
    "predict-limit": (loader_of(NUM_ROWS, batch_size=1), 2),
}
# Data that cannot be divided among processes.
REFUSED: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: [next(iter(loader_of(NUM_ROWS)()))],
    "iterator": lambda: iter(loader_of(NUM_ROWS)()),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "own-iter": lambda: Reversed(Rows(), batch_size=4),
}


def predicted_kinds(run: str) -> list[str]:
    """All kinds for one run; how the data are divided does not depend on the kind."""
    return list(KINDS) if run == "predict" else ["mas"]


def predicted_rows(run: str, num_ranks: int) -> list[int]:
    return {
        "predict": [*range(7)],
        "predict-subset": sorted(SUBSET),
        "predict-sampler": SUBSET,
        "predict-drawn": [*range(NUM_ROWS)],
        "predict-two": [*range(7), *range(NUM_ROWS)],
        "predict-limit": [*range(2 * num_ranks)],
    }[run]


def _note_saves(folder: Path, rank: int) -> None:
    save = Importance.save

    def noted(importance: Importance, path: Any) -> Any:
        with (folder / "saves.txt").open("a") as file:
            file.write(f"{rank} {path}\n")
        return save(importance, path)

    Importance.save = noted  # type: ignore[method-assign]


class Steps(Callback):
    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.count += 1

    def on_predict_batch_start(self, *args: Any) -> None:
        self.count += 1


class Weights(Callback):
    """Of the pass: at the end of a fit they are the last ones."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def run_rank(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    """One of the processes; Lightning sees from the environment that it need not start any."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    _note_saves(folder, rank)
    results: dict[str, Any] = {}
    refusals: dict[str, Any] = {}

    def trainer(*callbacks: Callback, **options: Any) -> Trainer:
        strategy = DDPStrategy(process_group_backend="gloo")
        return quiet_trainer(folder, *callbacks, devices=num_ranks, strategy=strategy, **options)

    def note(callbacks: dict[str, ImportanceCallback]) -> None:
        for name, callback in callbacks.items():
            importance = callback.importance
            assert importance is not None, name
            results[name] = {
                "values": dict(importance),
                "num_samples": importance.num_samples,
                "kind": importance.kind,
                "path": callback.path,
            }

    cases = FIT_CASES | SAMPLED_CASES
    callbacks = {name: case.make(case.loader(), filename=name, **case.options) for name, case in cases.items()}
    weights = Weights()
    trainer(*callbacks.values(), weights).fit(Net(), datamodule=Data())
    note(callbacks)

    for run, (loaders, limit) in PREDICT_RUNS.items():
        callbacks = {f"{run}-{kind}": KINDS[kind](filename=f"{run}-{kind}") for kind in predicted_kinds(run)}
        options = {} if limit is None else {"limit_predict_batches": limit}
        trainer(*callbacks.values(), **options).predict(Net(), loaders())
        note(callbacks)

    for name, iterable in REFUSED.items():
        for run in ("fit", "predict"):
            steps = Steps()
            try:
                running = trainer(MASImportance(iterable(), filename=f"refused-{name}"), steps)
                getattr(running, run)(Net(), loader_of(NUM_ROWS, batch_size=5)())
                message = None
            except MisconfigurationException as error:
                message = str(error)
            refusals[f"{run}-{name}"] = {"message": message, "steps": steps.count}

    torch.save({"results": results, "refusals": refusals, "weights": weights.state}, folder / f"rank-{rank}.pt")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main(folder: Path) -> int:
    """Run one group after the other, and count the processes that failed."""
    failures = 0
    for num_ranks in GROUPS:
        group, port = folder / str(num_ranks), free_port()
        group.mkdir()
        processes = [
            get_context("fork").Process(target=run_rank, args=(group, rank, num_ranks, port), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            failures += process.exitcode != 0  # None: it hangs, and ends with this process
    return failures
