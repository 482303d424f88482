"""Run of one family of methods with one seed: its stages, and those of merging, adapting and testing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import Callback
from torch import Tensor

from pl_personalize.adaptations import AdaptationSequence, Entries
from pl_personalize.adaptations.adaptation import SENT
from pl_personalize.adaptations.heads import FOUND, Auto
from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.batches import as_input
from pl_personalize.heads.adapt import Shift
from pl_personalize.methods import METHODS, Family, Method
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.modules.sequence_evaluator import Cell
from pl_personalize.runner.experiment import Experiment
from pl_personalize.runner.variants import Variant
from pl_personalize.stages.checkpoints import load_checkpoint, resume_path
from pl_personalize.stages.metrics_log import MetricsLog
from pl_personalize.stages.run_folder import RunFolder, Stage
from pl_personalize.stages.work import RunFile, Work
from pl_personalize.stages.workspace import Workspace, refuse_divergence

ADAPTED_KIND = "adapted"


class ServerRun:
    """All stages of one family of methods with one seed; finished ones are not repeated."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        family: type[Family],
        variants: Sequence[Variant],
        seed: int,
    ) -> None:
        self.experiment, self.folder, self.seed, self.variants = experiment, folder, seed, list(variants)
        self.log = MetricsLog(folder.metrics_file)
        self.workspace = Workspace(
            family.name,
            seed,
            folder,
            experiment.data.view(seed=seed),
            experiment.make_network,
            experiment.training,
            experiment.importance,
            experiment.trainer,
            self.log,
            experiment.models,
        )
        self.methods = [METHODS[name] for name in dict.fromkeys(variant.method for variant in variants)]
        self.family = family(self.workspace, self.methods, experiment.family_options(family))
        self.data = self.workspace.data

    @property
    def name(self) -> str:
        """The first part of the names of the run's stages."""
        return self.workspace.prefix

    @property
    def prefixes(self) -> list[str]:
        """The first parts of the names of its stages and of those that it shares with other runs."""
        return list(dict.fromkeys("/".join(work.name.split("/")[:2]) for work in self.stages()))

    def stages(self) -> Iterator[Work]:
        """Every stage, in an order in which each finds what it needs."""
        yield from self.family.stages()
        for method in self.methods:
            for user in self.data.users if method.merges else ():
                yield self.workspace.work(f"merge/{method.name}/{user}", self._merge, method, user)
        planned: set[str] = set()
        for variant in self.variants:
            for user in self.data.users:
                for work in (*self._adapt_works(variant, user), self._test_work(variant, user)):
                    if work.name not in planned:
                        planned.add(work.name)
                        yield work

    def forget_interrupted(self) -> None:
        """Drop the metrics that interrupted stages logged after the steps from which they will resume."""
        steps: dict[str, int] = {}
        for work in self.stages():
            if self.folder.finished(work.name) is None:
                resume = work.checkpoints and resume_path(work.checkpoints)
                steps[work.name] = load_checkpoint(resume)["global_step"] if resume and resume.exists() else 0
        self.log.drop(steps)

    def with_all_tested(self) -> Self:
        """The same run with every variant that is tested for all users, also those of earlier calls."""
        tested: dict[Variant, set[str]] = {}
        for stage in self.folder.finished_below(f"{self.name}/test/"):
            result = self.folder.finished(stage)
            if result is not None:
                variant = Variant(result.result["method"], result.result["adaptation"])
                tested.setdefault(variant, set()).add(result.result["user"])
        order = {name: place for place, name in enumerate(METHODS)}
        complete = [v for v, users in tested.items() if v.is_registered and users >= set(self.data.users)]
        complete.sort(key=lambda variant: order[variant.method])
        return type(self)(self.experiment, self.folder, type(self.family), complete, self.seed)

    # Results

    def matrix(self, variant: Variant, user: str) -> Tensor:
        """The accuracies, model by task, in [0, 1]; NaN where there is none."""
        rows = self.workspace.result(f"test/{variant.label}/{user}")["matrix"]
        return torch.tensor([[float("nan") if value is None else value for value in row] for row in rows])

    def found_shift(self, variant: Variant, user: str) -> Shift | None:
        """The shift that the last model of a variant found for a user; ``None`` if it does not look for one."""
        sequences = self._sequences(variant)
        if not sequences or sequences[-1].steps[-1].name != Auto.name:
            return None
        *_, last = load_adapted(self._adapted_path(variant.method, sequences[-1], user)).values()
        return get_args(Shift)[int(last[f"{SENT}{FOUND}"])]  # type: ignore[no-any-return]

    def validation(self) -> dict[str, float]:
        """The best validation accuracy of each trained model, in [0, 1], by the last part of its stage's name."""
        found = {}
        for work in self.family.stages():
            done = self.folder.finished(work.name)
            if work.kind == "train" and done is not None:
                found[work.name.rpartition("/")[2]] = float(done.result["val_acc"])
        return found

    def files(self) -> list[RunFile]:
        """The files of models, importances and adaptations; each after those that it was made of."""
        found = [*self.family.models(), *(file for *_, file in self.family.importances())]
        for method in self.methods:
            for user in self.data.users if method.merges else ():
                found.append(RunFile("merged", self._merged_path(method, user), self.family.sources(method, user)))
        adapted: dict[Path, RunFile] = {}
        for variant in self.variants:
            for user in self.data.users:
                sources = self.family.sources(METHODS[variant.method], user)
                for sequence in self._sequences(variant):
                    path = self._adapted_path(variant.method, sequence, user)
                    adapted.setdefault(path, RunFile("adapted", path, sources))
        return [*found, *(file for path, file in adapted.items() if path.exists())]

    # Merging

    def _merged_path(self, method: Method, user: str) -> Path:
        return self.workspace.path("merged", f"{user}-{method.name}")

    def _merge(self, method: Method, user: str, stage: str) -> Stage:
        """Write a method's merged model for a user; batch norm, if there is any, has the average of the experts."""
        evaluator = self.family.evaluator(method, user)
        assert isinstance(evaluator, MergeModule)
        sources = self.folder.checksums(self.family.sources(method, user))
        metadata = {"method": method.name, "user": user, "sources": sources}
        path = self._merged_path(method, user)
        save_tensors(path, evaluator.export(), kind="merged", metadata=metadata)
        return self.folder.finish(stage, artifacts=[path])

    # Adapting

    def _owner(self, method: str, sequence: AdaptationSequence, user: str) -> str:
        """The user, or ``server`` if the result is the same for all users."""
        return user if METHODS[method].personal or sequence.personal else "server"

    def _adapted_path(self, method: str, sequence: AdaptationSequence, user: str) -> Path:
        return self.workspace.path("adapted", f"{self._owner(method, sequence, user)}-{method}-{sequence.name}")

    def _sequences(self, variant: Variant) -> list[AdaptationSequence]:
        """The first step of the sequence, the first two, and so on; sequences that begin alike share their stages."""
        steps = self.experiment.sequence(variant).steps
        begun = [AdaptationSequence(steps[:count]) for count in range(1, len(steps) + 1)]
        return [sequence for sequence in begun if sequence.name != "none"]

    def _adapt_works(self, variant: Variant, user: str) -> Iterator[Work]:
        for sequence in self._sequences(variant):
            stage = f"adapt/{variant.method}/{sequence.name}/{self._owner(variant.method, sequence, user)}"
            yield self.workspace.work(stage, self._adapt, variant.method, sequence, user)

    def _adapt(self, method: str, sequence: AdaptationSequence, user: str, stage: str) -> Stage:
        """Write the entries that the last step of a sequence replaces, together with those of the steps before."""
        *before, last = sequence.steps
        evaluator = self._evaluator(method, AdaptationSequence(tuple(before)), user)
        trainer = self.workspace.lightning(stage)
        trainer.precision_plugin.convert_module(evaluator.network)  # in place
        evaluator.network.to(trainer.strategy.root_device)
        data = self.data.view(user=user)
        found = evaluator.adapt(
            AdaptationSequence((last,)), lambda task: _StageDevice(self.workspace, data, task, stage), seed=self.seed
        )
        entries = {cell: {**evaluator.entries.get(cell, {}), **own} for cell, own in found.items()}
        path = self._adapted_path(method, sequence, user)
        tensors = {
            f"model{t + 1}.task{i + 1}.{name}": value.cpu()
            for (t, i), own in entries.items()
            for name, value in own.items()
        }
        metadata = {"stage": stage, "method": method, "adaptation": sequence.name, "cells": [list(c) for c in entries]}
        save_tensors(path, tensors, kind=ADAPTED_KIND, metadata=metadata)
        return self.folder.finish(stage, artifacts=[path])

    def _evaluator(self, method: str, sequence: AdaptationSequence, user: str) -> SequenceEvaluator:
        """The models of a method for a user, with the entries of a sequence that was applied before."""
        evaluator = self.family.evaluator(METHODS[method], user)
        if sequence.steps and sequence.name != "none":
            evaluator.entries = dict(load_adapted(self._adapted_path(method, sequence, user)))
        evaluator.adaptation = AdaptationSequence(())
        return evaluator

    # Testing

    def _test_work(self, variant: Variant, user: str) -> Work:
        return self.workspace.work(f"test/{variant.label}/{user}", self._test, variant, user)

    def _test(self, variant: Variant, user: str, stage: str) -> Stage:
        evaluator = self._evaluator(variant.method, self.experiment.sequence(variant), user)
        self.workspace.lightning(stage).test(evaluator, datamodule=self.data.view(user=user), verbose=False)
        assert evaluator.matrix is not None
        rows = [[None if value != value else value for value in row] for row in evaluator.matrix.tolist()]
        result = {"method": variant.method, "adaptation": variant.adaptation, "user": user, "matrix": rows}
        return self.folder.finish(stage, result=result)


