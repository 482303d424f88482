"""The place in which the stages of one server method and seed are done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from pl_personalize.artifacts import TensorFile, save_tensors
from pl_personalize.datamodules import TaskIncrementalDataModule
from pl_personalize.functional.seeding import derive_seed
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import TaskLearner
from pl_personalize.modules.merge_module import EXPERT_KIND
from pl_personalize.stages.checkpoints import Checkpoints, load_checkpoint
from pl_personalize.stages.metrics_log import MetricsLog, StageLogger
from pl_personalize.stages.options import ImportanceOptions, TrainerOptions, TrainingOptions
from pl_personalize.stages.run_folder import RunFolder, Stage
from pl_personalize.stages.work import Work


@dataclass(frozen=True)
class Workspace:
    """Folder, data, options and seed of a run, and the means to train in it.

    Attributes:
        name: Name of the server method; stages and files of the run begin with it.
        seed: Seed of initial parameters, order of the data, and sampled labels.
        folder: The run's folder.
        data: The benchmark, ordered by the seed.
        make_network: Makes the network for a number of classes; called with the global generator seeded.
        training: Options of training.
        importance: Options of importances.
        trainer: Options of the Trainers.
        log: Where metrics are logged.
        models: ``all``, or ``last`` if only the model after the last task is tested.
        show: Functions that display the progress within a stage.
    """

    name: str
    seed: int
    folder: RunFolder
    data: TaskIncrementalDataModule
    make_network: Callable[[int], TaskNetwork]
    training: TrainingOptions
    importance: ImportanceOptions
    trainer: TrainerOptions
    log: MetricsLog
    models: str = "all"
    show: list[Callable[[str], None]] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """The first part of the names of the run's stages."""
        return f"{self.name}/seed{self.seed}"

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.data.tasks)

    def shared(self, name: str) -> Workspace:
        """The same place for stages that several server methods have in common."""
        return replace(self, name=name)

    def path(self, room: str, name: str) -> Path:
        """The file of that name of this run in a room of the folder, such as ``checkpoints``."""
        return self.folder.path / room / self.name / f"seed{self.seed}" / f"{name}.safetensors"

    def work(self, stage: str, run: Callable[..., Stage], *args: Any, checkpoints: Path | None = None) -> Work:
        """A stage of this run; ``run`` gets the arguments and the stage's whole name."""
        name = f"{self.prefix}/{stage}"
        return Work(name, lambda: run(*args, name), checkpoints)

    def result(self, stage: str) -> Any:
        """The result of a finished stage of this run.

        Raises:
            KeyError: If it is not finished.
        """
        found = self.folder.finished(f"{self.prefix}/{stage}")
        if found is None:
            raise KeyError(f"{self.prefix}/{stage} is not finished.")
        return found.result

    def network(self, num_classes: int, *purpose: str | int) -> TaskNetwork:
        """The initial network: each seed has one body for all tasks and methods; the head depends on its purpose."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, "body"))
            network = self.make_network(num_classes)
            torch.manual_seed(derive_seed(self.seed, "head", *purpose))
            network.new_head(num_classes)
        return network

    def lightning(self, stage: str, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        """The Trainer of a stage, whose metrics go to the log."""
        return self.trainer.trainer(
            logger=StageLogger(self.log, stage),
            callbacks=[*callbacks, _ShowEpochs(self.show, stage)],
            default_root_dir=self.folder.path,
            **options,
        )

    def learner_options(self, task: int) -> dict[str, Any]:
        """The options that all learners share."""
        options = asdict(self.training)
        del options["epochs"], options["l2_transfer"]
        return options | {"seed": self.seed, "task": task}

    def train(
        self,
        stage: str,
        learner: TaskLearner,
        data: TaskIncrementalDataModule,
        path: Path,
        callbacks: Sequence[Callback] = (),
    ) -> Stage:
        """Train, resuming an interrupted training, and keep the model with the best validation accuracy."""
        best = Checkpoints(path.with_suffix(""))
        every = min(self.trainer.log_every_n_steps, len(data.train_dataloader()))  # once an epoch at least
        trainer = self.lightning(
            stage,
            [*callbacks, best],
            max_epochs=self.training.epochs,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, every),
        )
        trainer.fit(learner, datamodule=data, ckpt_path=best.resume if best.resume.exists() else None)
        refuse_divergence(stage, learner.network, "training.lr, or strength of a penalty")
        learner.load_state_dict(load_checkpoint(Path(best.best_model_path))["state_dict"])
        metadata = {"stage": stage, "val_acc": float(best.best_model_score or 0.0)}
        save_tensors(path, learner.model_state(), kind=EXPERT_KIND, metadata=metadata)
        done = self.folder.finish(stage, artifacts=[path], result=metadata | {"steps": trainer.global_step})
        shutil.rmtree(path.with_suffix(""))
        return done


class _ShowEpochs(Callback):
    """Displays the epoch of a training."""

    def __init__(self, show: Sequence[Callable[[str], None]], stage: str) -> None:
        self._show, self._stage = show, stage

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for show in self._show:
            show(f"{self._stage} epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


def refuse_divergence(stage: str, network: torch.nn.Module, what: str) -> None:
    """Refuse a model that training has broken.

    Raises:
        MisconfigurationException: If a parameter is NaN or infinite.
    """
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise MisconfigurationException(
            f"{stage}: the training diverged (parameters are NaN or infinite). Try a smaller {what}."
        )


def open_expert(path: Path) -> TensorFile:
    """The file of a trained model."""
    return TensorFile(path, kind=EXPERT_KIND)


def load_expert(path: Path) -> Mapping[str, Tensor]:
    """The entries of a trained model."""
    return open_expert(path).load()
