"""The benchmarks on scenes as users run them: every configuration through the script itself, shrunk."""

import json
from pathlib import Path

import pytest
import yaml
from scene_files import write_scenes
from scripts import EXPERIMENTS, refusal, rows_of, run_script

from pl_personalize.models import backbone, check_backbone

CONFIGS = sorted(
    path.name
    for kind in ("catprior", "transprior", "camera-prior")
    for path in (EXPERIMENTS / "configs").glob(f"{kind}-*")
)
# A network with batch norm and one without, which take small images in no time.
PLAIN, NORMED = "squeezenet1_1", "timm:test_efficientnet"
SMALL = ["--image_size", "32", "--num_users", "2", "--tasks", "[home, leisure]", "--download", "false"]
SMALL += ["--cache_dir", "null", "--network.weights", "null", "--loggers", "[]", "--seeds", "[1]"]
SMALL += ["--training.epochs", "1", "--adaptation.ft.epochs", "1", "--adaptation.adabn_s.epochs", "1"]
OF_THE_BENCHMARK = {
    "CatPrior": ["--extra_images", "4", "--preferred_classes", "1", "--preferences", "1"],
    "TransPrior": ["--extra_images", "8"],
}
OF_THE_BENCHMARK["CameraPrior"] = [*OF_THE_BENCHMARK["CatPrior"], "--cameras", "[contrast]"]
SCRIPTS = {
    "CatPrior": ["run_catprior.py"],
    "TransPrior": ["run_transprior.py"],
    "CameraPrior": ["benchmark.py", "pl_personalize.datamodules.CameraPriorDataModule"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), textured=True)


@pytest.fixture(autouse=True)
def _distortions(request):
    if "transprior" in request.node.name:
        pytest.importorskip("cv2")


def data_options(folder, benchmark, seeds="[1]"):
    found = ["--data_dir", folder, "--supercategories", folder / "supercategories.csv"]
    return [*found, *SMALL, *OF_THE_BENCHMARK[benchmark], "--allocation_seeds", seeds]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_of_scenes_runs(name, folder, tmp_path):
    config = yaml.safe_load((EXPERIMENTS / "configs" / name).read_text())
    benchmark = next(known for known in SCRIPTS if name.replace("-", "").startswith(known.lower()))
    check_backbone(config["network"]["name"])
    network = NORMED if "AdaBN" in config.get("adaptations", []) else PLAIN
    options = ["--config", EXPERIMENTS / "configs" / name, *data_options(folder, benchmark), "--network.name", network]
    options += ["--num_users", "1", "--extra_images", "4"]  # the options of a configuration count, not its users
    methods = config["methods"]
    if "adaptations" in config:  # each applies to every method: two will do
        methods = ["FIM-RACL", "FT"]
        options += ["--methods", json.dumps(methods)]
    run_script(*SCRIPTS[benchmark], *options, "--output_dir", tmp_path / "run")

    rows = rows_of(tmp_path / "run" / "results.csv")
    assert {row["method"] for row in rows} == set(methods)
    assert {row["user"] for row in rows} == {"user1-contrast" if benchmark == "CameraPrior" else "user1", "all"}
    assert {row["adaptation"] for row in rows} == set(config.get("adaptations", ["none"]))
    assert {row["benchmark"] for row in rows} == {benchmark}
    assert not Path("None").exists()  # where nothing is cached, there is no folder of that name


def test_each_allocation_seed_has_its_own_users(folder, tmp_path):
    options = [*data_options(folder, "CatPrior", "[1, 2]"), "--network.name", PLAIN, "--methods", "[mean-IMM]"]
    run_script("run_catprior.py", *options, "--output_dir", tmp_path / "run")

    users = ["user1-seed1", "user1-seed2", "user2-seed1", "user2-seed2"]
    assert [row["user"] for row in rows_of(tmp_path / "run" / "results.csv")] == [*users, "all"]
    assert len(list((tmp_path / "run" / "checkpoints").glob("**/*.safetensors"))) == 2


def test_other_images_in_the_same_files_are_refused(folder, tmp_path):
    preferences = tmp_path / "preferences.json"
    options = [*data_options(folder, "CatPrior"), "--preferences", preferences, "--network.name", PLAIN]
    options += ["--methods", "mean-IMM", "--output_dir", tmp_path / "run"]
    chosen = {"home": ["attic"], "leisure": ["bar"]}
    preferences.write_text(json.dumps({"user1": chosen, "user2": chosen}))
    run_script("run_catprior.py", *options)

    preferences.write_text(json.dumps({"user1": chosen, "user2": chosen | {"home": ["bath"]}}))
    assert "a run with other options (data.images: " in refusal("run_catprior.py", *options)


