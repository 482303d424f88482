import pytest
import torch
from lightning.pytorch import Trainer
from tiny_benchmark import Tiny, plain

from pl_personalize.artifacts import ArtifactError
from pl_personalize.modules import TaskLearner
from pl_personalize.stages.checkpoints import Checkpoints, load_checkpoint, resume_path


class Spy(Checkpoints):
    """Notes the step of every checkpoint to resume from."""

    steps: tuple[int, ...] = ()

    def on_train_batch_end(self, trainer, *args, **kwargs):
        self.resume.unlink(missing_ok=True)
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self.resume.exists():
            self.steps = (*self.steps, load_checkpoint(self.resume)["global_step"])


def fit(checkpoints):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TaskLearner(plain(2)), datamodule=Tiny().view(task=0))
    assert trainer.global_step == 6


def test_a_resume_point_is_never_before_the_validation_of_its_epoch(tmp_path):
    spy = Spy(tmp_path, seconds=0)
    fit(spy)
    assert spy.steps == (1, 2, 4, 5)  # not 3 and 6, the last of their epochs


def test_a_resume_point_takes_its_time(tmp_path):
    spy = Spy(tmp_path, seconds=3600)
    fit(spy)
    assert spy.steps == ()
    assert spy.best_model_path == str(tmp_path / "best.ckpt")
    assert not resume_path(tmp_path).exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\3\4" + bytes(100)])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"last\.ckpt cannot be read as a checkpoint .*Remove .*restart the stage"):
        load_checkpoint(tmp_path / "last.ckpt")


def test_other_errors_of_a_file_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "last.ckpt")
    torch.save({"global_step": 3}, tmp_path / "last.ckpt")
    assert load_checkpoint(tmp_path / "last.ckpt") == {"global_step": 3}
