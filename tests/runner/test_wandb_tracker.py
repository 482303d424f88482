"""What an offline run of W&B holds, read back from its file."""

import json
import types

import numpy as np
import pytest
import torch
import wandb
from wandb_file import read_run

from pl_personalize import Importance
from pl_personalize.artifacts import file_checksum
from pl_personalize.runner.options import WandbOptions
from pl_personalize.runner.results import result_row, with_means_over_users
from pl_personalize.runner.tracking import RunResults
from pl_personalize.runner.wandb_tracker import WandbTracker
from pl_personalize.stages.metrics_log import Record
from pl_personalize.stages.work import RunFile

NAN = float("nan")
MATRIX = torch.tensor([[1.0, NAN], [0.5, 0.75]])


def tracker(folder, **options):
    return WandbTracker(
        WandbOptions(**options),
        folder,
        name="Numbers-run-IMM-seed1",
        group="Numbers-run",
        job_type="IMM",
        tags=["Numbers", "MLP"],
        run_id="abc123",
        config={"lr": 0.1, "versions": {"torch": "2"}, "git_commit": "f00"},
    )


def results(figures=()):
    row = result_row(MATRIX, benchmark="Numbers", backbone="MLP", method="MAS-IMM", user="mnist", seed=1)
    return RunResults(
        with_means_over_users([row]), {("MAS-IMM", "mnist"): MATRIX}, {"task1": 0.5, "task2": 1.0}, figures
    )


@pytest.fixture
def run(tmp_path, global_state):
    follow = tracker(tmp_path)
    for step in (1, 2):
        follow.log(Record("train/task1", step, {"train/loss": 10.0 * step}))
    follow.log(Record("train/task2", 1, {"train/loss": 0.5, "val/acc": 0.25}))
    follow.log(Record("test/MAS-IMM/mnist", 0, {"test/acc/t1/task1": 1.0}))
    values = {"a.weight": torch.tensor([0.0, 10.0, 1000.0])}
    follow.log_importance("server", 2, Importance(values, kind="mas", num_samples=7))
    follow.log_results(results())
    folder = follow.folder
    follow.finish()
    return read_run(folder)


def test_a_run_says_what_it_is(run):
    assert (run.run.run_id, run.run.display_name) == ("abc123", "Numbers-run-IMM-seed1")
    assert (run.run.run_group, run.run.job_type, list(run.run.tags)) == ("Numbers-run", "IMM", ["Numbers", "MLP"])
    assert (run.config["lr"], run.config["versions"], run.config["git_commit"]) == (0.1, {"torch": "2"}, "f00")
    assert run.finished


def test_each_task_has_its_own_axis(run):
    assert run.curve("train/loss/task1") == [(1, 10.0), (2, 20.0)]
    assert run.curve("train/loss/task2") == [(1, 0.5)]
    assert run.curve("val/acc/task2") == [(1, 0.25)]
    assert run.step_metrics["train/loss/task1"] == "step/task1"
    assert run.step_metrics["train/loss/task2"] == "step/task2"
    assert {"step/task1", "step/task2"} <= run.hidden


def test_accuracies_are_curves_over_the_tasks_and_a_table(run):
    assert run.curve("test/mnist/MAS-IMM/task1") == [(1, 1.0), (2, 0.5)]
    assert run.curve("test/mnist/MAS-IMM/task2") == [(2, 0.75)]
    cells = [(c["method"], c["user"], c["after_task"], c["task"], c["accuracy"]) for c in run.table("accuracy_matrix")]
    assert cells == [("MAS-IMM", "mnist", *cell) for cell in ((1, 1, 1.0), (2, 1, 0.5), (2, 2, 0.75))]
    assert not [row for row in run.history if "test/acc/t1/task1/MAS-IMM" in row]


def test_results_are_summary_and_table(run):
    assert run.summary["MAS-IMM/mnist/avg_acc"] == 62.5
    assert run.summary["MAS-IMM/all/forgetting"] == 25.0
    assert [row["user"] for row in run.table("results")] == ["mnist", "all"]
    assert run.table("results")[0]["avg_acc"] == 62.5
    assert (run.summary["val_acc"], run.summary["val_acc/task1"]) == (0.75, 0.5)


