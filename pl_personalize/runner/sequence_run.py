"""Models in sequence: each begins where the one before it ended, with a head for its task."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Callback
from torch import Tensor, nn
from typing_extensions import override

from pl_personalize.artifacts import save_tensors
from pl_personalize.callbacks import FisherImportance, MASImportance, ParameterPenalty
from pl_personalize.importance import Kind
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import LwFLearner, SequenceEvaluator, TaskLearner
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.runner.methods import MethodName, ServerMethod
from pl_personalize.runner.run_folder import Stage
from pl_personalize.runner.server_run import ServerRun
from pl_personalize.runner.stages import RunFile, Work
from pl_personalize.runner.trained import open_expert, part


class SequenceRun(ServerRun):
    """One model after the other; a subclass says how each is trained (:meth:`learner`)."""

    @override
    def training(self) -> Iterator[Work]:
        for task in range(self.num_tasks):
            yield self._work(f"train/task{task + 1}", self._train_task, task)

    @override
    def files(self) -> list[RunFile]:
        experts = [self.expert_path(task) for task in range(self.num_tasks)]
        return [RunFile("experts", path, experts[task - 1 : task]) for task, path in enumerate(experts)]

    def expert_path(self, task: int) -> Path:
        """The file of the model after a task (from 0)."""
        return self.path("checkpoints", f"task{task + 1}")

    @override
    def evaluator(self, method: MethodName, user: str, **options: Any) -> SequenceEvaluator:
        network = self._network(self.data.num_classes(0))
        models = [open_expert(self.expert_path(task)).load() for task in range(self.num_tasks)]
        bodies, heads = ([part(model, what) for model in models] for what in ("body", "head"))
        return SequenceEvaluator(
            network, bodies, heads, own_heads=self.own_heads(models), models=self.setting.models, **options
        )

    def own_heads(self, models: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, int], Mapping[str, Tensor]]:
        """Heads of earlier tasks that a model has changed, by model and task, both from 0."""
        return {}

    def learner(self, task: int, network: TaskNetwork, before: Mapping[str, Tensor] | None) -> TaskLearner:
        """What trains the network, which has the body of the model ``before`` (a state dict) and a new head."""
        return TaskLearner(network, **self.learner_options(task), l2_transfer=0.0)

    def callbacks(self, task: int, before: Mapping[str, Tensor] | None) -> list[Callback]:
        """For the Trainer."""
        return []

    def _train_task(self, task: int, stage: str) -> Stage:
        if task == 0 and (done := self._take_first_model(stage)) is not None:
            return done
        network = self._network(self.data.num_classes(task), task)
        before = None
        if task > 0:
            before = open_expert(self.expert_path(task - 1)).load()
            network.body.load_state_dict(part(before, "body"))
        learner = self.learner(task, network, before)
        data, path = self.data.view(task=task), self.expert_path(task)
        return self._train(stage, learner, data, path, self.callbacks(task, before))

    @override
    def forget_interrupted(self) -> None:
        stage = f"{self.name}/train/task1"
        begun = self.expert_path(0).with_suffix("")
        if self.folder.finished(stage) is None and self._first_model_of_others(stage) is not None and begun.exists():
            shutil.rmtree(begun)  # it is not resumed, but taken over
        super().forget_interrupted()

    def _first_model_of_others(self, stage: str) -> str | None:
        """The stage in which another method with this seed has trained the first model, which is the same for all."""
        others = [server for server in get_args(ServerMethod) if server not in (self.server, "Joint")]
        stages = [stage.replace(self.name, f"{server}/seed{self.seed}", 1) for server in others]
        return next((other for other in stages if self.folder.finished(other) is not None), None)

    def _take_first_model(self, stage: str) -> Stage | None:
        other = self._first_model_of_others(stage)
        found = None if other is None else self.folder.finished(other)
        if found is None:
            return None
        for record in self.log.read():
            if record.stage == other:
                self.log.append(record._replace(stage=stage))
        path, metadata = self.expert_path(0), found.result | {"stage": stage, "taken_from": other}
        source = open_expert(self.folder.path / next(iter(found.artifacts)))
        save_tensors(path, source.load(), kind=EXPERT_KIND, metadata=metadata)
        return self.folder.finish(stage, artifacts=[path], result=metadata)


class FinetuneRun(SequenceRun):
    """One task after the other, and nothing against forgetting."""

    server = "Finetune"


class PenaltyRun(SequenceRun):
    """Each model is pulled to the one before, each parameter as far as it was important for the tasks so far."""

    kind: Kind

    @property
    def strength(self) -> float:
        """λ."""
        raise NotImplementedError

    @override
    def training(self) -> Iterator[Work]:
        for task, work in enumerate(super().training()):
            yield work
            if task < self.num_tasks - 1:  # nothing is trained after the last
                yield self._work(f"importance/server/{self.kind}/task{task + 1}", self._estimate_task, task)

    @override
    def files(self) -> list[RunFile]:
        found = super().files()
        for task in range(self.num_tasks - 1):
            found.append(RunFile("importances", self.importance_path(task), [self.expert_path(task)]))
        return found

    def importance_path(self, task: int) -> Path:
        """The file of the importances for a task (from 0)."""
        return self.path("importances", f"server-{self.kind}-task{task + 1}")

    @override
    def importance_files(self) -> list[tuple[str, int, Path]]:
        return [("server", task, self.importance_path(task)) for task in range(self.num_tasks - 1)]

    @override
    def callbacks(self, task: int, before: Mapping[str, Tensor] | None) -> list[Callback]:
        if before is None:
            return []
        importances = [self.importance_path(earlier) for earlier in range(task)]
        return [ParameterPenalty(self.strength, importances, part(before, "body"), module="network.body")]

    def _estimate_task(self, task: int, stage: str) -> Stage:
        """On the task's training images, in batches of the training's size, which count for the published estimate."""
        path = self.importance_path(task)
        network = self._network(self.data.num_classes(task), task)
        network.load_state_dict(open_expert(self.expert_path(task)).load())
        options: dict[str, Any] = {
            "module": "network.body",
            "dirpath": path.parent,
            "filename": path.stem,
            "reduction": self.setting.importance.reduction,
        }
        callback = MASImportance(**options) if self.kind == "mas" else FisherImportance(labels="true", **options)
        loader = self.data.server_dataloader(task, "train", batch_size=self.data.batch_size)
        self._lightning(stage, [callback]).predict(TaskLearner(network), loader, return_predictions=False)
        return self.folder.finish(stage, artifacts=[path])


class MASRun(PenaltyRun):
    """Memory Aware Synapses (Aljundi et al., ECCV 2018)."""

    server, kind = "MAS", "mas"

    @property
    @override
    def strength(self) -> float:
        return self.setting.baselines.mas_strength


class EWCRun(PenaltyRun):
    """Elastic weight consolidation (Kirkpatrick et al., PNAS 2017)."""

    server, kind = "EWC", "empirical_fisher"

    @property
    @override
    def strength(self) -> float:
        """λ; the published code squares a batch's *summed* gradient, where ``reduction="batch"`` has the mean."""
        times = self.data.batch_size if self.setting.importance.reduction == "batch" else 1
        return self.setting.baselines.ewc_strength * times


class LwFRun(SequenceRun):
    """Learning without Forgetting (Li and Hoiem, ECCV 2016): a growing list of heads, all trained with each task."""

    server = "LwF"

    @override
    def learner(self, task: int, network: TaskNetwork, before: Mapping[str, Tensor] | None) -> TaskLearner:
        heads: list[nn.Module] = []
        for earlier in range(task):
            assert before is not None
            head = self._network(self.data.num_classes(earlier), earlier).head
            head.load_state_dict(self._head(before, earlier, task - 1))
            heads.append(head)
        baselines = self.setting.baselines
        return LwFLearner(
            network,
            heads,
            strength=baselines.lwf_strength,
            temperature=baselines.lwf_temperature,
            **self.learner_options(task),
        )

    @override
    def own_heads(self, models: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, int], Mapping[str, Tensor]]:
        return {(t, i): self._head(model, i, t) for t, model in enumerate(models) for i in range(t)}

    @staticmethod
    def _head(model: Mapping[str, Tensor], task: int, last: int) -> dict[str, Tensor]:
        """The head of a task in the model after task ``last``, both from 0."""
        return part(model, "head" if task == last else f"old_heads.{task}")
