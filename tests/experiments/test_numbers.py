"""Numbers as users run it: every configuration through the script itself, shrunk by its own options."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from digit_files import write_mnist, write_photos, write_svhn
from safetensors.torch import load_file
from scripts import EXPERIMENTS, refusal, rows_of, run_script
from torchvision.datasets import SVHN
from wandb_file import read_run

CONFIGS = sorted(path.name for path in (EXPERIMENTS / "configs").glob("*.yaml"))
SMALL = ["--training.epochs", "1", "--network.hidden", "[8]"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Every collection that a configuration names, small."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    write_svhn(folder)
    write_photos(folder / "meter-digits")
    return folder


@pytest.fixture
def small_svhn(data_dir, monkeypatch):
    """torchvision knows SVHN's files by their checksums."""
    found = {}
    for split, (url, name, _) in SVHN.split_list.items():
        path = data_dir / "SVHN" / name
        found[split] = [url, name, hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""]
    monkeypatch.setattr(SVHN, "split_list", found)


def run(folder, *options):
    return run_script("run_numbers.py", *options, "--output_dir", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("numbers") and "sweep" not in name])
def test_every_configuration_of_numbers_runs(name, data_dir, small_svhn, tmp_path):
    config = yaml.safe_load((EXPERIMENTS / "configs" / name).read_text())
    sources = [str(data_dir / "meter-digits") if "/" in source else source for source in config["sources"]]
    shrunk = ["--data_dir", data_dir, "--download", "false", "--sources", json.dumps(sources), "--loggers", "[]"]
    shrunk += ["--training.epochs", "1", "--adaptation.ft.epochs", "1", "--adaptation.adabn_s.epochs", "1"]
    options = ["--config", EXPERIMENTS / "configs" / name, *shrunk, "--seeds", str(config["seeds"][:1])]
    methods = config["methods"]
    if "adaptations" in config:  # each applies to every method: two will do
        methods = ["FIM-RACL", "Experts"]
        options += ["--methods", json.dumps(methods), "--max_per_source", "100"]
    output = run(tmp_path / "run", *options)
    rows = rows_of(tmp_path / "run" / "results.csv")
    assert {row["method"] for row in rows} == set(methods)
    assert {row["user"] for row in rows} == {Path(source).name for source in sources} | {"all"}
    assert {row["seed"] for row in rows} == {"1"}
    assert "wandb" not in output
    network = config.get("network", {}).get("name", "mlp")
    assert ("| paper " in output) == (network == "mlp")
    adaptations = set(config.get("adaptations", ["none"]))
    assert {row["adaptation"] for row in rows if row["method"] == "FIM-RACL"} <= adaptations
    if network != "mlp":
        assert {row["adaptation"] for row in rows} == adaptations
    elif "MAS-RACL" in config["methods"]:
        assert "84.0 (-0.2)" in output


def test_how_many_images_it_takes(data_dir, tmp_path):
    sources = json.dumps([str(data_dir / "meter-digits"), "mnist"])
    options = ["--data_dir", data_dir, "--sources", sources, "--seeds", "[1, 2]", "--loggers", "[]"]
    network = ["--network.name", "cnn_bn", "--methods", "[mean-IMM]", "--adaptations", "[none]", "--models", "last"]
    folder = tmp_path / "run"
    run(folder, *SMALL[:2], *options, *network)
    study = ["--run_dir", folder, "--method", "mean-IMM", "--images", "[2, 1000]", "--batch_sizes", "[3]"]
    output = run_script("batchnorm_study.py", *study, "--repeats", "2")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line}
    assert {"2", "all", "3"} <= set(rows)
    assert "1000" not in rows  # no task has so many
    assert all(0 <= float(cell.partition(" ")[0]) <= 100 for cell in rows["all"])
    assert (folder / "figures" / "adabn-images.png").is_file()


def test_a_run_without_batch_norm_cannot_be_studied(data_dir, tmp_path):
    options = ["--data_dir", data_dir, "--sources", "[mnist]", "--seeds", "[1]", "--loggers", "[]"]
    run(tmp_path / "run", *SMALL, *options, "--methods", "[Experts]")
    said = refusal("batchnorm_study.py", "--run_dir", tmp_path / "run")
    assert "is a run of MLP 8, which has no batch norm" in said


