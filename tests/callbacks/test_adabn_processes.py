"""AdaBN in two processes."""

import copy
import json

import torch
from adabn_runs import assert_identical, assert_same, running
from small_runs import ROWS, run_forked
from torch import nn
from torch.utils.data import DistributedSampler

from pl_personalize import BatchNormStatistics
from pl_personalize.adaptation import estimate_batchnorm

DDP_SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from pl_personalize import BatchNormStatistics
from pl_personalize.callbacks import AdaBN

FOLDER = Path(sys.argv[1])
ROWS = [(torch.randn(6, generator=torch.Generator().manual_seed(k)) + 1, k % 3) for k in range(23)]
save = BatchNormStatistics.save


def noted_save(statistics, path):
    with open(FOLDER / "saves.txt", "a") as file:
        file.write(f"{path}\\n")
    return save(statistics, path)


BatchNormStatistics.save = noted_save


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), nn.BatchNorm1d(4)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        torch.save(self.state_dict(), FOLDER / f"test-{self.global_rank}.pt")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class After(Callback):
    def __init__(self, what):
        self.what = what

    def note(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), FOLDER / f"{self.what}-{trainer.global_rank}.pt")
        results = [
            [c.path, c.statistics.num_samples, c.statistics.fingerprint, *(v.tolist() for v in c.statistics.values())]
            for c in trainer.callbacks
            if isinstance(c, AdaBN)
        ]
        (FOLDER / f"{self.what}-{trainer.global_rank}.json").write_text(json.dumps(results))

    def teardown(self, trainer, pl_module, stage):
        if stage == "fit":
            self.note(trainer, pl_module)

    on_predict_end = note


def trainer(what, *callbacks, **options):
    return Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=FOLDER,
        callbacks=[*callbacks, After(what)], **options,
    )


if __name__ == "__main__":
    loader = DataLoader(ROWS, batch_size=4)
    net = Net()
    fit = trainer(
        "fit",
        AdaBN(DataLoader(ROWS[:1]), prior_samples=2, filename="one"),
        AdaBN(exact=True, max_scratch_mb=1e-6, filename="layerwise"),
        AdaBN(loader, exact=True, filename="exact"),
        AdaBN(filename="train"),
    )
    fit.fit(net, DataLoader(ROWS, batch_size=4))
    trainer("test", AdaBN(filename="train")).test(net, loader, verbose=False)
    trainer("predict", AdaBN(exact=True, filename="double"), precision="64-true").predict(net, loader)
"""


def one_train_batch(net, x):
    """Train-mode batch norm with momentum 1 on one batch; all else in eval mode."""
    net = copy.deepcopy(net).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.train()
            layer.momentum = 1.0
    with torch.no_grad():
        net(x)
    return running(net.state_dict())


def test_two_processes_give_what_one_gives(tmp_path):
    """Of 23 rows or 1 row; by default one process's batches are those of both."""
    run_forked(tmp_path, DDP_SCRIPT)

    x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(k)) + 1 for k in range(ROWS)])
    ranks = [torch.load(tmp_path / f"fit-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_identical(ranks[0], ranks[1])
    net = nn.Module()
    net.net = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), nn.BatchNorm1d(4)
    )
    net.forward = net.net.forward
    net.load_state_dict(ranks[0])

    loaded = {path.stem: BatchNormStatistics.load(path) for path in (tmp_path / "batchnorm").iterdir()}
    samplers = [DistributedSampler(range(ROWS), num_replicas=2, rank=rank) for rank in (0, 1)]
    shares = [
        part for sampler, rows in zip(samplers, (12, 11), strict=True) for part in x[list(sampler)[:rows]].split(4)
    ]
    assert_same(loaded["train"], estimate_batchnorm(net, shares), 1e-6)
    assert_identical(running(ranks[0]), loaded["train"])
    assert_same(loaded["exact"], one_train_batch(net, x), 1e-4)
    assert_same(loaded["layerwise"], one_train_batch(net, x), 1e-4)
    assert_same(loaded["double"], one_train_batch(net.double(), x.double()), 1e-9)
    counts = {name: statistics.num_samples for name, statistics in loaded.items()}
    assert counts == {"train": 23, "exact": 23, "layerwise": 23, "double": 23, "one": 1}

    tested = [torch.load(tmp_path / f"test-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in tested:
        assert_identical(running(state), loaded["train"])
    assert sorted((tmp_path / "saves.txt").read_text().split()) == sorted(
        str(tmp_path / "batchnorm" / f"{name}.safetensors") for name in loaded
    )
    for what in ("fit", "predict"):
        results = [json.loads((tmp_path / f"{what}-{rank}.json").read_text()) for rank in (0, 1)]
        assert results[0] == results[1]
