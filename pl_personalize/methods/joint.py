"""Joint: one model on the data of all tasks at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from typing_extensions import override

from pl_personalize.functional.state_dicts import PrefixView
from pl_personalize.methods.method import Family, Method
from pl_personalize.modules import SequenceEvaluator, TaskLearner
from pl_personalize.stages.run_folder import Stage
from pl_personalize.stages.work import RunFile, Work
from pl_personalize.stages.workspace import load_expert


class JointFamily(Family):
    """One model on the data of all tasks at once, tested with the logits of the task at hand."""

    name = "Joint"
    needs_one_shape = True

    @override
    def stages(self) -> Iterator[Work]:
        path = self.workspace.path("checkpoints", "all")
        yield self.workspace.work("train/all", self._train_joint, checkpoints=path.with_suffix(""))

    @override
    def models(self) -> list[RunFile]:
        return [RunFile("experts", self.workspace.path("checkpoints", "all"), [])]

    def _train_joint(self, stage: str) -> Stage:
        network = self.workspace.network(self.data.num_classes(), "joint")
        learner = TaskLearner(network, **self.workspace.learner_options(self.num_tasks), l2_transfer=0.0)
        return self.workspace.train(stage, learner, self.data.view(), self.workspace.path("checkpoints", "all"))

    @override
    def evaluator(self, method: Method, user: str) -> SequenceEvaluator:
        model = load_expert(self.workspace.path("checkpoints", "all"))
        sizes = [self.data.num_classes(task) for task in range(self.num_tasks)]
        rows = {name: torch.split(value, sizes) for name, value in PrefixView(model, "head").items()}
        heads = [{name: value[task] for name, value in rows.items()} for task in range(self.num_tasks)]
        bodies = [PrefixView(model, "body")] * self.num_tasks
        network = self.workspace.network(self.data.num_classes(0))
        return SequenceEvaluator(network, bodies, heads, models="last")


JOINT = Method("Joint", JointFamily, "one model on all data", bound="one model trained on all tasks at once")
