"""Experts in sequence, and their merges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from pl_personalize.callbacks import FisherImportance, MASImportance
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.importance import Kind
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.runner.methods import METHODS, MethodName
from pl_personalize.runner.run_folder import Stage
from pl_personalize.runner.server_run import RunFile, ServerRun, Work, open_expert, part

SERVER = "server"


class ExpertRun(ServerRun):
    """One expert after the other, each pulled to the one before; then importances, merges and tests."""

    server = "IMM"

    @override
    def training(self) -> Iterator[Work]:
        for task in range(self.num_tasks):
            yield self._work(f"train/task{task + 1}", self._train_expert, task)

    @override
    def importances(self) -> Iterator[Work]:
        for owner, kind, task in self.estimates():
            yield self._work(f"importance/{owner}/{kind}/task{task + 1}", self._estimate, owner, kind, task)

    def estimates(self) -> Iterator[tuple[str, Kind, int]]:
        """What the methods need: whose importances, of which kind, for which task's expert (from 0)."""
        methods = [METHODS[name] for name in self.methods]
        for owner in (SERVER, *self.data.users):
            source = "server" if owner == SERVER else "user"
            kinds = sorted({m.kind for m in methods if m.kind is not None and m.source == source})
            for task in range(self.num_tasks):
                for kind in kinds:
                    yield owner, kind, task

    @override
    def files(self) -> list[RunFile]:
        experts = [self.expert_path(task) for task in range(self.num_tasks)]
        found = [RunFile("experts", path, experts[task - 1 : task]) for task, path in enumerate(experts)]
        for owner, kind, task in self.estimates():
            found.append(RunFile("importances", self.importance_path(owner, kind, task), [experts[task]]))
        for method in self.methods:
            if METHODS[method].merges:
                for user in self.data.users:
                    found.append(RunFile("merged", self.merged_path(method, user), self.sources(method, user)))
        return found

    def expert_path(self, task: int) -> Path:
        """The file of a task's expert (task from 0)."""
        return self.path("checkpoints", f"task{task + 1}")

    def importance_path(self, owner: str, kind: Kind, task: int) -> Path:
        """The file of an owner's importances for a task's expert (task from 0)."""
        return self.path("importances", f"{owner}-{kind}-task{task + 1}")

    @override
    def sources(self, method: MethodName, user: str) -> list[Path]:
        experts = [self.expert_path(task) for task in range(self.num_tasks)]
        return [*experts, *self._importance_paths(method, user)]

    @override
    def evaluator(self, method: MethodName, user: str, **options: Any) -> SequenceEvaluator:
        network = self._network(self.data.num_classes(0))
        experts = [open_expert(self.expert_path(task)) for task in range(self.num_tasks)]
        if METHODS[method].merges:
            return MergeModule(network, experts, self._importance_paths(method, user) or None, **options)
        loaded = [expert.load() for expert in experts]
        bodies, heads = ([part(expert, what) for expert in loaded] for what in ("body", "head"))
        return SequenceEvaluator(network, bodies, heads, **options)

    def _importance_paths(self, name: MethodName, user: str) -> list[Path]:
        method = METHODS[name]
        if method.kind is None:
            return []
        owner = user if method.source == "user" else SERVER
        return [self.importance_path(owner, method.kind, task) for task in range(self.num_tasks)]

    def _load_expert(self, task: int) -> TaskNetwork:
        network = self._network(self.data.num_classes(task), task)
        network.load_state_dict(open_expert(self.expert_path(task)).load())
        return network

    def _train_expert(self, task: int, stage: str) -> Stage:
        network = self._network(self.data.num_classes(task), task)
        anchor = None
        if task > 0:
            anchor = self._load_expert(task - 1).body.state_dict()
            network.body.load_state_dict(anchor)
        return self._train(stage, network, self.data.view(task=task), self.expert_path(task), task, anchor)

    def _estimate(self, owner: str, kind: Kind, task: int, stage: str) -> Stage:
        path = self.importance_path(owner, kind, task)
        options = self.setting.importance
        target: dict[str, Any] = {
            "module": "network.body",
            "dirpath": path.parent,
            "filename": path.stem,
            "reduction": options.reduction,
        }
        callback: MASImportance | FisherImportance
        if kind == "mas":
            callback = MASImportance(**target)
        else:
            draws = options.fisher_draws if options.reduction == "sample" else 1
            generator = torch.Generator().manual_seed(derive_seed(self.seed, owner, kind, task))
            callback = FisherImportance(draws=draws, generator=generator, **target)
        learner = TaskLearner(self._load_expert(task))
        trainer = self._lightning(stage, [callback])
        if owner == SERVER:
            trainer.predict(learner, self.data.server_dataloader(task), return_predictions=False)
        else:
            trainer.predict(learner, datamodule=self.data.view(task=task, user=owner), return_predictions=False)
        return self.folder.finish(stage, artifacts=[path])