@pytest.mark.parametrize("script", ["run_catprior.py", "run_transprior.py"])
def test_missing_data_are_one_line(script, tmp_path):
    options = ["--data_dir", tmp_path / "nowhere", "--network.name", PLAIN, "--network.weights", "null"]
    said = refusal(script, *options, "--loggers", "[]", "--output_dir", tmp_path / "run")
    assert said.startswith("error: ")
    assert "nowhere" in said


def test_the_paper_is_beside_its_own_networks(folder, tmp_path, monkeypatch):
    """In the table of a run with VGG-11-BN; here a network of that name that takes no time."""
    monkeypatch.setattr(
        "pl_personalize.models.network_options.backbone", lambda name, n, weights: backbone(NORMED, n, weights=weights)
    )
    options = [*data_options(folder, "CatPrior"), "--network.name", "vgg11_bn", "--methods", "[FIM-RACL]"]
    output = run_script(
        "run_catprior.py", *options, "--adaptations", "[AdaBN, reference]", "--output_dir", tmp_path / "run"
    )
    assert "paper" in output
    assert "MIT Indoor" in output


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished run of users with preferences and a camera, two seeds."""
    path = tmp_path_factory.mktemp("finished") / "run"
    options = [*data_options(folder, "CameraPrior"), "--network.name", PLAIN, "--methods", "[FIM-IMM]"]
    options += ["--seeds", "[1, 2]", "--models", "last", "--adaptations", "[none, refit]"]
    run_script(*SCRIPTS["CameraPrior"], *options, "--output_dir", path)
    return path


def test_heads_of_a_finished_run_are_studied(finished):
    """The models as they are have the accuracies of the run's own table."""
    output = run_script("head_study.py", finished)
    rows = rows_of(finished / "head-study" / "FIM-IMM" / "results.csv")

    for line in rows_of(finished / "results.csv"):
        same = {"seed": line["seed"], "user": line["user"], "adaptation": line["adaptation"], "part": "users"}
        found = [row["accuracy"] for row in rows if line["user"] != "all" and same.items() <= row.items()]
        assert line["user"] == "all" or [float(value) for value in found] == pytest.approx([float(line["avg_acc"])])
    parts = {(row["part"], row["adaptation"]) for row in rows}
    assert {("users", "refit+true-both"), ("curve", "refit+auto"), ("unshifted", "refit+auto")} <= parts
    assert {row["images"] for row in rows if row["part"] == "curve"} == {"5.0"}  # there are some seven of a task
    assert (
        (finished / "head-study" / "FIM-IMM" / "results.md")
        .read_text()
        .endswith(output.partition("Users of")[2].partition("\n\nResults: ")[0] + "\n")
    )
    assert "| contrast |" in output


def test_a_family_of_random_cameras_can_be_left_out(finished):
    options = ["--cameras", "9", "--seeds", "[2]", "--parts", "[users]"]
    run_script("head_study.py", finished, *options)
    path = finished / "head-study" / "FIM-IMM-9-cameras" / "results.csv"
    rows = rows_of(path)
    assert {row["seed"] for row in rows} == {"2"}
    assert {row["part"] for row in rows} == {"users"}
    assert "refit+auto, family left out" in {row["adaptation"] for row in rows}

    changed = path.stat().st_mtime_ns
    run_script("head_study.py", finished, *options)  # finished parts are not computed again
    assert rows_of(path) == rows
    assert path.stat().st_mtime_ns == changed
    run_script("head_study.py", finished, *options[:-1], "[users, curve]")
    assert rows_of(path)[: len(rows)] == rows
    assert {row["part"] for row in rows_of(path)[len(rows) :]} == {"curve"}


def test_heads_over_batch_norm_are_not_studied(folder, tmp_path):
    options = [*data_options(folder, "CatPrior"), "--network.name", NORMED, "--methods", "[mean-IMM]"]
    options += ["--models", "last", "--adaptations", "[none]", "--output_dir", tmp_path / "run"]
    run_script("run_catprior.py", *options)
    assert "batch norm" in refusal("head_study.py", tmp_path / "run", "--method", "mean-IMM")
