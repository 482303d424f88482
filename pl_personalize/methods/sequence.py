"""Families that train one model after the other: each begins where the one before it ended, with a new head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from pl_personalize.callbacks import ParameterPenalty
from pl_personalize.callbacks.importance_callback import ImportanceCallback
from pl_personalize.functional.importance_kinds import IMPORTANCE_KINDS
from pl_personalize.functional.state_dicts import PrefixView
from pl_personalize.methods.method import Family, Method
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import SequenceEvaluator, TaskLearner
from pl_personalize.stages.run_folder import Stage
from pl_personalize.stages.work import RunFile, Work
from pl_personalize.stages.workspace import Workspace, load_expert


class KindImportance(ImportanceCallback):
    """Estimates importances of any registered kind.

    Args:
        kind: Name of the kind.
        draws: Labels drawn per sample, or ``"all"``; for kinds that draw labels.
        generator: Draws the labels.
        options: Options of all importance callbacks.

    Raises:
        ValueError: If the kind is not registered.
    """

    def __init__(
        self,
        kind: str,
        *,
        draws: int | Literal["all"] = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        self.kind = IMPORTANCE_KINDS.find(kind).name
        super().__init__(**options)
        if "draws" in IMPORTANCE_KINDS[kind].options:
            self._options |= {"draws": draws, "generator": generator}


class SequenceFamily(Family):
    """Base class for families of one model after the other; a subclass says how each is trained."""

    shares_first: ClassVar[bool] = False
    """Whether the model of the first task is that of plain training, so that families share its stage."""

    @override
    def stages(self) -> Iterator[Work]:
        for task in range(self.num_tasks):
            yield self.train_work(task)

    def train_work(self, task: int) -> Work:
        """The stage that trains the model of a task (from 0)."""
        checkpoints = self.expert_path(task).with_suffix("")
        return self._place(task).work(f"train/task{task + 1}", self._train_task, task, checkpoints=checkpoints)

    @override
    def models(self) -> list[RunFile]:
        paths = [self.expert_path(task) for task in range(self.num_tasks)]
        return [RunFile("experts", path, paths[task - 1 : task] if task else []) for task, path in enumerate(paths)]

    def expert_path(self, task: int) -> Path:
        """The file of the model after a task (from 0)."""
        return self._place(task).path("checkpoints", f"task{task + 1}")

    def _place(self, task: int) -> Workspace:
        return self.workspace.shared("first") if task == 0 and self.shares_first else self.workspace

    @override
    def evaluator(self, method: Method, user: str) -> SequenceEvaluator:
        models = [load_expert(self.expert_path(task)) for task in range(self.num_tasks)]
        bodies, heads = ([PrefixView(model, part) for model in models] for part in ("body", "head"))
        return SequenceEvaluator(
            self.workspace.network(self.data.num_classes(0)),
            bodies,
            heads,
            own_heads=self.own_heads(models),
            models="own" if method.one_each else self.workspace.models,  # type: ignore[arg-type]
        )

    def own_heads(self, models: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, int], Mapping[str, Tensor]]:
        """Heads of earlier tasks that a model has changed, by model and task, both from 0."""
        return {}

    def learner(self, task: int, network: TaskNetwork, before: Mapping[str, Tensor] | None) -> TaskLearner:
        """Trains the network, which has the body of the model ``before`` (a state dict) and a new head."""
        return TaskLearner(network, **self.workspace.learner_options(task), l2_transfer=0.0)

    def callbacks(self, task: int, before: Mapping[str, Tensor] | None) -> list[Callback]:
        """Callbacks of the Trainer."""
        return []

    def load_network(self, task: int) -> TaskNetwork:
        """The trained model of a task (from 0)."""
        network = self.workspace.network(self.data.num_classes(task), task)
        network.load_state_dict(load_expert(self.expert_path(task)))
        return network

    def _train_task(self, task: int, stage: str) -> Stage:
        network = self.workspace.network(self.data.num_classes(task), task)
        before = None
        if task > 0:
            before = load_expert(self.expert_path(task - 1))
            network.body.load_state_dict(PrefixView(before, "body"))
        learner = self.learner(task, network, before)
        data, path = self.data.view(task=task), self.expert_path(task)
        return self.workspace.train(stage, learner, data, path, self.callbacks(task, before))


class PenaltyFamily(SequenceFamily):
    """Base class: each model is pulled to the one before, each parameter by its importance for the tasks so far."""

    kind: ClassVar[str]
    """The kind of importances."""
    shares_first = True

    @property
    @abstractmethod
    def strength(self) -> float:
        """λ, without a factor 1/2."""

    @override
    def stages(self) -> Iterator[Work]:
        for task in range(self.num_tasks):
            yield self.train_work(task)
            if task < self.num_tasks - 1:  # nothing is trained after the last
                stage = f"importance/server/{self.kind}/task{task + 1}"
                yield self.workspace.work(stage, self._estimate_task, task)

    @override
    def importances(self) -> list[tuple[str, int, RunFile]]:
        tasks = range(self.num_tasks - 1)
        return [
            ("server", task, RunFile("importances", self.importance_path(task), [self.expert_path(task)]))
            for task in tasks
        ]

    def importance_path(self, task: int) -> Path:
        """The file of the importances for a task (from 0)."""
        return self.workspace.path("importances", f"server-{self.kind}-task{task + 1}")

    @override
    def callbacks(self, task: int, before: Mapping[str, Tensor] | None) -> list[Callback]:
        if before is None:
            return []
        importances = [self.importance_path(earlier) for earlier in range(task)]
        return [ParameterPenalty(self.strength, importances, PrefixView(before, "body"), module="network.body")]

    def _estimate_task(self, task: int, stage: str) -> Stage:
        """On the training images, in batches of the training's size, which the published estimate depends on."""
        path = self.importance_path(task)
        callback = KindImportance(
            self.kind,
            module="network.body",
            dirpath=path.parent,
            filename=path.stem,
            reduction=self.workspace.importance.reduction,
        )
        loader = self.data.server_dataloader(task, "train", batch_size=self.data.batch_size)
        trainer = self.workspace.lightning(stage, [callback])
        trainer.predict(TaskLearner(self.load_network(task)), loader, return_predictions=False)
        return self.workspace.folder.finish(stage, artifacts=[path])
