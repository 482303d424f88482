import torch
from lightning.pytorch import Trainer

from pl_personalize.datamodules import DigitsDataModule
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import mlp
from pl_personalize.modules import TaskLearner
from pl_personalize.runner.checkpoints import Checkpoints


class Spy(Checkpoints):
    """Notes the step of every checkpoint to resume from."""

    steps: tuple[int, ...] = ()

    def on_train_batch_end(self, trainer, *args, **kwargs):
        self.resume.unlink(missing_ok=True)
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self.resume.exists():
            self.steps = (*self.steps, torch.load(self.resume, weights_only=True)["global_step"])


def fit(checkpoints):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=3,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TaskLearner(mlp(IMAGE_SHAPE, 2, [4])), datamodule=DigitsDataModule(task=0))


def test_a_resume_point_is_never_before_the_validation_of_its_epoch(tmp_path):
    spy = Spy(tmp_path, seconds=0)
    fit(spy)
    assert spy.steps == (1, 2, 4, 5)  # not 3 and 6, the last of their epochs


def test_a_resume_point_takes_its_time(tmp_path):
    spy = Spy(tmp_path, seconds=3600)
    fit(spy)
    assert spy.steps == ()
    assert spy.best_model_path == str(tmp_path / "best.ckpt")