@pytest.mark.slow
def test_a_network_of_torchvision(data_dir, tmp_path):
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=7).state_dict(), tmp_path / "weights.pth")
    options = ["--data_dir", data_dir, "--sources", "[mnist]", "--loggers", "[]", "--training.epochs", "1"]
    network = ["--network.name", "shufflenet_v2_x0_5", "--network.weights", tmp_path / "weights.pth"]
    methods = ["--methods", "[FIM-RACL, Joint]"]
    larger = ["--network.resize_to", "40"]
    output = run(tmp_path / "run", *options, *network, *methods, *larger, "--seeds", "[1]")
    rows = rows_of(tmp_path / "run" / "results.csv")
    assert {(row["backbone"], row["adaptation"]) for row in rows} == {("shufflenet_v2_x0_5", "AdaBN")}
    assert {row["method"] for row in rows} == {"FIM-RACL", "Joint"}
    expert = load_file(tmp_path / "run" / "checkpoints" / "experts" / "seed1" / "task2.safetensors")
    assert {"body.conv1.0.weight", "head.weight"} <= set(expert)
    assert "paper" not in output
    # Another seed in the same folder, of the same network alone.
    again = [*options, *network, *methods, "--seeds", "[2]", "--output_dir", tmp_path / "run"]
    assert "network.resize_to: 40 there, None now" in refusal("run_numbers.py", *again)


def test_a_configuration_is_tested_or_no_configuration():
    elsewhere = ("numbers", "catprior-", "transprior-", "camera-prior-")  # all but the first by test_scenes.py
    assert [name for name in CONFIGS if not name.startswith(elsewhere)] == ["digits.yaml"]  # test_digits.py runs it


@pytest.fixture(scope="module")
def tracked(data_dir, tmp_path_factory):
    """A run with everything that W&B can have."""
    folder = tmp_path_factory.mktemp("numbers") / "run"
    sources = json.dumps([str(data_dir / "meter-digits"), "mnist"])
    options = ["--data_dir", data_dir, "--sources", sources, "--seeds", "[1, 2]"]
    methods = ["--methods", "[FIM-RACL, MAS-IMM, Joint]", "--wandb.images_of", "[mnist]"]
    artifacts = ["--wandb.artifacts", "[experts, importances, merged]", "--trainer.log_every_n_steps", "1"]
    output = run(folder, *SMALL, *options, *methods, *artifacts)
    runs = [read_run(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]
    return folder, output, {(run.run.job_type, run.config["seed"]): run for run in runs}


def test_there_is_a_run_for_each_server_method_and_seed(tracked):
    _, output, runs = tracked
    assert set(runs) == {("experts", 1), ("experts", 2), ("Joint", 1), ("Joint", 2)}
    assert len({run.run.run_id for run in runs.values()}) == 4
    assert {run.run.run_group for run in runs.values()} == {"Numbers-run"}
    assert set(runs["experts", 1].run.tags) == {"Numbers", "MLP 8", "experts", "FIM-RACL", "MAS-IMM"}
    (command,) = [line for line in output.splitlines() if line.startswith("To W&B:")]
    folders = [str(runs[key].folder) for key in (("experts", 1), ("Joint", 1), ("experts", 2), ("Joint", 2))]
    assert command.removeprefix("To W&B:").split() == ["python", "-m", "wandb", "sync", *folders]


def test_a_run_has_its_configuration(tracked):
    config = tracked[2]["experts", 2].config
    assert (config["benchmark"], config["training.lr"], config["training.epochs"], config["seed"]) == (
        "Numbers",
        0.001,
        1,
        2,
    )
    assert config["users"] == ["meter-digits", "mnist"]
    assert config["versions"]["torch"].startswith("2")
    in_checkout = subprocess.run(["git", "rev-parse", "HEAD"], cwd=EXPERIMENTS, capture_output=True).returncode == 0
    commit = config.get("git_commit")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit) if in_checkout else commit is None
    assert (config["data.batch_size"], config["data.max_per_source"]) == (20, 10_000)


def test_the_curves_of_the_tasks_have_their_own_axes(tracked):
    run = tracked[2]["experts", 1]
    for task in range(1, 6):
        steps = [step for step, _ in run.curve(f"train/loss/task{task}")]
        assert steps == [0]  # 19 images are a single batch of 20, in every task
        assert run.step_metrics[f"train/loss/task{task}"] == f"step/task{task}"
        assert len(run.curve(f"val/acc/task{task}")) == 1
    assert run.curve("importance/fisher/mnist")[-1][0] == 5
    assert [step for step, _ in tracked[2]["Joint", 1].curve("val/acc/all")] == [4]


def test_the_tables_are_those_of_the_results(tracked):
    folder, _, runs = tracked
    written = {(r["method"], r["user"], int(r["seed"])): float(r["avg_acc"]) for r in rows_of(folder / "results.csv")}
    logged = {(r["method"], r["user"], r["seed"]): r["avg_acc"] for run in runs.values() for r in run.table("results")}
    assert logged == pytest.approx(written, abs=1e-4)
    run = runs["experts", 1]
    cells = {(c["method"], c["user"], c["after_task"], c["task"]): c["accuracy"] for c in run.table("accuracy_matrix")}
    last = [cells["MAS-IMM", "mnist", 5, task] for task in range(1, 6)]
    assert 100 * sum(last) / 5 == pytest.approx(run.summary["MAS-IMM/mnist/avg_acc"])


