"""The script itself, as somebody would run it, shrunk by its own options."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from pl_personalize.artifacts import file_checksum, load_tensors
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import MultiHeadNetwork, mlp

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = ["--seeds", "[3]", "--training.epochs", "1", "--hidden", "[8]", "--methods"]
SMALL += ["[FIM-RACL, MAS-IMM, mean-IMM, Experts, Joint]"]


def run(folder, *options, code=None):
    command = [sys.executable, *(["-c", code] if code else [str(EXPERIMENTS / "digits.py")])]
    config = ["--config", str(EXPERIMENTS / "configs" / "digits.yaml")]
    return subprocess.run(
        [*command, *config, *SMALL, "--output_dir", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_leaves_what_it_says(finished):
    folder, output = finished
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert {row["method"] for row in rows} == {"FIM-RACL", "MAS-IMM", "mean-IMM", "Experts", "Joint"}
    assert {row["user"] for row in rows} == {"scan", "camera", "all"}
    assert all(0 <= float(row["avg_acc"]) <= 100 for row in rows)
    assert (folder / "figures" / "methods.png").is_file()
    assert (folder / "figures" / "matrix-FIM-RACL.png").is_file()
    assert "| FIM-RACL |" in (folder / "results.md").read_text()
    assert str(folder / "results.csv") in output
    assert "wandb sync" in output
    assert len(list((folder / "checkpoints" / "IMM" / "seed3").glob("*.safetensors"))) == 5
    assert len(list((folder / "checkpoints" / "Joint" / "seed3").glob("*.safetensors"))) == 1
    merged, metadata = load_tensors(folder / "merged" / "IMM" / "seed3" / "camera-FIM-RACL.safetensors", kind="merged")
    sources = metadata["sources"]
    assert sorted(sources) == sorted(
        f"{place}{task}.safetensors"
        for place in ("checkpoints/IMM/seed3/task", "importances/IMM/seed3/camera-fisher-task")
        for task in range(1, 6)
    )
    assert all(file_checksum(folder / name) == checksum for name, checksum in sources.items())
    body = mlp(IMAGE_SHAPE, 2, [8]).body
    MultiHeadNetwork(body, [nn.Linear(8, 2) for _ in range(5)]).load_state_dict(merged)


def test_the_importances_of_a_user_were_computed_without_labels_and_for_its_task(finished):
    from pl_personalize import Importance
    from pl_personalize.datamodules import DigitsDataModule

    folder, _ = finished
    importance = Importance.load(folder / "importances" / "IMM" / "seed3" / "camera-fisher-task2.safetensors")
    data = DigitsDataModule(user="camera")
    assert importance.kind == "fisher"
    assert importance.num_samples == len(data.user_split("camera", 1)[0].labels)
    assert set(importance) == {"hidden1.weight", "hidden1.bias"}


def test_a_second_call_does_nothing_again(finished):
    folder, _ = finished
    manifest = (folder / "manifest.json").read_bytes()
    table = (folder / "results.csv").read_bytes()
    runs = sorted((folder / "wandb").iterdir())
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "manifest.json").read_bytes() == manifest
    assert (folder / "results.csv").read_bytes() == table
    assert sorted((folder / "wandb").iterdir()) == runs
    assert "wandb sync" in again.stdout


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_results(finished, tmp_path):
    folder, _ = finished
    # The process dies, as by SIGKILL, when the third expert is about to be trained.
    code = f"""
