"""What one server method does with one seed: training, importances and tests, stage by stage."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import MergeModule, SequenceEvaluator, TaskLearner
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.runner.methods import METHODS, MethodName, ServerMethod
from pl_personalize.runner.metrics_log import MetricsLog, StageLogger
from pl_personalize.runner.options import ArtifactName, ImportanceOptions, TrainerOptions, TrainingOptions
from pl_personalize.runner.run_folder import RunFolder, Stage

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Setting:
    """What the runs of a call have in common.

    Attributes:
        folder: Where results go.
        data: The benchmark.
        make_network: Makes the network for a number of classes; called with the global generator seeded.
        training: How models are trained.
        importance: How importances are estimated.
        trainer: Passed on to Trainers.
    """

    folder: RunFolder
    data: TaskIncrementalDataModule
    make_network: Callable[[int], TaskNetwork]
    training: TrainingOptions
    importance: ImportanceOptions
    trainer: TrainerOptions


class RunFile(NamedTuple):
    """A file that a run made: what it is, where, and the run's files that it was made of."""

    what: ArtifactName
    path: Path
    sources: Sequence[Path]


class Work(NamedTuple):
    """A stage that may have to be done: its name, and what does it."""

    name: str
    run: Callable[[], Stage]

    @property
    def kind(self) -> str:
        """``train``, ``importance`` or ``test``."""
        return self.name.split("/")[2]


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
        self.folder = setting.folder
        self.data = setting.data.view(seed=seed)
        self.log = MetricsLog(self.folder.metrics_file)
        self.num_tasks = len(self.data.tasks)
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
    def evaluator(self, method: MethodName, user: str) -> SequenceEvaluator:
        """What is tested for a user."""

    @abstractmethod
    def files(self) -> list[RunFile]:
        """The files of models and importances; each after those that it was made of."""

    def importances(self) -> Iterator[Work]:
        """The stages of estimating importances, if there are any."""
        return iter(())

    def stages(self) -> Iterator[Work]:
        """Every stage, in an order in which each finds what it needs."""
        yield from self.training()
        yield from self.importances()
        for method in self.methods:
            for user in self.data.users:
                yield self._work(f"test/{method}/{user}", self._test, method, user)

    def matrix(self, method: MethodName, user: str) -> Tensor:
        """The accuracies, model by task, in [0, 1]; NaN where there is none.

        Raises:
            KeyError: If that stage is not finished.
        """
        rows: Matrix = self.result(f"test/{method}/{user}")["matrix"]
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
        stages = [work.name.removeprefix(f"{self.name}/") for work in self.training()]
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
            **asdict(self.setting.trainer),
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
            network = self.setting.make_network(num_classes)
            torch.manual_seed(derive_seed(self.seed, "head", *purpose))
            network.new_head(num_classes)
        return network

    def _train(
        self,
        stage: str,
        network: TaskNetwork,
        data: TaskIncrementalDataModule,
        path: Path,
        task: int,
        anchor: Mapping[str, Tensor] | None = None,
    ) -> Stage:
        """Train, resuming if it was interrupted, and keep the model with the best validation accuracy."""
        options = asdict(self.setting.training)
        epochs = options.pop("epochs")
        learner = TaskLearner(network, anchor=anchor, seed=self.seed, task=task, **options)
        scratch = path.with_suffix("")
        best = Checkpoints(scratch)
        trainer = self._lightning(stage, [best], max_epochs=epochs, num_sanity_val_steps=0)
        trainer.fit(learner, datamodule=data, ckpt_path=best.resume if best.resume.exists() else None)
        learner.load_state_dict(torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"])
        accuracy = float(best.best_model_score or 0.0)
        metadata = {"stage": stage, "val_acc": accuracy}
        save_tensors(path, network.state_dict(), kind=EXPERT_KIND, metadata=metadata)
        done = self.folder.finish(stage, artifacts=[path], result=metadata | {"steps": trainer.global_step})
        shutil.rmtree(scratch)
        return done

    def _test(self, method: MethodName, user: str, stage: str) -> Stage:
        evaluator = self.evaluator(method, user)
        self._lightning(stage).test(evaluator, datamodule=self.data.view(user=user), verbose=False)
        assert evaluator.matrix is not None
        rows: Matrix = [[None if value != value else value for value in row] for row in evaluator.matrix.tolist()]
        merged = []
        if isinstance(evaluator, MergeModule):
            path = self.merged_path(method, user)
            metadata = {"method": method, "user": user, "sources": self.folder.checksums(self.sources(method, user))}
            merged.append(save_tensors(path, evaluator.export(), kind="merged", metadata=metadata))
        return self.folder.finish(stage, artifacts=merged, result={"matrix": rows})

    def merged_path(self, method: MethodName, user: str) -> Path:
        """The file of a method's merged model for a user."""
        return self.path("merged", f"{user}-{method}")

    def sources(self, method: MethodName, user: str) -> list[Path]:
        """The files that a method's model for a user is made of."""
        return []


class Checkpoints(ModelCheckpoint):
    """The model with the best validation accuracy, and now and then a checkpoint to resume from.

    The latter within an epoch, but not at its last step, from where Lightning would go on without its validation.

    Args:
        folder: Where they are.
        seconds: Between two checkpoints to resume from.
    """

    def __init__(self, folder: Path, seconds: float = 30) -> None:
        super().__init__(folder, "best", monitor="val/acc", mode="max", enable_version_counter=False)
        self.resume, self._seconds, self._saved = folder / "last.ckpt", seconds, time.monotonic()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._saved >= self._seconds and not trainer.is_last_batch:
            trainer.save_checkpoint(self.resume)
            self._saved = time.monotonic()


def part(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The entries of a submodule, with names relative to it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def open_expert(path: Path) -> TensorFile:
    """The file of a trained model."""
    return TensorFile(path, kind=EXPERT_KIND)
