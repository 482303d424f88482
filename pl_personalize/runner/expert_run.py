"""Experts in sequence, and their merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from pl_personalize.artifacts import save_tensors
from pl_personalize.callbacks import FisherImportance, MASImportance, ParameterPenalty
from pl_personalize.estimation import estimate_importance
from pl_personalize.functional.merging import Zero
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.importance import Importance, Kind
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.runner.methods import METHODS, MethodName
from pl_personalize.runner.run_folder import Stage
from pl_personalize.runner.sequence_run import SequenceRun
from pl_personalize.runner.stages import RunFile, Work
from pl_personalize.runner.trained import open_expert, part, refuse_divergence

SERVER = "server"


class ExpertRun(SequenceRun):
    """One expert after the other, each pulled to the one before; then importances, merges and tests."""

    server = "IMM"

    @override
    def learner(self, task: int, network: TaskNetwork, before: Mapping[str, Tensor] | None) -> TaskLearner:
        strength = self.setting.training.l2_transfer
        if strength == "reference":
            strength = 0.0 if task == 1 else 1.0
        anchor = None if before is None else part(before, "body")
        return TaskLearner(network, anchor=anchor, l2_transfer=strength, **self.learner_options(task))

    @override
    def callbacks(self, task: int, before: Mapping[str, Tensor] | None) -> list[Callback]:
        if self.setting.training.l2_transfer == "reference" and task > 1:
            return [ParameterPenalty(1.0, module="network.head", log_name=None)]
        return []

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
    def importance_files(self) -> list[tuple[str, int, Path]]:
        return [(owner, task, self.importance_path(owner, kind, task)) for owner, kind, task in self.estimates()]

    @override
    def tuning(self) -> Iterator[Work]:
        if any(METHODS[method].tunes for method in self.methods):
            for user in self.data.users:
                for task in range(self.num_tasks):
                    yield self._work(f"tune/{user}/task{task + 1}", self._tune, user, task)

    @override
    def files(self) -> list[RunFile]:
        experts, found = [self.expert_path(task) for task in range(self.num_tasks)], super().files()
        for owner, kind, task in self.estimates():
            found.append(RunFile("importances", self.importance_path(owner, kind, task), [experts[task]]))
        for method in self.methods:
            for user in self.data.users:
                if METHODS[method].merges:
                    found.append(RunFile("merged", self.merged_path(method, user), self.sources(method, user)))
                if METHODS[method].tunes:
                    found += [RunFile("experts", self.tuned_path(user, t), [path]) for t, path in enumerate(experts)]
        return found

    def tuned_path(self, user: str, task: int) -> Path:
        """The file of a task's expert (task from 0) that was trained further for a user."""
        return self.path("finetuned", f"{user}-task{task + 1}")

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
        if METHODS[method].merges:
            experts = [open_expert(self.expert_path(task)) for task in range(self.num_tasks)]
            zero: Zero = "reference" if self.setting.importance.reduction == "batch" else "mean"
            return MergeModule(
                network,
                experts,
                self._importance_paths(method, user) or None,
                zero=zero,
                models=self.setting.models,
                **options,
            )
        paths = self.tuned_path if METHODS[method].tunes else lambda _, task: self.expert_path(task)
        loaded = [open_expert(paths(user, task)).load() for task in range(self.num_tasks)]
        bodies, heads = ([part(expert, what) for expert in loaded] for what in ("body", "head"))
        return SequenceEvaluator(network, bodies, heads, models="own", **options)  # each is for its task

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

    def _tune(self, user: str, task: int, stage: str) -> Stage:
        """Train an expert on a user's labelled images, without a look at those that test it: keep the last model."""
        options = self.setting.baselines
        seed = derive_seed(self.seed, "FT", user, task)
        fixed = {"lr": options.ft_lr, "momentum": 0.9, "weight_decay": 0.0, "seed": seed}
        learner = TaskLearner(self._load_expert(task), l2_transfer=0.0, **self.learner_options(task) | fixed)
        data = self.data.view(user=user)
        loader = data.adapt_dataloader(task, labels=True, batch_size=data.batch_size, shuffle=True, seed=seed)
        trainer = self._lightning(stage, max_epochs=options.ft_epochs, enable_checkpointing=False)
        trainer.fit(learner, loader)
        refuse_divergence(stage, learner.network, "baselines.ft_lr")
        path = self.tuned_path(user, task)
        save_tensors(path, learner.model_state(), kind=EXPERT_KIND, metadata={"stage": stage, "user": user})
        return self.folder.finish(stage, artifacts=[path])

    def _estimate(self, owner: str, kind: Kind, task: int, stage: str) -> Stage:
        path = self.importance_path(owner, kind, task)
        options = self.setting.importance
        if owner == SERVER and (kind, options.reduction) == ("fisher", "batch"):
            self._estimate_published(task, stage).save(path)
            return self.folder.finish(stage, artifacts=[path])
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
            callback = FisherImportance(draws=draws, generator=self._label_generator(owner, task), **target)
        learner = TaskLearner(self._load_expert(task))
        trainer = self._lightning(stage, [callback])
        if owner == SERVER:
            trainer.predict(learner, self.data.server_dataloader(task), return_predictions=False)
        else:
            trainer.predict(learner, datamodule=self.data.view(task=task, user=owner), return_predictions=False)
        return self.folder.finish(stage, artifacts=[path])

    def _label_generator(self, owner: str, task: int) -> torch.Generator:
        """Draws the labels for a Fisher information."""
        return torch.Generator().manual_seed(derive_seed(self.seed, owner, "fisher", task))

    def _estimate_published(self, task: int, stage: str) -> Importance:
        """As the published code for FIM-IMM: the mean over batches of train and that of val, added."""
        network = self._load_expert(task).to(self._lightning(stage).strategy.root_device)
        generator = self._label_generator(SERVER, task)
        train, val = (
            estimate_importance(
                network,
                self.data.server_dataloader(task, split),
                "fisher",
                module="body",
                reduction="batch",
                generator=generator,
            )
            for split in ("train", "val")
        )
        values = {name: value + (val[name] - 1e-8) for name, value in train.items()}  # the floor is there once
        samples = train.num_samples + val.num_samples
        return Importance(values, kind="fisher", num_samples=samples, reduction="batch", routes=train.routes)
