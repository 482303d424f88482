"""What one server method does with one seed: training, importances and tests, stage by stage."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from pl_personalize.adaptation import adapt_batchnorm
from pl_personalize.artifacts import save_tensors
from pl_personalize.batchnorm import ARTIFACT_KIND as BATCHNORM_KIND
from pl_personalize.callbacks import AdaBNS
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.modules.batchnorm_policy import affine_names, statistics_names
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.runner.checkpoints import Checkpoints, load_checkpoint
from pl_personalize.runner.methods import (
    ADAPTATIONS,
    METHODS,
    MethodName,
    ServerMethod,
    Variant,
    variants,
)
from pl_personalize.runner.metrics_log import MetricsLog, StageLogger
from pl_personalize.runner.run_folder import Stage
from pl_personalize.runner.stages import RunFile, Setting, Work
from pl_personalize.runner.trained import refuse_divergence

Matrix = list[list[float | None]]
Entries = Mapping[tuple[int, int], Mapping[str, Tensor]]
"""Of the body of model t on task i (both from 0), what replaces its own entries."""


class ServerRun(ABC):
    """All stages of one server method with one seed; finished ones are not done again.

    A subclass says how models are trained (:meth:`training`), and what is tested (:meth:`evaluator`).

    Args:
        setting: What the runs of a call have in common.
        methods: What is tested; methods of this server method.
        seed: Seed of initial parameters, order of the data, and sampled labels.
    """

    server: ClassVar[ServerMethod]

    def __init__(self, setting: Setting, methods: Sequence[MethodName], seed: int) -> None:
        self.setting, self.methods, self.seed = setting, list(methods), seed
        self.variants = variants(self.methods, setting.adaptations)
        self.folder = setting.folder
        self.data = setting.data.view(seed=seed)
        self.log = MetricsLog(self.folder.metrics_file)
        self.num_tasks = len(self.data.tasks)
        self._recalibrated: dict[MethodName, Entries] = {}
        if wrong := [name for name in methods if METHODS[name].server != self.server]:
            raise ValueError(f"{type(self).__name__} cannot test {wrong}.")

    @property
    def name(self) -> str:
        """What the run's stages and files begin with."""
        return f"{self.server}/seed{self.seed}"

    @abstractmethod
    def training(self) -> Iterator[Work]:
        """The stages of training, in order."""

    @abstractmethod
    def evaluator(self, method: MethodName, user: str, **options: Any) -> SequenceEvaluator:
        """What is tested for a user.

        Args:
            method: The method.
            user: The user.
            options: Of the evaluator: ``bn_policy``, ``bn_options``.
        """

    @abstractmethod
    def files(self) -> list[RunFile]:
        """The files of models and importances; each after those that it was made of."""

    def importances(self) -> Iterator[Work]:
        """The stages of estimating importances, if there are any."""
        return iter(())

    def tuning(self) -> Iterator[Work]:
        """The stages of training on the users' labelled images, if there are any."""
        return iter(())

    def importance_files(self) -> list[tuple[str, int, Path]]:
        """Importances that are estimated: whose, for which task's model (from 0), and the file."""
        return []

    def stages(self) -> Iterator[Work]:
        """Every stage, in an order in which each finds what it needs."""
        yield from self.training()
        yield from self.importances()
        yield from self.tuning()
        for method in self.methods:
            for user in self.data.users if METHODS[method].merges else ():
                yield self._work(f"merge/{method}/{user}", self._merge, method, user)
        for variant in self.variants:
            for user in self.data.users:
                yield self._work(f"test/{variant.label}/{user}", self._test, variant, user)

    def with_all_tested(self) -> Self:
        """The same run with every variant that is tested in its folder, also those that earlier calls asked for."""
        methods = [name for name, method in METHODS.items() if method.server == self.server]
        other = type(self)(self.setting, methods, self.seed)
        tests = {f"{self.name}/test/{v.label}": v for v in variants(methods, ADAPTATIONS)}
        users = self.data.users
        other.variants = [
            variant
            for stage, variant in tests.items()
            if all(self.folder.finished(f"{stage}/{user}") is not None for user in users)
        ]
        other.methods = [name for name in methods if any(v.method == name for v in other.variants)]
        return other

    def matrix(self, variant: Variant, user: str) -> Tensor:
        """The accuracies, model by task, in [0, 1]; NaN where there is none.

        Raises:
            KeyError: If that stage is not finished.
        """
        rows: Matrix = self.result(f"test/{variant.label}/{user}")["matrix"]
        return torch.tensor([[float("nan") if value is None else value for value in row] for row in rows])

    def result(self, stage: str) -> Any:
        """What a finished stage found.

        Raises:
            KeyError: If it is not finished.
        """
        found = self.folder.finished(f"{self.name}/{stage}")
        if found is None:
            raise KeyError(f"{self.name}/{stage} is not finished.")
        return found.result

    def validation(self) -> dict[str, float]:
        """The best validation accuracy of each trained model, in [0, 1], by the last part of its stage's name."""
        stages = [work.name.removeprefix(f"{self.name}/") for work in self.training() if work.kind == "train"]
        return {stage.rpartition("/")[2]: self.result(stage)["val_acc"] for stage in stages}

    def path(self, room: str, name: str) -> Path:
        """The file of that name of this run in a room of the folder, such as ``checkpoints``."""
        return self.folder.path / room / self.server / f"seed{self.seed}" / f"{name}.safetensors"

    # For subclasses

    def _work(self, stage: str, run: Callable[..., Stage], *args: Any) -> Work:
        name = f"{self.name}/{stage}"
        return Work(name, lambda: run(*args, name))

    def _lightning(self, stage: str, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        return Trainer(
            **asdict(self.setting.trainer) | options,
            devices=1,
            logger=StageLogger(self.log, stage),
            callbacks=list(callbacks),
            default_root_dir=self.folder.path,
            enable_model_summary=False,
        )

    def learner_options(self, task: int) -> dict[str, Any]:
        """What all learners have in common."""
        options = asdict(self.setting.training)
        del options["epochs"], options["l2_transfer"]
        return options | {"seed": self.seed, "task": task}

    def _network(self, num_classes: int, *purpose: str | int) -> TaskNetwork:
        """The initial network: for each seed one body, whatever the task and method."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, "body"))
            network = self.setting.make_network(num_classes)
            torch.manual_seed(derive_seed(self.seed, "head", *purpose))
            network.new_head(num_classes)
        return network

    def _train(
        self,
        stage: str,
        learner: TaskLearner,
        data: TaskIncrementalDataModule,
        path: Path,
        callbacks: Sequence[Callback] = (),
    ) -> Stage:
        """Train, resuming if it was interrupted, and keep the model with the best validation accuracy."""
        epochs = self.setting.training.epochs
        best = Checkpoints(path.with_suffix(""))
        every = min(self.setting.trainer.log_every_n_steps, len(data.train_dataloader()))  # once an epoch at least
        trainer = self._lightning(
            stage, [*callbacks, best], max_epochs=epochs, num_sanity_val_steps=0, log_every_n_steps=max(1, every)
        )
        trainer.fit(learner, datamodule=data, ckpt_path=best.resume if best.resume.exists() else None)
        refuse_divergence(stage, learner.network, "training.lr, or strength of a penalty")
        learner.load_state_dict(load_checkpoint(Path(best.best_model_path))["state_dict"])
        accuracy = float(best.best_model_score or 0.0)
        metadata = {"stage": stage, "val_acc": accuracy}
        save_tensors(path, learner.model_state(), kind=EXPERT_KIND, metadata=metadata)
        done = self.folder.finish(stage, artifacts=[path], result=metadata | {"steps": trainer.global_step})
        shutil.rmtree(path.with_suffix(""))
        return done

    def forget_interrupted(self) -> None:
        """Drop from the log what an interrupted stage had logged after the point from where it will go on."""
        for work in self.stages():
            if self.folder.finished(work.name) is None and work.kind != "train":
                self.log.drop(work.name, from_step=0)
            elif self.folder.finished(work.name) is None:
                resume = Checkpoints(self.path("checkpoints", work.name.rpartition("/")[2]).with_suffix("")).resume
                step = 0
                if resume.exists():
                    step = load_checkpoint(resume)["global_step"]
                self.log.drop(work.name, from_step=step)

    def _test(self, variant: Variant, user: str, stage: str) -> Stage:
        method, adaptation = variant.method, ADAPTATIONS[variant.adaptation]
        options = {"exact": self.setting.adaptation.exact, "prior_samples": self.setting.adaptation.prior_samples}
        evaluator = self.evaluator(method, user, bn_policy=adaptation.policy, bn_options=options)
        recalibrated = adaptation.policy == "recalibrate" and not METHODS[method].personal
        if adaptation.trains:
            evaluator = _with_entries(evaluator, self._train_batchnorm(evaluator, user, stage))
        elif recalibrated and method in self._recalibrated:
            evaluator = _with_entries(evaluator, self._recalibrated[method])
        self._lightning(stage).test(evaluator, datamodule=self.data.view(user=user), verbose=False)
        assert evaluator.matrix is not None
        if recalibrated:  # on the server's images: for a model that all users have, once
            self._recalibrated.setdefault(method, evaluator.statistics)
        rows: Matrix = [[None if value != value else value for value in row] for row in evaluator.matrix.tolist()]
        last, written = self.num_tasks - 1, []
        if variant.adaptation in ("AdaBN", "AdaBN-S") and METHODS[method].merges:  # what the user's device keeps
            for task in range(self.num_tasks):
                entries = evaluator.entries.get((last, task)) or evaluator.statistics[last, task]
                path = self.path("merged", f"{user}-{variant.label}-task{task + 1}")
                metadata = {"stage": stage, "num_samples": getattr(entries, "num_samples", 0), "fingerprint": None}
                written.append(save_tensors(path, entries, kind=BATCHNORM_KIND, metadata=metadata))
        return self.folder.finish(stage, artifacts=written, result={"matrix": rows})

    def _merge(self, method: MethodName, user: str, stage: str) -> Stage:
        """Write a method's merged model for a user; batch norm, if there is any, has the average of the experts."""
        evaluator = self.evaluator(method, user, bn_policy="average")
        assert isinstance(evaluator, MergeModule)
        sources = self.folder.checksums(self.sources(method, user))
        metadata = {"method": method, "user": user, "sources": sources}
        path = self.merged_path(method, user)
        save_tensors(path, evaluator.export(), kind="merged", metadata=metadata)
        return self.folder.finish(stage, artifacts=[path])

    def _train_batchnorm(
        self, evaluator: SequenceEvaluator, user: str, stage: str
    ) -> dict[tuple[int, int], dict[str, Tensor]]:
        """Batch norm adapted, then γ and β trained on the user's labelled images.

        Of each model on its task, and of the last on all: what average accuracy and forgetting need.
        """
        options, data = self.setting.adaptation, self.data.view(user=user)
        cells = [(t, i) for t, i in evaluator.cells if t in (i, self.num_tasks - 1)]
        bodies = evaluator.load_bodies()
        tuned: dict[tuple[int, int], dict[str, Tensor]] = {}
        for t, i in cells:
            network = self._network(data.num_classes(i))
            network.body.load_state_dict(bodies[t])
            network.head.load_state_dict(evaluator.head_of(t, i))
            adapt_batchnorm(network, data.adapt_dataloader(i), module="body", **evaluator.bn_options)
            seed = derive_seed(self.seed, "AdaBN-S", t, i)
            learner = TaskLearner(network, seed=seed, task=i, lr=options.lr, l2_transfer=0.0)
            loader = data.adapt_dataloader(i, labels=True, batch_size=data.batch_size, shuffle=True, seed=seed)
            name, epochs = f"{stage}/model{t + 1}-task{i + 1}", options.epochs
            trainer = self._lightning(name, [AdaBNS("keep")], max_epochs=epochs, enable_checkpointing=False)
            trainer.fit(learner, loader)
            refuse_divergence(name, network, "adaptation.lr")
            state = network.body.state_dict()
            names = [*statistics_names(network.body), *affine_names(network.body)]
            tuned[t, i] = {name: state[name].clone() for name in names}
        return tuned

    def merged_path(self, method: MethodName, user: str) -> Path:
        """The file of a method's merged model for a user."""
        return self.path("merged", f"{user}-{method}")

    def sources(self, method: MethodName, user: str) -> list[Path]:
        """The files that a method's model for a user is made of."""
        return []


def _with_entries(evaluator: SequenceEvaluator, entries: Entries) -> SequenceEvaluator:
    """The same models with other entries on each task."""
    return SequenceEvaluator(
        evaluator.network,
        evaluator.load_bodies(),
        evaluator.heads,
        models=evaluator.models,
        entries=entries,
        own_heads=evaluator.own_heads,
    )
