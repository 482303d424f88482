"""The scene benchmarks from options to results, with every method that takes batches from the datamodule."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from scene_files import SIZE, cameraprior, catprior, transprior
from tiny_benchmark import call
from torch import nn

from pl_personalize.adaptations import ADAPTATIONS
from pl_personalize.models import TaskNetwork
from pl_personalize.modules import TaskLearner
from pl_personalize.runner import AdaptationOptions


class Normalized(nn.Module):
    """Refuses what did not go through the transform."""

    def forward(self, x):
        assert x.dtype == torch.float32
        assert float(x.min()) < 0
        return x


def network(classes: int) -> TaskNetwork:
    layers = [Normalized(), nn.Flatten(), nn.Linear(3 * SIZE**2, 5), nn.BatchNorm1d(5), nn.ReLU()]
    return TaskNetwork(nn.Sequential(*layers), nn.Linear(5, classes))


@pytest.mark.parametrize(
    ("make", "methods", "users", "seeds"),
    [
        (catprior, ["FT", "MAS", "FIM-RACL"], 2, [1]),
        (transprior, ["Joint", "MAS-IMM"], 1, [1, 2]),
        (cameraprior, ["FIM-RACL"], 1, [1]),
    ],
    ids=["CatPrior", "TransPrior", "CameraPrior"],
)
def test_all_methods_see_normalized_images(scenes, tmp_path, make, methods, users, seeds, plain_distortions):
    data = make(scenes, tasks=["home", "store"], num_users=users, allocation_seeds=seeds, augment=True)
    short = AdaptationOptions(adabn_s=ADAPTATIONS["AdaBN-S"](epochs=1), ft=ADAPTATIONS["FT"](epochs=1))
    adaptations = ["last", "AdaBN-S"]
    rows = call(tmp_path, data=data, network=network, methods=methods, adaptations=adaptations, adaptation=short)
    assert {row.user for row in rows} == {"all", *data.users}
    assert len(data.users) == 2
    assert all(0 <= row.avg_acc <= 100 for row in rows)
    lines = (tmp_path / "results.md").read_text().partition("Users:")[2].splitlines()
    for user in data.users:
        (line,) = (line for line in lines if line.startswith(f"| {user} "))
        assert line.split("|")[2].strip() == data.about_user(user) != ""


class Crash(Callback):
    """Stops when the step after a given one begins."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.after:
            raise RuntimeError("power cut")


def train(folder, textured_scenes, crash: int, ckpt_path=None) -> dict:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = TaskLearner(network(3), lr=0.1, l2_transfer=0.0, seed=3, task=1)
    checkpoint = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, save_last=True)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[Crash(crash), checkpoint], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(learner, datamodule=catprior(textured_scenes, task=1, seed=3, augment=True), ckpt_path=ckpt_path)
    assert trainer.global_step == 12
    return learner.state_dict()


@pytest.mark.parametrize("crash", [2, 9])
def test_an_augmented_training_resumes_bit_for_bit(textured_scenes, tmp_path, crash):
    whole = train(tmp_path / "whole", textured_scenes, -1)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path / "cut", textured_scenes, crash)
    resumed = train(tmp_path / "rest", textured_scenes, -1, tmp_path / "cut" / "last.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