import os, runpy, sys
from pl_personalize.runner.expert_run import ExpertRun
train = ExpertRun._train_task
ExpertRun._train_task = lambda self, task, stage: os._exit(9) if task == 2 else train(self, task, stage)
sys.argv[0] = {str(EXPERIMENTS / "digits.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    killed = run(tmp_path / "run", "--loggers", "[csv]", code=code)
    assert killed.returncode == 9, killed.stderr
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert sorted(stages) == ["IMM/seed3/train/task1", "IMM/seed3/train/task2"]
    resumed = run(tmp_path / "run", "--loggers", "[csv, tensorboard]")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run" / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    assert "wandb" not in resumed.stdout
    # What the killed process had logged is told again, so each follower has every stage.
    for task in range(1, 6):
        rows = csv.DictReader((tmp_path / "run" / "csv" / "IMM-seed3" / f"train-task{task}" / "metrics.csv").open())
        (accuracy,) = [row["val/acc"] for row in rows if row["val/acc"]]
        assert 0 <= float(accuracy) <= 1
        assert len(list((tmp_path / "run" / "tensorboard" / "IMM-seed3" / f"train-task{task}").glob("events*"))) == 1


def refusal(monkeypatch, capsys, folder, *options) -> str:
    """What the script says, in this process, when it refuses."""
    config = ["--config", str(EXPERIMENTS / "configs" / "digits.yaml")]
    monkeypatch.setattr(sys, "argv", ["digits.py", *config, *SMALL, "--output_dir", str(folder), *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXPERIMENTS / "digits.py"), run_name="__main__")
    assert end.value.code not in (0, None)
    return f"{end.value.code} {capsys.readouterr().err}"


def test_a_folder_of_another_run_is_refused(finished, monkeypatch, capsys, global_state):
    said = refusal(monkeypatch, capsys, finished[0], "--training.lr", "0.5")
    assert "holds a run with other options (lr: 0.01 there, 0.5 now)" in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--methods", "ewc", "methods: there is no 'ewc'; did you mean EWC? There are MAS-RACL, "),
        ("--methods", "[EWC, fisher-racl]", "methods: there is no 'fisher-racl'; did you mean FIM-RACL? There are"),
        ("--training.epochs", "many", "many"),
        ("--training.epochs", "0", "epochs must be at least 1; got 0"),
        ("--sedes", "[1]", "--sedes"),
        ("--seeds", "[]", "seeds must be at least one"),
        ("--seeds", "[1, 1]", "seeds must be at least one, and each once"),
        ("--hidden", "[]", "hidden must have at least one width"),
        ("--num_threads", "0", "num_threads"),
        ("--loggers", "[mlflow]", "mlflow"),
        ("--importance.fisher_draws", "0", "fisher_draws must be at least 1"),
        ("--wandb.images_of", "[everybody]", "wandb.images_of: there is no 'everybody'. There are scan, camera"),
    ],
)
def test_a_wrong_option_is_refused_at_once(tmp_path, monkeypatch, capsys, global_state, option, value, message):
    assert message in refusal(monkeypatch, capsys, tmp_path / "run", option, value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_without_wandb_can_be_tracked_later(tmp_path):
    assert "wandb sync" not in run(tmp_path / "run", "--wandb.mode", "disabled").stdout
    tracked = run(tmp_path / "run")
    assert "wandb sync" in tracked.stdout
    tables = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/results*.json")
    assert len(list(tables)) == 2  # of the runs IMM and Joint


@pytest.mark.parametrize("there", ["results.csv", "figures"])
def test_files_of_another_program_are_refused_and_left_alone(tmp_path, monkeypatch, capsys, global_state, there):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / there).write_text("of another program")
    said = refusal(monkeypatch, capsys, tmp_path / "run")
    assert said.startswith(f"error: {tmp_path / 'run'} has {there}, and no manifest.json of a run")
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(there, "of another program")]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys, global_state):
    (tmp_path / "taken").touch()
    said = refusal(monkeypatch, capsys, tmp_path / "taken" / "run")
    assert said.startswith(f"error: The folder {tmp_path / 'taken' / 'run'} of a run cannot be made or written")
    assert "--output_dir" in said


def test_a_disk_that_refuses_in_the_middle_of_a_run_is_one_line(tmp_path, monkeypatch, capsys, global_state):
    from pl_personalize.runner import server_run

    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_run, "save_tensors", full)
    said = refusal(monkeypatch, capsys, tmp_path / "run")
    assert said.startswith(f"error: {tmp_path / 'run'} cannot be read or written: [Errno 28]")
