"""Options of datamodules: on the command line, and as what results depend on."""

import json

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from scene_files import cameraprior, catprior, transprior
from tiny_benchmark import Tiny

from pl_personalize.datamodules import (
    CameraPriorDataModule,
    CatPriorDataModule,
    DigitsDataModule,
    NumbersDataModule,
    TransPriorDataModule,
)
from pl_personalize.datamodules.distortions import DISTORTIONS

BASE = {"task": None, "user": None, "batch_size": 20, "eval_batch_size": 256, "seed": 0, "split_seed": 27}
SCENES = BASE | {
    "data_dir": "data/mit-indoor", "tasks": ("home", "leisure", "public", "store"), "supercategories": None,
    "allocation_seeds": (1,), "image_size": 224, "augment": False, "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225), "cache_dir": None, "download": False, "archive_md5": None,
}  # fmt: skip
NUMBERS = {"data_dir": "data", "sources": ("svhn", "mnist"), "download": False, "max_per_source": 10_000}
CATPRIOR = {"num_users": 5, "preferred_classes": 3, "extra_images": 70, "preferences": None}
CAMERAS = {"severity": 3, "distort_at": "resized"}
TRANSPRIOR = CAMERAS | {"num_users": 10, "extra_images": 1000}
CAMERAPRIOR = CATPRIOR | CAMERAS | {"cameras": DISTORTIONS}


@pytest.mark.parametrize(
    ("datamodule", "defaults"),
    [
        (DigitsDataModule, BASE),
        (NumbersDataModule, BASE | NUMBERS),
        (CatPriorDataModule, SCENES | CATPRIOR),
        (TransPriorDataModule, SCENES | TRANSPRIOR),
        (CameraPriorDataModule, SCENES | CAMERAPRIOR),
    ],
)
def test_the_command_line_shows_every_option(datamodule, defaults):
    parser = ArgumentParser()
    assert set(parser.add_class_arguments(datamodule)) == set(defaults)
    assert parser.get_defaults().as_dict() == defaults
    assert all(f"--{name} " in parser.format_help() for name in defaults)
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert not undocumented


@pytest.mark.parametrize("datamodule", [CatPriorDataModule, TransPriorDataModule])
def test_a_lightning_cli_makes_the_datamodule(scenes, datamodule, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    options = {
        "data_dir": scenes, "supercategories": scenes / "supercategories.csv", "num_users": 2, "tasks": "home",
        "allocation_seeds": "[3, 4]", "extra_images": 2, "preferences": 1, "user": "user2-seed4", "batch_size": 3,
    }  # fmt: skip
    if datamodule is TransPriorDataModule:
        del options["preferences"]
    args = [f"--data.{name}={value}" for name, value in options.items()]
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    cli = LightningCLI(
        BoringModel, datamodule, run=False, args=args, seed_everything_default=False, trainer_defaults=trainer
    )
    data = cli.datamodule
    assert (data.data_dir, data.tasks, data.user, data.batch_size) == (scenes, ("home",), "user2-seed4", 3)


def test_the_image_shape_is_that_of_a_batch(scenes, plain_distortions):
    for data in (Tiny(), DigitsDataModule(), catprior(scenes), transprior(scenes, image_size=9)):
        assert next(iter(data.server_dataloader(0)))[0].shape[1:] == data.image_shape


def decisive(datamodule):
    return json.loads(json.dumps(datamodule.decisive_options()))


def test_batch_sizes_are_decisive_everywhere():
    assert decisive(Tiny()) == {"batch_size": 4, "eval_batch_size": 256}


def test_decisive_options_of_digits_and_numbers(tmp_path, monkeypatch):
    sizes = {"batch_size": 20, "eval_batch_size": 256}
    assert decisive(DigitsDataModule(split_seed=4, seed=3, task=1)) == sizes | {"split_seed": 4}
    monkeypatch.chdir(tmp_path)
    numbers = NumbersDataModule("x", ("mnist", "a/b"), max_per_source=None, split_seed="seed", download=True)
    own = {"data_dir": str(tmp_path / "x"), "sources": ["mnist", "a/b"], "max_per_source": None, "split_seed": "seed"}
    assert decisive(numbers) == sizes | own


def test_decisive_options_of_scenes(scenes, tmp_path):
    common = {
        "batch_size": 4, "eval_batch_size": 5, "data_dir": str(scenes.resolve()), "num_users": 2, "tasks": ["home"],
        "supercategories": str(scenes / "supercategories.csv"), "allocation_seeds": [3], "image_size": 8,
        "augment": False, "mean": [0.0, 0.5, 1.0], "std": [1.0, 2.0, 3.0], "split_seed": 27, "extra_images": 3,
    }  # fmt: skip
    options = {
        "num_users": 2, "tasks": "home", "allocation_seeds": 3, "mean": (0, 0.5, 1), "std": (1, 2, 3),
        "extra_images": 3,
    }  # fmt: skip
    found = decisive(catprior(scenes, **options))
    images = found.pop("images")
    assert found == common | {"preferred_classes": 2, "preferences": 1}
    users = {f"user{k}": {"home": ["attic", "bath"]} for k in (1, 2)}
    path = tmp_path / "users.json"
    path.write_text(json.dumps(users))
    other = decisive(catprior(scenes, preferences=path, **options))
    assert other["preferences"] == str(path)
    assert other["images"] != images
    same = catprior(scenes, cache_dir=tmp_path, download=True, archive_md5="0", seed=5, task=0, user=1, **options)
    assert decisive(same) == found | {"images": images}
    both = decisive(cameraprior(scenes, cameras="jpeg", **options))
    assert both == found | {"images": images, "cameras": ["jpeg"], "severity": 3, "distort_at": "resized"}
    assert decisive(cameraprior(scenes, **options))["cameras"] == ["jpeg", "saturation"]
    found = decisive(transprior(scenes, severity=2, **options))
    assert found.pop("images") not in (images, other["images"])
    assert found == common | {"severity": 2, "distort_at": "resized"}