def test_artifacts_and_images_are_there_because_they_were_asked_for(tracked):
    run = tracked[2]["experts", 1]
    kinds = [artifact.type for artifact in run.artifacts]
    # 5 experts; Fisher of two users and MAS of the server, for each; two methods for two users
    assert (kinds.count("expert"), kinds.count("importance"), kinds.count("merged-model")) == (5, 15, 4)
    assert [key for row in run.history for key in row if key.startswith("images/")] == ["images/mnist"]


def test_no_image_of_a_user_is_logged_by_itself(data_dir, tmp_path):
    options = ["--data_dir", data_dir, "--sources", "[mnist]", "--seeds", "[1]", "--methods", "[mean-IMM]"]
    run(tmp_path / "run", *SMALL, *options, "--models", "last")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    found = read_run(folder)
    images = [key for row in found.history for key, value in row.items() if "image" in str(value)]
    assert images == ["figures/matrix-mean-IMM"]
    assert {artifact.type for artifact in found.artifacts} == {"run_table"}


@pytest.mark.slow
def test_the_sweep_runs_as_its_agent_would_start_it(data_dir, tmp_path, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    config = load_sweep_config(str(EXPERIMENTS / "configs" / "numbers-sweep.yaml"))
    chosen = {name: {"value": parameter["values"][0]} for name, parameter in config["parameters"].items()}
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [config["program"]],
        "${args}": create_sweep_command_args({"args": chosen})["args"],
    }
    command = [word for part in create_sweep_command(config["command"]) for word in macros.get(part, [part])]
    assert command[:3] == ["/usr/bin/env", sys.executable, "experiments/run_numbers.py"]
    options = ["--download=false", f"--data_dir={data_dir}", "--sources=[mnist]", f"--output_dir={tmp_path}", *SMALL]
    monkeypatch.chdir(EXPERIMENTS.parent)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    # In a process of its own, as W&B reads these variables when it is first used.
    words = [*command[1:], *map(str, options), "--wandb.mode=offline"]
    subprocess.run(words, check=True, capture_output=True)
    (folder,) = (tmp_path / "run1" / "wandb").glob("offline-run-*")
    found = read_run(folder)
    assert (found.run.run_id, found.run.sweep_id) == ("run1", "sweep1")
    assert (found.config["training.lr"], found.config["training.l2_transfer"]) == (0.0003, 0.0001)
    assert 0 <= found.summary[config["metric"]["name"]] <= 1


def test_a_sweep_is_of_one_run_a_call(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    options = ["--data_dir", data_dir, "--sources", "[mnist]", "--output_dir", tmp_path / "run"]
    said = refusal("run_numbers.py", *options, "--seeds", "[1, 2]", "--methods", "[MAS-IMM, Joint]")
    assert "In a sweep each call must be one run of W&B, but these seeds and methods make 4" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sources", "[svhn]"], "'svhn'"),
        (["--sources", "[nowhere/photos]"], "'nowhere/photos'"),
        (["--sources", "[mnist]", "--max_per_source", "0"], "max_per_source"),
        (["--sources", "[]"], "sources must be"),
        (["--network.name", "cnn-bn"], "Unknown network 'cnn-bn'; did you mean cnn_bn"),
        (["--network.name", "alexnet"], "alexnet cannot process images of 28×28 pixels"),
        (["--network.name", "resnet18", "--network.weights", "nowhere.pth"], "weights='nowhere.pth'"),
        (["--network.name", "resnet18", "--network.hidden", "[8]"], "applies to mlp only, not to resnet18"),
        (["--network.resize_to", "64"], "resize_to=64 applies to torchvision and timm models only"),
    ],
)
def test_what_is_missing_is_said_at_the_start(tmp_path, data_dir, options, message):
    where = tmp_path if "sources" in options[0] else data_dir
    sources = [] if "sources" in options[0] else ["--sources", "[mnist]"]
    said = refusal(
        "run_numbers.py", "--data_dir", where, "--output_dir", tmp_path / "run", "--loggers", "[]", *sources, *options
    )
    assert message in said
    assert not (tmp_path / "run").exists()


def test_scripts_of_the_folder_still_find_the_standard_librarys_modules():
    assert not {path.stem for path in EXPERIMENTS.glob("*.py")} & set(sys.stdlib_module_names)
