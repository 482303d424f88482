import csv

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pl_personalize import Importance
from pl_personalize.runner import tracking
from pl_personalize.runner.results import result_row
from pl_personalize.runner.tracking import RunResults, csv_tracker, tensorboard_tracker
from pl_personalize.stages.metrics_log import Record

MATRIX = torch.tensor([[1.0, float("nan")], [0.5, 0.75]])


def follow(tracker):
    tracker.log(Record("train/task1", 1, {"train/loss": 3.0}))
    tracker.log(Record("train/task1", 2, {"train/loss": 2.0}))
    tracker.log(Record("train/task2", 1, {"train/loss": 9.0}))
    tracker.log_importance("server", 1, Importance({"w": torch.tensor([0.0, 10.0])}, kind="mas", num_samples=1))
    row = result_row(MATRIX, benchmark="Numbers", backbone="MLP", method="MAS-IMM", user="mnist", seed=1)
    tracker.log_results(RunResults([row], {("MAS-IMM", "mnist"): MATRIX}, {}, []))
    tracker.finish()


def losses(path):
    return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(path.open())]


def test_csv_has_a_file_for_each_stage(tmp_path):
    follow(csv_tracker(tmp_path / "csv" / "IMM-seed1"))
    folder = tmp_path / "csv" / "IMM-seed1"
    assert losses(folder / "train-task1" / "metrics.csv") == [(1, 3.0), (2, 2.0)]
    assert losses(folder / "train-task2" / "metrics.csv") == [(1, 9.0)]
    (results,) = csv.DictReader((folder / "results" / "metrics.csv").open())
    assert float(results["MAS-IMM/mnist/avg_acc"]) == 62.5


def test_tensorboard_has_a_run_for_each_stage(tmp_path):
    follow(tensorboard_tracker(tmp_path / "IMM-seed1"))
    events = EventAccumulator(str(tmp_path / "IMM-seed1" / "train-task1")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]
    importance = EventAccumulator(str(tmp_path / "IMM-seed1" / "importance-server-mas-task1")).Reload()
    (histogram,) = importance.Histograms("importance/log10/w")
    assert (histogram.histogram_value.num, histogram.histogram_value.sum) == (1, 1.0)
    results = EventAccumulator(str(tmp_path / "IMM-seed1" / "results")).Reload()
    assert results.Scalars("MAS-IMM/mnist/forgetting")[0].value == 25.0


@pytest.mark.parametrize("make", [csv_tracker, tensorboard_tracker])
def test_a_run_that_goes_on_is_told_again_without_doubling(tmp_path, make):
    follow(make(tmp_path / "run"))
    before = sorted(path.parent.name for path in (tmp_path / "run").rglob("*") if path.is_file())
    follow(make(tmp_path / "run"))
    assert sorted(path.parent.name for path in (tmp_path / "run").rglob("*") if path.is_file()) == before


def test_a_missing_tensorboard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="pip install tensorboard"):
        tensorboard_tracker(tmp_path)
