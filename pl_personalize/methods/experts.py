"""Experts trained in sequence: merged (IMM, RACL), fine-tuned (FT), or as they are (Experts)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from typing_extensions import override

from pl_personalize.callbacks import ParameterPenalty
from pl_personalize.estimation import estimate_importance
from pl_personalize.functional.importance_kinds import IMPORTANCE_KINDS
from pl_personalize.functional.merging import WEIGHTED
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.functional.state_dicts import PrefixView
from pl_personalize.importance import Importance
from pl_personalize.merging import MERGE_RULES
from pl_personalize.methods.method import Method
from pl_personalize.methods.sequence import KindImportance, SequenceFamily
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.stages.run_folder import Stage
from pl_personalize.stages.work import RunFile, Work
from pl_personalize.stages.workspace import open_expert

SERVER = "server"


@dataclass(frozen=True)
class Merge(Method):
    """A merge of the experts.

    Attributes:
        kind: Kind of the importances that weight the experts, or ``None`` for equal weights.
        rule: The merge rule, see :func:`~pl_personalize.merge`.

    Raises:
        ValueError: If the rule or the kind is unknown, or the importances need labels that users do not have.
    """

    kind: str | None = None
    rule: str = "weighted"

    def __post_init__(self) -> None:
        MERGE_RULES.find(self.rule)
        if self.kind is not None and "labels" in IMPORTANCE_KINDS.find(self.kind).options and self.personal:
            raise ValueError(
                f"{self.name}: {self.kind} importances need labels, and users' images have none. Use personal=False, "
                "or another kind."
            )


class ExpertsFamily(SequenceFamily):
    """One expert after the other, each pulled to the one before; then the importances of their parameters."""

    name = "experts"
    shares_first = True

    @override
    def learner(self, task: int, network: TaskNetwork, before: Mapping[str, Tensor] | None) -> TaskLearner:
        strength = self.workspace.training.l2_transfer
        if strength == "reference":
            strength = 0.0 if task == 1 else 1.0
        anchor = None if before is None else PrefixView(before, "body")
        return TaskLearner(network, anchor=anchor, l2_transfer=strength, **self.workspace.learner_options(task))

    @override
    def callbacks(self, task: int, before: Mapping[str, Tensor] | None) -> list[Callback]:
        if self.workspace.training.l2_transfer == "reference" and task > 1:
            return [ParameterPenalty(1.0, module="network.head", log_name=None)]
        return []

    @override
    def stages(self) -> Iterator[Work]:
        yield from super().stages()
        for owner, kind, task in self._estimates():
            stage = f"importance/{owner}/{kind}/task{task + 1}"
            yield self.workspace.work(stage, self._estimate, owner, kind, task)

    @override
    def importances(self) -> list[tuple[str, int, RunFile]]:
        return [
            (
                owner,
                task,
                RunFile("importances", self.importance_path(owner, kind, task), [self.expert_path(task)]),
            )
            for owner, kind, task in self._estimates()
        ]

    @override
    def sources(self, method: Method, user: str) -> list[Path]:
        return [*map(self.expert_path, range(self.num_tasks)), *self._importance_paths(method, user)]

    @override
    def evaluator(self, method: Method, user: str) -> SequenceEvaluator:
        if not isinstance(method, Merge):
            return super().evaluator(method, user)
        rule, network = MERGE_RULES.find(method.rule), self.workspace.network(self.data.num_classes(0))
        published = self.workspace.importance.reduction == "batch" and rule is WEIGHTED
        options: dict[str, Any] = {"zero": "reference"} if published else {}
        return MergeModule(
            network,
            [open_expert(self.expert_path(task)) for task in range(self.num_tasks)],
            self._importance_paths(method, user) or None,
            rule=rule.name,
            base=network.state_dict() if rule.needs_base else None,
            models=self.workspace.models,  # type: ignore[arg-type]
            **options,
        )

    def importance_path(self, owner: str, kind: str, task: int) -> Path:
        """The file of an owner's importances for a task's expert (task from 0)."""
        return self.workspace.path("importances", f"{owner}-{kind}-task{task + 1}")

    def _importance_paths(self, method: Method, user: str) -> list[Path]:
        if not isinstance(method, Merge) or method.kind is None:
            return []
        owner = user if method.personal else SERVER
        return [self.importance_path(owner, method.kind, task) for task in range(self.num_tasks)]

    def _estimates(self) -> Iterator[tuple[str, str, int]]:
        """The importances that the methods need: their owner, their kind, and the task (from 0) of the expert."""
        merges = [method for method in self.methods if isinstance(method, Merge)]
        for owner in (SERVER, *self.data.users):
            kinds = sorted({m.kind for m in merges if m.kind is not None and m.personal == (owner != SERVER)})
            for task in range(self.num_tasks):
                for kind in kinds:
                    yield owner, kind, task

    def _estimate(self, owner: str, kind: str, task: int, stage: str) -> Stage:
        path = self.importance_path(owner, kind, task)
        options = self.workspace.importance
        if owner == SERVER and (kind, options.reduction) == ("fisher", "batch"):
            self._estimate_published(task, stage).save(path)
            return self.workspace.folder.finish(stage, artifacts=[path])
        callback = KindImportance(
            kind,
            draws=options.fisher_draws if options.reduction == "sample" else 1,
            generator=self._label_generator(owner, task),
            module="network.body",
            dirpath=path.parent,
            filename=path.stem,
            reduction=options.reduction,
        )
        learner, trainer = TaskLearner(self.load_network(task)), self.workspace.lightning(stage, [callback])
        if owner == SERVER:
            trainer.predict(learner, self.data.server_dataloader(task), return_predictions=False)
        else:
            trainer.predict(learner, datamodule=self.data.view(task=task, user=owner), return_predictions=False)
        return self.workspace.folder.finish(stage, artifacts=[path])

    def _label_generator(self, owner: str, task: int) -> torch.Generator:
        """Draws the labels for a Fisher information."""
        return torch.Generator().manual_seed(derive_seed(self.workspace.seed, owner, "fisher", task))

    def _estimate_published(self, task: int, stage: str) -> Importance:
        """The published code's FIM-IMM: the mean over batches of train plus that of val."""
        network = self.load_network(task).to(self.workspace.lightning(stage).strategy.root_device)
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
        values = {name: value + (val[name] - 1e-8) for name, value in train.items()}  # the floor counts once
        samples = train.num_samples + val.num_samples
        return Importance(values, kind="fisher", num_samples=samples, reduction="batch", routes=train.routes)


def _merge(name: str, text: str, kind: str | None = None, *, personal: bool = False) -> Merge:
    weighted = kind is not None
    return Merge(name, ExpertsFamily, text, merges=True, personal=personal, needs_importances=weighted, kind=kind)


MAS_RACL = _merge("MAS-RACL", "experts weighted by MAS importances on the user's images", "mas", personal=True)
FIM_RACL = _merge("FIM-RACL", "experts weighted by Fisher importances on the user's images", "fisher", personal=True)
MAS_IMM = _merge("MAS-IMM", "experts weighted by MAS importances on the server's images", "mas")
FIM_IMM = _merge("FIM-IMM", "experts weighted by Fisher importances on the server's images", "fisher")
MEAN_IMM = _merge("mean-IMM", "plain mean of the experts")
FT = Method(
    "FT",
    ExpertsFamily,
    "experts fine-tuned on the user's labelled images",
    personal=True,
    one_each=True,
    then=("FT",),
    bound="each task with its expert, trained further on the user's labelled images",
)
EXPERTS = Method(
    "Experts",
    ExpertsFamily,
    "unmerged experts",
    one_each=True,
    bound="each task with its own unmerged expert",
)
