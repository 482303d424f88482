"""One model on the data of all tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import override

from pl_personalize.modules import SequenceEvaluator, TaskLearner
from pl_personalize.runner.methods import MethodName
from pl_personalize.runner.run_folder import Stage
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.stages import RunFile, Work
from pl_personalize.runner.trained import open_expert, part


class JointRun(ServerRun):
    """One model on the data of all tasks at once; tested with the logits of the task at hand."""

    server = "Joint"

    @override
    def training(self) -> Iterator[Work]:
        yield self._work("train/all", self._train_joint)

    @override
    def files(self) -> list[RunFile]:
        return [RunFile("experts", self.path("checkpoints", "all"), [])]

    def _train_joint(self, stage: str) -> Stage:
        network = self._network(self.data.num_classes(), "joint")
        learner = TaskLearner(network, **self.learner_options(self.num_tasks), l2_transfer=0.0)
        return self._train(stage, learner, self.data.view(), self.path("checkpoints", "all"))

    @override
    def evaluator(self, method: MethodName, user: str, **options: Any) -> SequenceEvaluator:
        network = self._network(self.data.num_classes(0))
        model = open_expert(self.path("checkpoints", "all")).load()
        sizes = [self.data.num_classes(task) for task in range(self.num_tasks)]
        rows = {name: torch.split(value, sizes) for name, value in part(model, "head").items()}
        heads = [{name: value[task] for name, value in rows.items()} for task in range(self.num_tasks)]
        return SequenceEvaluator(network, [part(model, "body")] * self.num_tasks, heads, models="last", **options)
