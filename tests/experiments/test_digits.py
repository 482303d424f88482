"""Digits as users run it, with the shipped configuration, shrunk by its own options."""

import json
import os
import subprocess
import sys

import pytest
from scripts import EXPERIMENTS, refusal, rows_of, run_script
from torch import nn

from pl_personalize import Importance
from pl_personalize.artifacts import file_checksum, load_tensors
from pl_personalize.datamodules import DigitsDataModule
from pl_personalize.datamodules.digits import IMAGE_SHAPE
from pl_personalize.models import MultiHeadNetwork, mlp
from pl_personalize.stages import run_folder
from pl_personalize.stages.workspace import Workspace

SMALL = ["--config", EXPERIMENTS / "configs" / "digits.yaml", "--seeds", "[3]", "--training.epochs", "1"]
SMALL += ["--network.hidden", "[8]", "--methods", "[FIM-RACL, MAS-IMM, mean-IMM, Experts, Joint]"]


def run(folder, *options):
    return run_script("run_digits.py", *SMALL, "--output_dir", folder, *options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by a process of its own."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    done = subprocess.run(
        [*map(str, [sys.executable, EXPERIMENTS / "run_digits.py", *SMALL, "--output_dir", folder])],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_leaves_what_it_says(finished):
    folder, output = finished
    rows = rows_of(folder / "results.csv")
    assert {row["method"] for row in rows} == {"FIM-RACL", "MAS-IMM", "mean-IMM", "Experts", "Joint"}
    assert {row["user"] for row in rows} == {"scan", "camera", "all"}
    assert all(0 <= float(row["avg_acc"]) <= 100 for row in rows)
    assert (folder / "figures" / "methods.png").is_file()
    assert (folder / "figures" / "matrix-FIM-RACL.png").is_file()
    assert "| FIM-RACL |" in (folder / "results.md").read_text()
    assert str(folder / "results.csv") in output
    assert "wandb sync" in output
    for owner, count in {"first": 1, "experts": 4, "Joint": 1}.items():
        assert len(list((folder / "checkpoints" / owner / "seed3").glob("*.safetensors"))) == count


def test_a_merged_model_names_its_sources(finished):
    folder, _ = finished
    path = folder / "merged" / "experts" / "seed3" / "camera-FIM-RACL.safetensors"
    merged, metadata = load_tensors(path, kind="merged")
    sources = metadata["sources"]
    assert sorted(sources) == sorted(
        [
            "checkpoints/first/seed3/task1.safetensors",
            *(f"checkpoints/experts/seed3/task{task}.safetensors" for task in range(2, 6)),
            *(f"importances/experts/seed3/camera-fisher-task{task}.safetensors" for task in range(1, 6)),
        ]
    )
    assert all(file_checksum(folder / name) == checksum for name, checksum in sources.items())
    body = mlp(IMAGE_SHAPE, 2, [8]).body
    MultiHeadNetwork(body, [nn.Linear(8, 2) for _ in range(5)]).load_state_dict(merged)


def test_the_importances_of_a_user_were_computed_on_the_images_of_the_task(finished):
    folder, _ = finished
    importance = Importance.load(folder / "importances" / "experts" / "seed3" / "camera-fisher-task2.safetensors")
    data = DigitsDataModule(user="camera")
    assert importance.kind == "fisher"
    assert importance.num_samples == len(data.user_split("camera", 1)[0].labels)
    assert set(importance) == {"hidden1.weight", "hidden1.bias"}


def test_a_second_call_does_nothing_again(finished):
    folder, _ = finished
    manifest, table = (folder / "manifest.json").read_bytes(), (folder / "results.csv").read_bytes()
    runs = sorted((folder / "wandb").iterdir())
    output = run(folder)
    assert (folder / "manifest.json").read_bytes() == manifest
    assert (folder / "results.csv").read_bytes() == table
    assert sorted((folder / "wandb").iterdir()) == runs
    assert "wandb sync" in output


def test_an_interrupted_run_resumes_and_comes_to_the_same_results(finished, tmp_path, monkeypatch):
    train = Workspace.train

    def train_two(self, stage, *args):
        if stage.endswith("task3"):
            raise KeyboardInterrupt
        return train(self, stage, *args)

    monkeypatch.setattr(Workspace, "train", train_two)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path / "run", "--loggers", "[csv]")
    monkeypatch.undo()
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert set(stages) == {"first/seed3/train/task1", "experts/seed3/train/task2"}
    output = run(tmp_path / "run", "--loggers", "[csv, tensorboard]")
    assert (tmp_path / "run" / "results.csv").read_bytes() == (finished[0] / "results.csv").read_bytes()
    assert "wandb" not in output
    # What the interrupted call had logged is told again, so each logger has every stage.
    for task in range(1, 6):
        (rows,) = (tmp_path / "run" / "csv").glob(f"*/train-task{task}/metrics.csv")
        (accuracy,) = [row["val/acc"] for row in rows_of(rows) if row["val/acc"]]
        assert 0 <= float(accuracy) <= 1
        assert len(list((tmp_path / "run" / "tensorboard").glob(f"*/train-task{task}/events*"))) == 1


def test_a_folder_of_another_run_is_refused(finished):
    said = refusal("run_digits.py", *SMALL, "--output_dir", finished[0], "--training.lr", "0.5")
    assert "holds a run with other options (training.lr: 0.01 there, 0.5 now)" in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--methods", "ewc", "methods: there is no 'ewc'; did you mean 'EWC'? Known: MAS-RACL, "),
        ("--methods", "[EWC, fisher-racl]", "methods: there is no 'fisher-racl'; did you mean 'FIM-RACL'? Known:"),
        ("--training.epochs", "many", "many"),
        ("--training.epochs", "0", "training.epochs must be 1 or more; got 0"),
        ("--sedes", "[1]", "--sedes"),
        ("--seeds", "[]", "seeds must be at least one"),
        ("--seeds", "[1, 1]", "seeds must be at least one, and each once"),
        ("--network.hidden", "[]", "hidden must be positive integers, at least one"),
        ("--num_threads", "0", "num_threads"),
        ("--loggers", "[mlflow]", "mlflow"),
        ("--importance.fisher_draws", "0", "fisher_draws"),
        ("--wandb.images_of", "[everybody]", "wandb.images_of: there is no 'everybody'. Known: scan, camera"),
    ],
)
def test_a_wrong_option_is_refused_at_once(tmp_path, option, value, message):
    assert message in refusal("run_digits.py", *SMALL, "--output_dir", tmp_path / "run", option, value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_without_wandb_can_be_tracked_later(tmp_path):
    short = ["--methods", "[Experts, Joint]"]
    assert "wandb sync" not in run(tmp_path / "run", *short, "--wandb.mode", "disabled")
    assert "wandb sync" in run(tmp_path / "run", *short)
    tables = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/results*.json")
    assert len(list(tables)) == 2  # of the runs of experts and of Joint


@pytest.mark.parametrize("there", ["results.csv", "figures"])
def test_files_of_another_program_are_refused_and_left_alone(tmp_path, there):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / there).write_text("of another program")
    said = refusal("run_digits.py", *SMALL, "--output_dir", tmp_path / "run")
    assert said.startswith(f"error: {tmp_path / 'run'} has {there}, and no manifest.json of a run")
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(there, "of another program")]


def test_a_disk_that_refuses_in_the_middle_of_a_run_is_one_line(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "file_checksum", full)
    said = refusal("run_digits.py", *SMALL, "--output_dir", tmp_path / "run", "--loggers", "[]")
    assert said.startswith(f"error: {tmp_path / 'run'} cannot be read or written: [Errno 28]")
