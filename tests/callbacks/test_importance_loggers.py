"""Importance callbacks: summaries in loggers."""

import math
from pathlib import Path

import pytest
import torch
from importance_runs import Net, fitted
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from small_runs import Rows
from small_runs import quiet_trainer as trainer
from torch.utils.data import DataLoader

from pl_personalize import Importance
from pl_personalize.callbacks import MASImportance
from pl_personalize.callbacks.importance_callback import _histogram


def logged_summary(callback) -> dict[str, float]:
    return {
        f"importance/mas/{what}/{name}": value
        for name, values in callback.importance.summary().items()
        for what, value in values.items()
    }


def test_the_summary_is_the_norm_and_the_share_of_zeros():
    importance = Importance({"w": torch.tensor([3.0, 0.0, 4.0, 0.0])}, kind="mas", num_samples=1)
    assert importance.summary() == {"w": {"norm": 5.0, "zeros": 0.5}}


@pytest.mark.parametrize("run", ["fit", "predict"])
def test_csv_logger(tmp_path, run):
    logger, callback = CSVLogger(tmp_path, name="runs"), MASImportance()
    getattr(trainer(tmp_path, callback, logger=logger), run)(Net(), DataLoader(Rows(), batch_size=4))
    header, *lines = (line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines())
    row = dict(zip(header, lines[-1], strict=True))
    assert {name: float(row[name]) for name in logged_summary(callback)} == pytest.approx(logged_summary(callback))
    assert row["step"] == ("6" if run == "fit" else "0")
    assert Path(callback.path) == Path(logger.log_dir, "importances", "mas.safetensors")


def test_tensorboard_logger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, callback = TensorBoardLogger(tmp_path), MASImportance()
    fitted(tmp_path, callback, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    scalars = {name: events.Scalars(name)[0].value for name in logged_summary(callback)}
    assert scalars == pytest.approx(logged_summary(callback))
    for name, value in callback.importance.items():
        histogram = events.Histograms(f"importance/mas/log10/{name}")[0].histogram_value
        nonzero = value[value > 0]
        assert histogram.num == nonzero.numel()
        assert histogram.sum == pytest.approx(sum(math.log10(v) for v in nonzero.flatten().tolist()), rel=1e-4)
    assert Path(callback.path).parent == Path(logger.log_dir, "importances")


def test_wandb_logger_offline(tmp_path, global_state):
    import wandb
    from wandb.sdk.lib.runid import generate_id

    logger, callback = (
        WandbLogger(project="tests", save_dir=str(tmp_path), offline=True, id=generate_id()),
        MASImportance(),
    )
    logged: list[dict] = []
    try:
        run = logger.experiment
        real = run.log
        run.log = lambda data, *args, **options: (logged.append(dict(data)), real(data, *args, **options))
        fitted(tmp_path, callback, logger=logger)
    finally:
        wandb.finish()
    scalars = {name: value for data in logged for name, value in data.items() if not isinstance(value, wandb.Histogram)}
    histograms = {name: value for data in logged for name, value in data.items() if isinstance(value, wandb.Histogram)}

    assert {name: scalars[name] for name in logged_summary(callback)} == pytest.approx(logged_summary(callback))
    for name, value in callback.importance.items():
        assert sum(histograms[f"importance/mas/log10/{name}"].histogram) == int((value > 0).sum())
    assert list(tmp_path.rglob("*.wandb"))
    assert Path(callback.path).is_relative_to(tmp_path)


def test_all_loggers_are_told_and_none_is_needed(tmp_path):
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    callback = MASImportance()
    fitted(tmp_path, callback, logger=loggers)
    for logger in loggers:
        assert "importance/mas/norm/classifier.weight" in Path(logger.log_dir, "metrics.csv").read_text()
    fitted(tmp_path, callback, logger=False)
    assert Path(callback.path).parent == tmp_path / "importances"


@pytest.mark.parametrize("values", [[2.0], [1.0, 1.0], [1.0, 1.0 + 1e-7], [0.0, 1.0, 5.0]])
def test_histograms_of_values_that_hardly_differ(values):
    counts, edges = _histogram(torch.tensor(values))
    assert counts.sum() == len(values)
    assert len(edges) == 65
    assert (edges[1:] > edges[:-1]).all()
