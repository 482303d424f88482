"""What an experiment refuses before anything is read or written, and what it makes of its options."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, experiment, plain, with_norm

from pl_personalize.adaptations import ADAPTATIONS, AdaptationSequence
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.adaptations.reestimated_statistics import AdaBN, Recalibrate
from pl_personalize.methods import METHODS
from pl_personalize.methods.penalties import EWCOptions, MASFamily
from pl_personalize.runner import (
    DEFAULT_METHODS,
    AdaptationOptions,
    Experiment,
    MethodOptions,
    NetworkOptions,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.variants import Variant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": []}, r"methods must be at least one, and each once; got \[\]"),
        ({"methods": ["MAS", "MAS"]}, r"methods must be at least one, and each once; got \['MAS', 'MAS'\]"),
        ({"methods": "ewc"}, "methods: there is no 'ewc'; did you mean 'EWC'[?] Known: MAS-RACL, FIM-RACL, "),
        ({"methods": ["EWC", "fisher-racl"]}, "methods: there is no 'fisher-racl'; did you mean 'FIM-RACL'[?]"),
        ({"methods": ["something"]}, "methods: there is no 'something'[.] Known: MAS-RACL, "),
        ({"methods": ["Experts+ft"]}, "methods: there is no 'ft'; did you mean 'FT'[?] Known: none, last, "),
        ({"methods": ["Experts+FT+adabn"]}, "methods: there is no 'adabn'; did you mean 'AdaBN'[?]"),
        ({"methods": ["Experts+"]}, r"methods: there is no ''[.] Known: none"),
        ({"adaptations": []}, "adaptations must be at least one"),
        ({"adaptations": ["last", "last"]}, "adaptations must be at least one, and each once"),
        ({"adaptations": "adapt"}, "adaptations: there is no 'adapt'"),
        ({"adaptations": ["recalibrate+adabn"]}, "adaptations: there is no 'adabn'; did you mean 'AdaBN'[?]"),
        ({"adaptations": ["none+AdaBN"]}, "'none[+]AdaBN': 'none' does nothing in a sequence"),
        ({"methods": ["Experts+none+none"]}, "'none[+]none': 'none' does nothing in a sequence"),
        ({"seeds": []}, "seeds must be at least one"),
        ({"seeds": [1, 1]}, "seeds must be at least one, and each once"),
        ({"seeds": "12"}, "A seed must be an integer; got '1'"),
        ({"seeds": [1.5]}, r"A seed must be an integer; got 1\.5"),
        ({"loggers": ["csv", "csv"]}, r"loggers must be each once; got \['csv', 'csv'\]"),
        ({"loggers": "mlflow"}, "loggers: there is no 'mlflow'[.] Known: wandb, csv, tensorboard"),
        ({"models": "own"}, "models: there is no 'own'[.] Known: all, last"),
        ({"wandb": WandbOptions(images_of=["ann"])}, "need 'wandb' among the loggers"),
        ({"wandb": WandbOptions(artifacts=["experts"])}, "need 'wandb' among the loggers"),
        ({"wandb": WandbOptions(artifacts=["models"]), "loggers": "wandb"}, "wandb.artifacts: there is no 'models'"),
        ({"wandb": WandbOptions(images_of=["eve"]), "loggers": "wandb"}, "images_of: there is no 'eve'.* ann, bob"),
        ({"trainer": TrainerOptions(accelerator="abacus")}, "trainer: .*abacus"),
        *[({"data": Tiny([name, "bob"])}, f"cannot be called '{name}'") for name in ("server", "all", "..", "a/b")],
    ],
)
def test_what_cannot_work_is_refused(options, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        experiment(tmp_path, **options)


def test_a_package_that_is_needed_at_the_end_is_missed_at_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("pl_personalize.runner.experiment.find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(MisconfigurationException, match="needs scipy, which is not installed: pip install scipy"):
        experiment(tmp_path)


def test_one_value_needs_no_list(tmp_path):
    made = experiment(tmp_path, methods="MAS", seeds=4, adaptations="none", loggers="csv")
    assert (made.methods, made.seeds, made.adaptations, made.loggers) == (("MAS",), (4,), ("none",), ("csv",))


def test_numpys_integers_are_seeds(tmp_path):
    seeds = experiment(tmp_path, seeds=np.arange(1, 3)).seeds
    assert seeds == (1, 2)
    assert {type(seed) for seed in seeds} == {int}


def test_names_of_network_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Experiment("Tiny scenes", Tiny(), NetworkOptions(hidden=[7]), loggers=[])
    assert (made.backbone, made.folder) == ("MLP 7", Path("runs/tiny-scenes"))
    assert Experiment("Tiny", Tiny(), plain, "n", loggers=[], output_dir=Path("~/run")).folder == tmp_path / "run"
    assert Experiment("Tiny", Tiny(), NetworkOptions(), "ours", loggers=[]).backbone == "ours"
    with pytest.raises(MisconfigurationException, match="backbone= must name a network"):
        Experiment("Tiny", Tiny(), plain, loggers=[])


def test_without_wandb_its_options_do_not_matter(tmp_path):
    options = WandbOptions(mode="disabled", images_of=["ann"])
    assert experiment(tmp_path, loggers=["wandb", "csv"], wandb=options).loggers == ("csv",)


# Methods and adaptations


def test_the_defaults_are_listed(tmp_path):
    listed = ("MAS-RACL", "FIM-RACL", "MAS-IMM", "FIM-IMM", "mean-IMM", "Experts", "Joint")
    assert listed == DEFAULT_METHODS
    assert Experiment("Tiny", Tiny(), plain, "net", loggers=[], output_dir=tmp_path).methods == listed


def variants(folder, network=plain, **options):
    made = experiment(folder, network=network, **options)
    return [variant.label for variant in made.variants(network(2))]


@pytest.mark.parametrize(
    ("network", "options", "labels"),
    [
        (plain, {"methods": ["mean-IMM", "FT"]}, ["mean-IMM", "FT"]),
        (with_norm, {"methods": ["mean-IMM", "FT"]}, ["mean-IMM+AdaBN", "FT+AdaBN"]),
        (with_norm, {"adaptations": ["none", "last+AdaBN"]}, ["mean-IMM", "mean-IMM+last+AdaBN"]),
        (plain, {"methods": ["Experts", "Experts+FT"]}, ["Experts", "Experts+FT"]),
        (plain, {"methods": ["Experts+FT", "Experts"], "adaptations": ["FT", "none"]}, ["Experts+FT", "Experts"]),
        (
            with_norm,
            {"methods": ["mean-IMM", "Joint"], "adaptations": ["average", "last"]},
            ["mean-IMM+average", "mean-IMM+last", "Joint+last"],
        ),
    ],
)
def test_each_method_has_the_adaptations_that_apply_to_it(tmp_path, network, options, labels):
    assert variants(tmp_path, network, **options) == labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptations": ["AdaBN"]}, "The adaptation 'AdaBN' needs a network with batch norm; got the network net"),
        ({"methods": "mean-IMM+AdaBN"}, "The adaptation 'AdaBN' needs a network with batch norm"),
        (
            {"network": with_norm, "adaptations": ["average", "FT+expert"], "methods": ["mean-IMM", "Experts"]},
            r"None of the adaptations \['average', 'FT\+expert'\] applies to Experts, which is no merge",
        ),
        ({"network": with_norm, "methods": ["MAS+average"]}, r"None of the adaptations \['average'\] applies to MAS"),
        (
            {"network": with_norm, "adaptations": "recalibrate+reference", "models": "last"},
            r"'recalibrate\+reference' uses earlier merges, which models='last' does not make",
        ),
    ],
)
def test_an_adaptation_that_does_not_apply_is_refused(tmp_path, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        variants(tmp_path, **options)


def test_options_reach_the_steps_of_a_sequence_and_those_of_the_method_come_first(tmp_path):
    options = AdaptationOptions(ft=FineTune(epochs=3), adabn=AdaBN(exact=True))
    made = experiment(tmp_path, adaptation=options)
    sequences = {
        Variant("mean-IMM"): ["none"],
        Variant("FT"): [FineTune(epochs=3)],
        Variant("FT", "AdaBN"): [FineTune(epochs=3), AdaBN(exact=True)],
        Variant("Experts", "recalibrate+AdaBN"): [Recalibrate(), AdaBN(exact=True)],
    }
    for variant, steps in sequences.items():
        sequence = made.sequence(variant)
        assert isinstance(sequence, AdaptationSequence)
        assert [step.name if steps == ["none"] else step for step in sequence.steps] == steps


def test_methods_are_grouped_by_the_stages_that_they_share(tmp_path):
    methods = ["Joint", "Experts+FT", "MAS", "FT", "mean-IMM", "Experts"]
    made = experiment(tmp_path, methods=methods, method=MethodOptions(ewc=EWCOptions(2.0)))
    groups = {family.name: [method.name for method in group] for family, group in made.families.items()}
    assert groups == {"experts": ["mean-IMM", "FT", "Experts"], "MAS": ["MAS"], "Joint": ["Joint"]}
    assert made.family_options(METHODS["EWC"].family).strength == 2.0
    assert made.family_options(MASFamily).strength == 1.0


# What results depend on


def test_decisive_options_are_flat_and_the_same_for_all_methods_and_adaptations(tmp_path):
    options = experiment(tmp_path, network=with_norm, options={"note": 3}).decisive_options()
    assert options["benchmark"] == "Tiny"
    assert options["training.lr"] == 0.1
    assert options["method.lwf.temperature"] == 2.0
    assert options["adaptation.adabn_s.epochs"] == 5
    assert options["data.batch_size"] == 4
    assert options["note"] == 3
    others = {"methods": ["FT", "Joint"], "seeds": [1, 2], "adaptations": ["AdaBN"], "loggers": "csv"}
    trainer = TrainerOptions("cpu", enable_progress_bar=True, log_every_n_steps=3)
    other = experiment(tmp_path, network=with_norm, options={"note": 3}, trainer=trainer, **others)
    assert other.decisive_options() == options


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"training": TrainingOptions(epochs=1, lr=0.2)}, "training.lr"),
        ({"method": MethodOptions(ewc=EWCOptions(2.0))}, "method.ewc.strength"),
        ({"adaptation": AdaptationOptions(adabn=AdaBN(exact=True))}, "adaptation.adabn.exact"),
        ({"trainer": TrainerOptions("cpu", precision="64-true")}, "trainer.precision"),
        ({"models": "last"}, "models"),
        ({"network": NetworkOptions()}, "network.name"),
    ],
)
def test_each_option_that_results_depend_on_is_decisive(tmp_path, option, name):
    before, after = (experiment(tmp_path, **options).decisive_options() for options in ({}, option))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert name in changed
    assert name == "network.name" or changed == {name}


def test_every_option_of_a_method_and_an_adaptation_is_on_the_command_line():
    parser = ArgumentParser()
    parser.add_class_arguments(Experiment, skip={"data", "network"})
    shown = parser.format_help()
    families = {method.family.name: method.family.Options for method in METHODS.values()}
    for group, kinds in (("method", families), ("adaptation", ADAPTATIONS)):
        for name, kind in kinds.items():
            for option in fields(kind):
                assert f"--{group}.{name.lower().replace('-', '_')}.{option.name} " in shown
