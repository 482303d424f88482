"""CatPrior and TransPrior as somebody would run them: every configuration through the script itself, shrunk."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from scene_files import write_scenes

from pl_personalize.models import check_backbone

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CONFIGS = sorted(
    path.name for prefix in ("catprior", "transprior") for path in (EXPERIMENTS / "configs").glob(f"{prefix}-*.yaml")
)
SMALL = ["--image_size", "32", "--allocation_seeds", "[1]", "--num_users", "2", "--training.epochs", "1"]
SMALL += [
    "--tasks",
    "[home, leisure]",
    "--weights",
    "null",
    "--loggers",
    "[]",
    "--cache_dir",
    "null",
    "--download",
    "false",
]
SMALLER = {"CatPrior": ["--extra_images", "4", "--preferred_classes", "1"], "TransPrior": ["--extra_images", "8"]}
# A network with batch norm and one without, that take small images in no time.
PLAIN, NORMED = "squeezenet1_1", "timm:test_efficientnet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), textured=True)


@pytest.fixture(autouse=True)
def _distortions(request):
    if "transprior" in request.node.name:
        pytest.importorskip("cv2")


def run_here(monkeypatch, script, *options):
    """Run the script in this process, as Python would; what it imports from beside it, anew."""
    monkeypatch.delitem(sys.modules, "scenes_benchmark", raising=False)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")


def data_options(folder, benchmark):
    found = ["--data_dir", folder, "--supercategories", folder / "supercategories.csv", *SMALL, *SMALLER[benchmark]]
    return [*found, "--preferences", "1"] if benchmark == "CatPrior" else found


def results(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_of_scenes_runs(name, folder, tmp_path, monkeypatch, capsys, global_state):
    config = yaml.safe_load((EXPERIMENTS / "configs" / name).read_text())
    benchmark = "CatPrior" if name.startswith("catprior") else "TransPrior"
    check_backbone(config["backbone"])
    backbone = NORMED if "adaptations" in config else PLAIN
    options = ["--config", EXPERIMENTS / "configs" / name, *data_options(folder, benchmark), "--backbone", backbone]
    tuned = ["--baselines.ft_epochs", "1", "--adaptation.epochs", "1", "--seeds", "[1]"]
    run_here(monkeypatch, f"{benchmark.lower()}.py", *options, *tuned, "--output_dir", tmp_path / "run")

    rows = results(tmp_path / "run")
    assert {row["method"] for row in rows} == set(config["methods"])
    assert {row["user"] for row in rows} == {"user1", "user2", "all"}
    assert {row["adaptation"] for row in rows} == set(config.get("adaptations", ["none"]))
    assert {row["benchmark"] for row in rows} == {benchmark}
    assert not Path("None").exists()  # where nothing is cached, there is no folder of that name


def test_iterations_are_users_of_their_own(folder, tmp_path, monkeypatch, capsys, global_state):
    options = [*data_options(folder, "CatPrior"), "--allocation_seeds", "[1, 2]", "--backbone", PLAIN, "--seeds", "1"]
    run_here(monkeypatch, "catprior.py", *options, "--methods", "[mean-IMM]", "--output_dir", tmp_path / "run")

    users = ["user1-seed1", "user1-seed2", "user2-seed1", "user2-seed2"]
    assert [row["user"] for row in results(tmp_path / "run")] == [*users, "all"]
    assert len(list((tmp_path / "run" / "checkpoints").glob("**/*.safetensors"))) == 2


def test_other_images_in_the_same_files_are_refused(folder, tmp_path, monkeypatch, capsys, global_state):
    preferences = tmp_path / "preferences.json"
    options = [*data_options(folder, "CatPrior"), "--preferences", preferences, "--backbone", PLAIN, "--seeds", "1"]
    options += ["--methods", "mean-IMM", "--output_dir", tmp_path / "run"]
    chosen = {"home": ["attic"], "leisure": ["bar"]}
    preferences.write_text(json.dumps({"user1": chosen, "user2": chosen}))
    run_here(monkeypatch, "catprior.py", *options)

    preferences.write_text(json.dumps({"user1": chosen, "user2": chosen | {"home": ["bath"]}}))
    with pytest.raises(SystemExit, match=r"a run with other options \(images: "):
        run_here(monkeypatch, "catprior.py", *options)


@pytest.mark.parametrize("script", ["catprior.py", "transprior.py"])
def test_missing_data_are_one_line(script, tmp_path, monkeypatch):
    options = ["--data_dir", tmp_path / "nowhere", "--backbone", PLAIN, "--weights", "null", "--loggers", "[]"]
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        run_here(monkeypatch, script, *options, "--output_dir", tmp_path / "run")


def test_the_paper_is_beside_its_own_networks(folder, tmp_path, monkeypatch, capsys, global_state):
    """In the table of a run with VGG-11-BN; here a network of that name that takes no time."""
    from pl_personalize.models import backbone

    monkeypatch.setattr("pl_personalize.models.backbone", lambda name, n, weights: backbone(NORMED, n, weights=weights))
    options = [*data_options(folder, "CatPrior"), "--backbone", "vgg11_bn", "--seeds", "[1]", "--methods", "[FIM-RACL]"]
    run_here(
        monkeypatch, "catprior.py", *options, "--adaptations", "[AdaBN, reference]", "--output_dir", tmp_path / "run"
    )

    output = capsys.readouterr().out
    assert "paper" in output
    assert "MIT Indoor" in output