def load_adapted(path: Path) -> Mapping[Cell, Entries]:
    """The entries that an ``adapt`` stage wrote, by model and task, both from 0."""
    file = TensorFile(path, kind=ADAPTED_KIND)
    found: dict[Cell, Entries] = {(t, i): {} for t, i in file.metadata["cells"]}
    for name, value in file.load().items():
        model, task, entry = name.split(".", 2)
        found[int(model.removeprefix("model")) - 1, int(task.removeprefix("task")) - 1][entry] = value
    return found


class _StageDevice:
    """A user's device inside a stage: the data of the benchmark, and training by a Trainer of the stage."""

    def __init__(self, workspace: Workspace, data: TaskIncrementalDataModule, task: int, stage: str) -> None:
        self._workspace, self._data, self._task, self._stage = workspace, data, task, stage
        self._convert = workspace.lightning(stage).precision_plugin.convert_input

    @property
    def user(self) -> str | None:
        return self._data.user

    def images(self) -> Iterable[Any]:
        return self._data.adapt_dataloader(self._task)

    def labelled_images(self, seed: int) -> Iterable[Any]:
        return self._data.adapt_dataloader(
            self._task, labels=True, batch_size=self._data.batch_size, shuffle=True, seed=seed
        )

    def server_images(self, split: Literal["train", "val"] = "val") -> Iterable[Any]:
        return self._data.server_dataloader(self._task, split=split)

    def as_input(self, batch: Any) -> Any:
        return self._convert(as_input(batch))

    def train(
        self,
        network: TaskNetwork,
        *,
        epochs: int,
        lr: float,
        seed: int,
        model: int,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        learner = TaskLearner(network, seed=seed, task=self._task, lr=lr, l2_transfer=0.0)
        name = f"{self._stage}/model{model + 1}-task{self._task + 1}"
        trainer = self._workspace.lightning(name, callbacks, max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(learner, self.labelled_images(seed))
        refuse_divergence(name, network, "learning rate of the adaptation")
