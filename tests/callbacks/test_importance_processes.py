"""Importance callbacks in two processes."""

import json

import pytest
import torch
from reference import relative_error
from small_runs import ROWS, run_forked
from torch import nn

from pl_personalize import Importance, estimate_importance

DDP_SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler

from pl_personalize import Importance
from pl_personalize.callbacks import FisherImportance, MASImportance

FOLDER, NORM = Path(sys.argv[1]), sys.argv[2] == "norm"
ROWS = [(torch.randn(6, generator=torch.Generator().manual_seed(k)), k % 3) for k in range(23)]
save = Importance.save


def noted_save(importance, path):
    with open(FOLDER / "saves.txt", "a") as file:
        file.write(f"{path}\\n")
    return save(importance, path)


Importance.save = noted_save


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(5) if NORM else nn.Identity()
        self.net = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class After(Callback):
    def note(self, trainer, pl_module, what):
        torch.save(pl_module.state_dict(), FOLDER / f"{what}-weights-{trainer.global_rank}.pt")
        results = [
            [c.path, c.importance.num_samples, sum(float(v.sum()) for v in c.importance.values())]
            for c in trainer.callbacks
            if isinstance(c, MASImportance | FisherImportance)
        ]
        (FOLDER / f"{what}-{trainer.global_rank}.json").write_text(json.dumps(results))

    def on_fit_end(self, trainer, pl_module):
        self.note(trainer, pl_module, "fit")

    def on_predict_end(self, trainer, pl_module):
        self.note(trainer, pl_module, "predict")


def trainer(*callbacks):
    return Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER, callbacks=[*callbacks, After()],
    )


if __name__ == "__main__":
    subset = {"sampler": SubsetRandomSampler([15, 3, 8, 1, 20, 9, 2])}
    net = Net()
    trainer(
        MASImportance(filename="train"),
        MASImportance(DataLoader(ROWS[:1]), filename="one"),
        FisherImportance(DataLoader(ROWS, batch_size=4), draws="all", filename="exact"),
    ).fit(net, DataLoader(ROWS, batch_size=4, **({"shuffle": True} if NORM else subset)))
    trainer(MASImportance(filename="predict")).predict(net, DataLoader(ROWS, batch_size=4))
"""


@pytest.mark.parametrize("variant", ["norm", "subset"])
def test_two_processes_give_what_one_gives(tmp_path, variant):
    """Of 23 rows, 7 rows or 1 row; with batch norm, whose statistics each process has its own of after training."""
    run_forked(tmp_path, DDP_SCRIPT, variant)

    x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(k)) for k in range(ROWS)])
    norm = nn.BatchNorm1d(5) if variant == "norm" else nn.Identity()
    net = nn.Module()
    net.net = nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
    train = x if variant == "norm" else x[[1, 2, 3, 8, 9, 15, 20]]
    data = {"train": (train, "mas"), "one": (x[:1], "mas"), "exact": (x, "fisher"), "predict": (x, "mas")}
    folder = tmp_path / "importances"
    errors = {}
    for name, (rows, kind) in data.items():
        weights = "predict-weights-0.pt" if name == "predict" else "fit-weights-0.pt"
        net.load_state_dict(torch.load(tmp_path / weights, weights_only=True))
        draws = {"draws": "all"} if kind == "fisher" else {}
        reference = estimate_importance(net, [rows], kind, forward=lambda model, batch: model.net(batch), **draws)
        found = Importance.load(folder / f"{name}.safetensors")
        errors[name] = (found.num_samples, relative_error(found, reference))
    assert {name: count for name, (count, _) in errors.items()} == {name: len(rows) for name, (rows, _) in data.items()}
    assert {name: error for name, (_, error) in errors.items() if error > 1e-6} == {}

    assert sorted((tmp_path / "saves.txt").read_text().split()) == sorted(
        str(folder / f"{n}.safetensors") for n in data
    )
    for what in ("fit", "predict"):
        ranks = [json.loads((tmp_path / f"{what}-{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
