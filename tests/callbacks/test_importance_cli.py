"""Importance callbacks in LightningCLI."""

from pathlib import Path

from importance_runs import Net, assert_same, wanted
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from small_runs import Rows, cli_of, in_order
from torch.utils.data import DataLoader

from pl_personalize import estimate_importance
from pl_personalize.callbacks.importance_callback import ImportanceCallback


class CLIData(LightningDataModule):
    def train_dataloader(self):
        return in_order(Rows())

    def val_dataloader(self):
        return DataLoader(Rows(9, seed=2), batch_size=4)


def test_lightning_cli_yaml(tmp_path):
    rest = f"""
    - class_path: pl_personalize.callbacks.MASImportance
      init_args:
        dataloader: val
        weights: last
        module: features
        exclude: [features.1]
        dirpath: {tmp_path / "cli"}
        filename: mine
    - class_path: pl_personalize.callbacks.FisherImportance
      init_args:
        labels: true
        draws: 1
        max_scratch_mb: 16
    - class_path: pl_personalize.callbacks.FisherImportance
      init_args:
        dataloader: [train, val]
        labels: "sampled"
        generator: 3
        filename: both
    - class_path: pl_personalize.callbacks.PlateauSchedule
      init_args:
        monitor: score
        lr_patience: 2
model:
  norm: true
"""
    cli = cli_of(tmp_path, Net, CLIData, rest)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    mas, fisher, both = (c for c in cli.trainer.callbacks if isinstance(c, ImportanceCallback))

    assert list(mas.importance) == ["0.weight", "0.bias"]
    reference = wanted(cli.model, Rows(9, seed=2))
    assert_same(mas.importance, {name: reference[f"features.{name}"] for name in mas.importance})
    assert Path(mas.path) == tmp_path / "cli" / "mine.safetensors"
    assert_same(fisher.importance, wanted(cli.model, Rows(), "empirical_fisher"))
    loaders = [*in_order(Rows()), *in_order(Rows(9, seed=2))]
    assert_same(both.importance, estimate_importance(cli.model, loaders, "fisher", generator=3))


def test_lightning_cli_from_the_command_line(tmp_path):
    arguments = [
        "--seed_everything=false", "--trainer.accelerator=cpu", "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks=pl_personalize.callbacks.FisherImportance",
        "--trainer.callbacks.draws=all", "--trainer.callbacks.module=features",
    ]  # fmt: skip
    cli = LightningCLI(Net, CLIData, args=arguments, run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, ImportanceCallback))
    assert (callback.kind, callback.module, callback.dataloader, callback.weights) == (
        "fisher",
        "features",
        None,
        "best",
    )
    assert callback._options["draws"] == "all"
