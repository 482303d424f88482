"""The script itself, as somebody would run it, shrunk by its own options."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = ["--seeds", "[3]", "--training.epochs", "1", "--hidden", "[8]", "--methods", "[FIM-RACL, MAS-IMM, mean-IMM]"]


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
    assert len(list((folder / "checkpoints" / "seed3").glob("*.safetensors"))) == 6


def test_the_importances_of_a_user_were_computed_without_labels_and_for_its_task(finished):
    from pl_personalize import Importance
    from pl_personalize.datamodules import DigitsDataModule

    folder, _ = finished
    importance = Importance.load(folder / "importances" / "seed3" / "camera-fisher-task2.safetensors")
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


def test_a_killed_run_goes_on_and_ends_with_the_same_results(finished, tmp_path):
    folder, _ = finished
    # The process dies, as by SIGKILL, when the third expert is about to be trained.
    code = f"""
import os, runpy, sys
from pl_personalize.runner.experiment import SeedRun
train = SeedRun._train_expert
SeedRun._train_expert = lambda self, task, stage: os._exit(9) if task == 2 else train(self, task, stage)
sys.argv[0] = {str(EXPERIMENTS / "digits.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    killed = run(tmp_path / "run", "--wandb.mode", "disabled", code=code)
    assert killed.returncode == 9, killed.stderr
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert sorted(stages) == ["seed3/expert/task1", "seed3/expert/task2"]
    resumed = run(tmp_path / "run", "--wandb.mode", "disabled")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run" / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()


def test_a_folder_of_another_run_is_refused(finished):
    folder, _ = finished
    refused = run(folder, "--training.lr", "0.5")
    assert refused.returncode != 0
    assert "holds a run with other options (lr: 0.01 there, 0.5 now)" in refused.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--methods", "[FIM]"), ("--training.epochs", "many"), ("--sedes", "[1]")]
)
def test_a_wrong_option_is_refused_at_once(tmp_path, option, value):
    refused = run(tmp_path / "run", option, value)
    assert refused.returncode == 2
    assert value in refused.stderr or option in refused.stderr
    assert not (tmp_path / "run").exists()
