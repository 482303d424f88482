"""Experts, importances, merges and tests of one benchmark, stage by stage; finished stages are not done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.callbacks import FisherImportance, MASImportance
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.importance import Kind
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.runner.methods import BOUNDS, MERGE_METHODS, BoundName, MergeMethod, MethodName
from pl_personalize.runner.metrics_log import MetricsLog, StageLogger
from pl_personalize.runner.options import TrainerOptions, TrainingOptions
from pl_personalize.runner.run_folder import RunFolder, Stage

Matrix = list[list[float | None]]


class Work(NamedTuple):
    """A stage that may have to be done: its name, and what does it."""

    name: str
    run: Callable[[], Stage]


class _ResumePoint(ModelCheckpoint):
    """A checkpoint within an epoch; not at its last step, from where Lightning would go on without its validation."""

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args, **kwargs)


class SeedRun:
    """All stages of an experiment for one seed.

    Args:
        folder: Where results go.
        log: Where metrics go.
        datamodule: The benchmark.
        make_network: Makes the network for a number of classes; called with the global generator seeded.
        methods: What is compared.
        seed: Seed of initial parameters, order of the data, and sampled labels.
        training: How experts are trained.
        trainer: Passed on to Trainers.
        fisher_draws: Labels drawn for each sample in a Fisher information, or ``"all"``.
    """

    def __init__(
        self,
        folder: RunFolder,
        log: MetricsLog,
        datamodule: TaskIncrementalDataModule,
        make_network: Callable[[int], TaskNetwork],
        methods: Sequence[MethodName],
        seed: int,
        training: TrainingOptions,
        trainer: TrainerOptions,
        fisher_draws: int | Literal["all"] = "all",
    ) -> None:
        if unknown := [name for name in methods if name not in get_args(MethodName)]:
            raise MisconfigurationException(f"Unknown methods {unknown}; there are {', '.join(MERGE_METHODS)}.")
        self.folder, self.log, self.data, self.methods, self.seed = folder, log, datamodule, list(methods), seed
        self._make_network = make_network
        self._training, self._trainer, self._fisher_draws = training, trainer, fisher_draws
        self.num_tasks = len(datamodule.tasks)

    def stages(self) -> Iterator[Work]:
        """Every stage, in an order in which each finds what it needs."""
        for task in range(self.num_tasks):
            yield self._work(f"expert/task{task + 1}", self._train_expert, task)
        yield self._work("joint", self._train_joint)
        merges = [MERGE_METHODS[name] for name in self.methods]
        for owner in ("server", *self.data.users):
            source = "server" if owner == "server" else "user"
            kinds = sorted({m.kind for m in merges if m.kind is not None and m.source == source})
            for task in range(self.num_tasks if kinds else 0):
                for kind in kinds:
                    yield self._work(f"importance/{owner}/{kind}/task{task + 1}", self._estimate, owner, kind, task)
        for method in (*self.methods, *BOUNDS):
            for user in self.data.users:
                yield self._work(f"test/{method}/{user}", self._test, method, user)

    def matrix(self, method: MethodName | BoundName, user: str) -> Tensor:
        """The accuracies, model by task, in [0, 1]; NaN where there is none.

        Raises:
            KeyError: If that stage is not finished.
        """
        stage = self.folder.finished(self._name(f"test/{method}/{user}"))
        if stage is None:
            raise KeyError(f"test/{method}/{user} of seed {self.seed} is not finished.")
        rows: Matrix = stage.result["matrix"]
        return torch.tensor([[float("nan") if value is None else value for value in row] for row in rows])

    # Where things are

    def _name(self, stage: str) -> str:
        return f"seed{self.seed}/{stage}"

    def _work(self, stage: str, run: Callable[..., Stage], *args: Any) -> Work:
        return Work(self._name(stage), lambda: run(*args, self._name(stage)))

    def _path(self, room: str, name: str) -> Path:
        return self.folder.path / room / f"seed{self.seed}" / f"{name}.safetensors"

    def expert_path(self, task: int) -> Path:
        """The file of a task's expert (task from 0)."""
        return self._path("checkpoints", f"task{task + 1}")

    def importance_path(self, owner: str, kind: Kind, task: int) -> Path:
        """The file of an owner's importances for a task's expert (task from 0)."""
        return self._path("importances", f"{owner}-{kind}-task{task + 1}")

    # The stages

    def _lightning(self, stage: str, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        return Trainer(
            **asdict(self._trainer),
            devices=1,
            logger=StageLogger(self.log, stage),
            callbacks=list(callbacks),
            default_root_dir=self.folder.path,
            enable_model_summary=False,
            **options,
        )

    def _network(self, num_classes: int, *purpose: str | int) -> TaskNetwork:
        """The initial network: for each seed one body, whatever the task and method."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, "body"))
            network = self._make_network(num_classes)
            torch.manual_seed(derive_seed(self.seed, "head", *purpose))
            network.new_head(num_classes)
        return network

    def _load_expert(self, task: int) -> TaskNetwork:
        network = self._network(self.data.num_classes(task), task)
        network.load_state_dict(TensorFile(self.expert_path(task), kind=EXPERT_KIND).load())
        return network

    def _train_expert(self, task: int, stage: str) -> Stage:
        network = self._network(self.data.num_classes(task), task)
        anchor = None
        if task > 0:
            anchor = self._load_expert(task - 1).body.state_dict()
            network.body.load_state_dict(anchor)
        return self._train(stage, network, self.data.view(task=task), self.expert_path(task), task, anchor)

    def _train_joint(self, stage: str) -> Stage:
        network = self._network(self.data.num_classes(), "joint")
        return self._train(stage, network, self.data.view(), self._path("checkpoints", "joint"), self.num_tasks, None)

    def _train(
        self,
        stage: str,
        network: TaskNetwork,
        data: TaskIncrementalDataModule,
        path: Path,
        task: int,
        anchor: Mapping[str, Tensor] | None,
    ) -> Stage:
        options = asdict(self._training)
        epochs = options.pop("epochs")
        learner = TaskLearner(network, anchor=anchor, seed=self.seed, task=task, **options)
        scratch = path.with_suffix("")
        best = ModelCheckpoint(scratch, "best", monitor="val/acc", mode="max", enable_version_counter=False)
        interval = timedelta(seconds=30)
        last = _ResumePoint(scratch, "last", train_time_interval=interval, enable_version_counter=False)
        trainer = self._lightning(stage, [best, last], max_epochs=epochs, num_sanity_val_steps=0, log_every_n_steps=10)
        resume = scratch / "last.ckpt"
        trainer.fit(learner, datamodule=data, ckpt_path=resume if resume.exists() else None)
        learner.load_state_dict(torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"])
        accuracy = float(best.best_model_score or 0.0)
        metadata = {"stage": stage, "val_acc": accuracy}
        save_tensors(path, network.state_dict(), kind=EXPERT_KIND, metadata=metadata)
        done = self.folder.finish(stage, artifacts=[path], result=metadata | {"steps": trainer.global_step})
        shutil.rmtree(scratch)
        return done

    def _estimate(self, owner: str, kind: Kind, task: int, stage: str) -> Stage:
        path = self.importance_path(owner, kind, task)
        target: dict[str, Any] = {"module": "network.body", "dirpath": path.parent, "filename": path.stem}
        callback: MASImportance | FisherImportance
        if kind == "mas":
            callback = MASImportance(**target)
        else:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, owner, kind, task))
            callback = FisherImportance(draws=self._fisher_draws, generator=generator, **target)
        learner = TaskLearner(self._load_expert(task))
        trainer = self._lightning(stage, [callback])
        if owner == "server":
            trainer.predict(learner, self.data.server_dataloader(task), return_predictions=False)
        else:
            trainer.predict(learner, datamodule=self.data.view(task=task, user=owner), return_predictions=False)
        return self.folder.finish(stage, artifacts=[path])

    def _test(self, method: MethodName | BoundName, user: str, stage: str) -> Stage:
        evaluator = self._evaluator(method, user)
        trainer = self._lightning(stage)
        trainer.test(evaluator, datamodule=self.data.view(user=user), verbose=False)
        assert evaluator.matrix is not None
        rows: Matrix = [[None if value != value else value for value in row] for row in evaluator.matrix.tolist()]
        merged = []
        if isinstance(evaluator, MergeModule):
            path = self._path("merged", f"{user}-{method}")
            merged.append(
                save_tensors(path, evaluator.export(), kind="merged", metadata={"method": method, "user": user})
            )
        return self.folder.finish(stage, artifacts=merged, result={"matrix": rows})

    def _evaluator(self, method: MethodName | BoundName, user: str) -> SequenceEvaluator:
        network = self._network(self.data.num_classes(0))
        experts = [TensorFile(self.expert_path(task), kind=EXPERT_KIND) for task in range(self.num_tasks)]
        if method == "Joint":
            joint = TensorFile(self._path("checkpoints", "joint"), kind=EXPERT_KIND).load()
            body, head = _part(joint, "body"), _part(joint, "head")
            sizes = [self.data.num_classes(task) for task in range(self.num_tasks)]
            parts = {name: torch.split(value, sizes) for name, value in head.items()}
            heads = [{name: value[task] for name, value in parts.items()} for task in range(self.num_tasks)]
            return SequenceEvaluator(network, [body] * self.num_tasks, heads, models="last")
        if method == "Experts":
            loaded = [expert.load() for expert in experts]
            return SequenceEvaluator(network, [_part(e, "body") for e in loaded], [_part(e, "head") for e in loaded])
        merge: MergeMethod = MERGE_METHODS[method]
        if merge.kind is None:
            return MergeModule(network, experts)
        owner = user if merge.source == "user" else "server"
        paths = [self.importance_path(owner, merge.kind, task) for task in range(self.num_tasks)]
        return MergeModule(network, experts, paths)


def _part(state: Mapping[str, Tensor], module: Literal["body", "head"]) -> dict[str, Tensor]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
