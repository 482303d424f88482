from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pl_personalize.datamodules import DigitsDataModule
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import mlp
from pl_personalize.modules import TaskLearner
from pl_personalize.runner.server_run import ResumePoint


def steps_of_checkpoints(folder, cls: type[ModelCheckpoint]) -> set[int]:
    checkpoint = cls(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=3,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TaskLearner(mlp(IMAGE_SHAPE, 2, [4])), datamodule=DigitsDataModule(task=0))
    return {int(path.stem.partition("=")[2]) for path in folder.glob("*.ckpt")}


def test_a_resume_point_is_never_before_the_validation_of_its_epoch(tmp_path):
    assert steps_of_checkpoints(tmp_path / "plain", ModelCheckpoint) == {1, 2, 3, 4, 5, 6}
    assert steps_of_checkpoints(tmp_path / "ours", ResumePoint) == {1, 2, 4, 5}