def test_importances_are_histograms_over_tasks_and_a_table(run):
    ((task, histogram),) = run.curve("importance/mas/server")
    assert task == 2
    assert sum(histogram["values"]) == 2  # the positive entries
    np.testing.assert_allclose([histogram["bins"][0], histogram["bins"][-1]], [1.0, 3.0])  # log10
    (row,) = run.table("importances")
    assert row["norm"] == pytest.approx(1000.05, rel=1e-6)
    assert row["zeros"] == pytest.approx(1 / 3)
    assert (row["parameter"], row["owner"], row["num_samples"]) == ("a.weight", "server", 7)


def test_histograms_of_zeros_and_of_almost_equal_values(tmp_path, global_state):
    follow = tracker(tmp_path)
    follow.log_importance("server", 1, Importance({"w": torch.zeros(3)}, kind="mas", num_samples=1))
    follow.log_importance(
        "server", 2, Importance({"w": torch.tensor([10.0, 10.0, 10.000001])}, kind="mas", num_samples=1)
    )
    folder = follow.folder
    follow.finish()
    ((task, histogram),) = read_run(folder).curve("importance/mas/server")
    assert (task, sum(histogram["values"])) == (2, 3)


def files(folder):
    """An expert, its importances, and a merged model."""
    paths = [folder / f"{name}.bin" for name in ("task1", "mnist-mas-task1", "mnist-MAS-IMM")]
    for path in paths:
        path.write_bytes(path.stem.encode())
    expert, importance, merged = paths
    return [
        RunFile("experts", expert, []),
        RunFile("importances", importance, [expert]),
        RunFile("merged", merged, [expert, importance]),
    ]


def test_artifacts_say_what_they_were_made_of(tmp_path, global_state):
    follow = tracker(tmp_path)
    made = files(tmp_path)
    follow.log_artifacts(made)
    folder = follow.folder
    follow.finish()
    found = {artifact.name: artifact for artifact in read_run(folder).artifacts}
    assert {artifact.type for artifact in found.values()} == {"expert", "importance", "merged-model"}
    metadata = json.loads(found["Numbers-run-IMM-seed1-merged-mnist-MAS-IMM"].metadata)
    assert metadata["sha256"] == file_checksum(made[2].path)
    assert metadata["made_of"] == {path.name: file_checksum(path) for path in made[2].sources}


def test_artifacts_of_users_with_odd_names_are_told_apart(tmp_path, global_state):
    """Among them one whose tuned expert has the name of the server's importances, but for the room."""
    users = ["a b", "a-b", "a_b", "ä", "ö", "server-mas", "x" * 100 + "1", "x" * 100 + "2"]
    made = []
    for what, stem in (("experts", "{}-task1"), ("importances", "{}-mas-task1"), ("merged", "{}-MAS-IMM")):
        for name in [*users, *(["server"] if what == "importances" else [])]:
            path = tmp_path / what / f"{stem.format(name)}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(name.encode())
            made.append(RunFile(what, path, []))
    follow = tracker(tmp_path)
    follow.log_artifacts(made)
    folder = follow.folder
    follow.finish()
    names = [artifact.name for artifact in read_run(folder).artifacts]
    assert len(set(names)) == len(names) == len(made) == 25


def test_online_the_run_uses_what_an_artifact_was_made_of(tmp_path, monkeypatch, global_state):
    """W&B draws a graph of it; a stand-in takes the calls, for nothing is sent here."""
    calls = []

    class Run:
        def define_metric(self, *args, **options):
            pass

        def log_artifact(self, artifact):
            calls.append(("log", artifact.name))
            return types.SimpleNamespace(wait=lambda: artifact)

        def use_artifact(self, artifact):
            calls.append(("use", artifact.name))

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    tracker(tmp_path, mode="online").log_artifacts(files(tmp_path))
    expert, importance, merged = (
        f"Numbers-run-IMM-seed1-{name}"
        for name in ("experts-task1", "importances-mnist-mas-task1", "merged-mnist-MAS-IMM")
    )
    assert calls == [
        ("log", expert),
        ("use", expert),
        ("log", importance),
        ("use", expert),
        ("use", importance),
        ("log", merged),
    ]


def test_images_are_shown_if_they_are_given(tmp_path, global_state):
    follow = tracker(tmp_path)
    follow.log_images("mnist", torch.randn(4, 3, 5, 5))
    folder = follow.folder
    follow.finish()
    (row,) = read_run(folder).history
    assert row["images/mnist"]["_type"] == "image-file"
    assert len(list((folder / "files" / "media" / "images").rglob("*.png"))) == 1
