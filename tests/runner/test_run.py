"""Calls of run_experiment after one another in one folder, and what it refuses."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call, plain, with_norm
from wandb_file import read_run

from pl_personalize import ArtifactError, BatchNormStatistics
from pl_personalize.artifacts import TensorFile
from pl_personalize.modules import sequence_evaluator
from pl_personalize.runner import (
    AdaptationOptions,
    TrainerOptions,
    TrainingOptions,
    WandbOptions,
)
from pl_personalize.runner.methods import METHODS, Method
from pl_personalize.runner.server_run import ServerRun


def logged(folder, stage, server="IMM") -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "csv" / f"{server}-seed1" / stage / "metrics.csv").open()))


@pytest.mark.parametrize("name", ["server", "all", "", "..", "a/b"])
def test_users_whose_name_has_a_meaning_are_refused(name, tmp_path):
    with pytest.raises(MisconfigurationException, match=f"cannot be called '{name}'"):
        call(tmp_path, data=Tiny([name, "bob"]))


def test_a_logger_that_comes_later_is_told_of_all_methods(tmp_path):
    call(tmp_path, methods=["MAS-RACL"])
    call(tmp_path, methods=["mean-IMM"], loggers=["csv"])
    (row,) = logged(tmp_path, "results")
    assert {"MAS-RACL/ann/avg_acc", "mean-IMM/ann/avg_acc"} <= set(row)


def test_a_logger_that_was_there_is_told_of_what_came_later(tmp_path):
    call(tmp_path, methods=["mean-IMM"], loggers=["csv"])
    call(tmp_path, methods=["MAS-RACL"])
    call(tmp_path, methods=["MAS-RACL"], loggers=["csv"])
    (row,) = logged(tmp_path, "results")
    assert {"MAS-RACL/ann/avg_acc", "mean-IMM/ann/avg_acc"} <= set(row)


def test_what_is_asked_of_wandb_later_comes_later(tmp_path, capsys):
    call(tmp_path, loggers=["wandb"])
    call(tmp_path, loggers=["wandb"])  # nothing new
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    call(tmp_path, loggers=["wandb"], wandb=WandbOptions(artifacts=["experts"]))
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(read_run(second).artifacts) - len(read_run(first).artifacts) == 2  # the tables are artifacts, too
    sync = [line for line in capsys.readouterr().out.splitlines() if line.startswith("To W&B:")][-1]
    assert first.name in sync
    assert second.name in sync


class KilledError(Exception):
    pass


def test_an_interrupted_training_is_logged_once(tmp_path, monkeypatch):
    train = ServerRun._train

    def killed(self, stage, *args, **kwargs):
        done = train(self, stage, *args, **kwargs)
        if stage.endswith("task2"):
            del self.folder._stages[stage]  # it was logged, and is not finished
            raise KilledError
        return done

    options = {"trainer": TrainerOptions(accelerator="cpu", log_every_n_steps=1)}
    monkeypatch.setattr(ServerRun, "_train", killed)
    with pytest.raises(KilledError):
        call(tmp_path, loggers=["csv"], **options)
    monkeypatch.undo()
    call(tmp_path, loggers=["csv"], **options)
    steps = [row["step"] for row in logged(tmp_path, "train-task2") if row["train/loss"]]
    assert steps == ["0", "1", "2"]


def test_batch_norm_is_adapted_by_default(tmp_path):
    rows = call(tmp_path, network=with_norm, methods=["MAS-IMM", "Experts"])
    assert {row.adaptation for row in rows} == {"AdaBN"}
    folder = tmp_path / "merged" / "IMM" / "seed1"
    kept = TensorFile(folder / "ann-MAS-IMM+AdaBN-task2.safetensors", kind="batchnorm")
    assert list(kept) == ["1.running_mean", "1.running_var"]
    assert BatchNormStatistics.load(kept.path).num_samples == 12
    experts = [
        TensorFile(tmp_path / "checkpoints" / "IMM" / "seed1" / f"task{t}.safetensors", kind="expert") for t in (1, 2)
    ]
    average = BatchNormStatistics.average(
        [{name: expert[f"body.{name}"] for name in kept} for expert in experts],
    )
    merged = TensorFile(folder / "ann-MAS-IMM.safetensors", kind="merged")
    assert torch.equal(merged["body.1.running_var"], average["1.running_var"])


def test_a_merged_model_is_the_same_whatever_adaptations_are_tested(tmp_path):
    path = tmp_path / "merged" / "IMM" / "seed1" / "ann-mean-IMM.safetensors"
    rows, contents = [], []
    for adaptations in (["last"], ["average"], ["AdaBN-S", "last"]):
        rows.append(call(tmp_path, network=with_norm, adaptations=adaptations))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    assert [row for row in rows[2] if row.adaptation == "last"] == rows[0]
    tuned = TensorFile(path.parent / "ann-mean-IMM+AdaBN-S-task1.safetensors", kind="batchnorm")
    assert set(tuned) == {"1.running_mean", "1.running_var", "1.weight", "1.bias"}


def test_an_interrupted_training_of_batch_norm_is_logged_once(tmp_path, monkeypatch):
    options = {"network": with_norm, "adaptations": ["AdaBN-S"], "trainer": TrainerOptions("cpu", log_every_n_steps=1)}
    test = ServerRun._test

    def killed(self, variant, user, stage):
        done = test(self, variant, user, stage)
        if user == "bob":
            del self.folder._stages[stage]
            raise KilledError
        return done

    monkeypatch.setattr(ServerRun, "_test", killed)
    with pytest.raises(KilledError):
        call(tmp_path, loggers=["csv"], **options)
    monkeypatch.undo()
    call(tmp_path, loggers=["csv"], **options)
    lengths = [len(logged(tmp_path, f"test-mean-IMM+AdaBN-S-{user}-model1-task1")) for user in ("ann", "bob")]
    assert lengths[0] == lengths[1] > 0


def test_every_adaptation_of_every_method(tmp_path, capsys):
    adaptations = ["last", "average", "expert", "reference", "recalibrate", "AdaBN", "AdaBN-S"]
    rows = call(
        tmp_path,
        network=with_norm,
        methods=["mean-IMM", "Experts", "Joint"],
        seeds=[1, 2],
        adaptations=adaptations,
        adaptation=AdaptationOptions(epochs=2, lr=0.1),
        loggers=["csv"],
    )
    found = {(row.method, row.adaptation) for row in rows}
    own = ["last", "recalibrate", "AdaBN", "AdaBN-S"]
    assert found == {("mean-IMM", a) for a in adaptations} | {(m, a) for m in ("Experts", "Joint") for a in own}
    assert "mean-IMM+expert/bob/avg_acc" in logged(tmp_path, "results")[0]
    output = capsys.readouterr().out
    for title in ("all users", "user ann", "user bob"):
        header = next(line for line in output.splitlines() if line.startswith(f"| {title} "))
        assert [cell.strip() for cell in header.split("|")[2:-1]] == adaptations
    assert (tmp_path / "figures" / "methods.png").is_file()


def test_a_model_that_all_users_have_is_recalibrated_once(tmp_path, monkeypatch):
    cells = []
    estimate = sequence_evaluator.re_estimate
    monkeypatch.setattr(sequence_evaluator, "re_estimate", lambda *args: cells.append(args) or estimate(*args))
    options = {"network": with_norm, "methods": ["mean-IMM", "MAS-RACL"], "adaptations": ["recalibrate"]}
    once = call(tmp_path / "once", **options)
    tested, users = 3, 2  # the first model on one task, the second on both
    assert len(cells) == tested + users * tested

    monkeypatch.setattr(Method, "personal", True)
    assert call(tmp_path / "each", **options) == once
    assert len(cells) == tested + users * tested + 2 * users * tested


@pytest.mark.parametrize("network", [plain, with_norm])
def test_the_last_models_alone_have_the_same_accuracy_and_no_forgetting(network, tmp_path):
    methods = ["mean-IMM", "FIM-RACL", "Finetune", "LwF", "FT", "Experts", "Joint"]
    adaptations = ["last", "expert", "AdaBN-S"] if network is with_norm else None
    found = {
        models: call(tmp_path / models, network=network, methods=methods, adaptations=adaptations, models=models)
        for models in ("all", "last")
    }

    assert [replace(row, forgetting=None) for row in found["all"]] == found["last"]
    assert any(row.forgetting is not None for row in found["all"])
    with pytest.raises(ArtifactError, match="models"):
        call(tmp_path / "last", network=network, methods=methods, adaptations=adaptations)


def test_the_reference_batch_norm_needs_all_models(tmp_path):
    with pytest.raises(MisconfigurationException, match="earlier merges"):
        call(tmp_path, network=with_norm, adaptations=["reference"], models="last")


def test_trained_batch_norm_is_trained(tmp_path):
    options = {"network": with_norm, "data": Tiny(images=40), "adaptations": ["AdaBN", "AdaBN-S"]}
    still = call(tmp_path / "0", adaptation=AdaptationOptions(epochs=1, lr=1e-9), **options)
    trained = call(tmp_path / "1", adaptation=AdaptationOptions(epochs=30, lr=0.1), **options)

    def accuracies(rows, adaptation):
        return [row.avg_acc for row in rows if row.adaptation == adaptation]

    assert accuracies(still, "AdaBN-S") == accuracies(still, "AdaBN")  # γ and β have not moved
    assert accuracies(trained, "AdaBN") == accuracies(still, "AdaBN")
    assert accuracies(trained, "AdaBN-S") != accuracies(still, "AdaBN")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptations": ["AdaBN"]}, "have no meaning for a network without batch norm"),
        ({"network": with_norm, "adaptations": ["none"]}, r"must be of last, average, .*; got \['none'\]"),
        ({"network": with_norm, "adaptations": ["last", "last"]}, "each once"),
        ({"network": with_norm, "adaptation": AdaptationOptions(epochs=0)}, "adaptation.epochs must be at least 1"),
        ({"network": with_norm, "adaptation": AdaptationOptions(prior_samples=-1)}, "prior_samples must be 0 or more"),
        ({"network": with_norm, "adaptations": ["average"], "methods": ["Experts"]}, "for Experts, which is no merge"),
        ({"loggers": ["csv", "csv"]}, "loggers must be each once"),
        ({"models": "own"}, "models: there is no 'own'. There are all, last"),
        ({"seeds": "12"}, "A seed must be an integer; got '1'"),
        ({"seeds": [1.5]}, r"A seed must be an integer; got 1\.5"),
        ({"trainer": TrainerOptions(accelerator="abacus")}, "trainer: .*abacus"),
        ({"trainer": TrainerOptions(accelerator="cpu", log_every_n_steps=0)}, "log_every_n_steps must be at least 1"),
        ({"training": TrainingOptions(momentum=1.5)}, r"momentum must be in \[0, 1\); got 1.5"),
        ({"training": TrainingOptions(weight_decay=-1)}, "weight_decay must be 0 or more; got -1"),
        ({"training": TrainingOptions(lr_patience=0)}, "training.lr_patience must be at least 1; got 0"),
        ({"training": TrainingOptions(stop_patience=-1)}, "training.stop_patience must be at least 1; got -1"),
        ({"methods": ["ewc"]}, "methods: there is no 'ewc'; did you mean EWC[?] There are MAS-RACL, FIM-RACL, "),
        ({"methods": ["fisher-racl"]}, "no 'fisher-racl'; did you mean FIM-RACL[?]"),
        ({"methods": ["something"]}, "no 'something'[.] There are"),
        ({"wandb": WandbOptions(images_of=["ann"])}, "need 'wandb' among the loggers"),
        ({"data": Tiny(images=0)}, "no train images of the server for the task 'a'"),
        ({"training": TrainingOptions(epochs=2, lr=1e30)}, "diverged .* smaller training.lr"),
    ],
)
def test_what_cannot_work_is_refused(options, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        call(tmp_path, **options)


def frozen(classes):
    network = plain(classes)
    network.body.requires_grad_(False)
    return network


def test_numpys_integers_are_seeds(tmp_path):
    rows = call(tmp_path, seeds=np.arange(1, 3))
    assert {row.seed for row in rows} == {1, 2}
    assert all(type(row.seed) is int for row in rows)


def test_one_adaptation_needs_no_list(tmp_path):
    assert {row.adaptation for row in call(tmp_path, network=with_norm, adaptations="last")} == {"last"}


@pytest.mark.parametrize("method", ["MAS-RACL", "FIM-IMM", "MAS", "EWC"])
def test_a_frozen_body_has_no_importances_which_is_said_before_anything_is_done(tmp_path, method):
    with pytest.raises(MisconfigurationException, match=rf"no importances for {method}\. "):
        call(tmp_path, network=frozen, methods=[method, "Experts"])
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_body_is_no_obstacle_for_other_methods(tmp_path):
    methods = ["mean-IMM", "LwF", "Finetune", "FT", "Experts", "Joint"]
    assert {row.method for row in call(tmp_path, network=frozen, methods=methods)} == set(methods)


@pytest.mark.parametrize("adaptations", [["last"], ["AdaBN-S"]])
def test_what_is_logged_of_a_test_is_what_the_table_has(tmp_path, adaptations):
    rows = call(
        tmp_path,
        data=Tiny(images=40),
        network=with_norm,
        methods=["mean-IMM", "LwF", "FT", "Experts", "Joint"],
        adaptations=adaptations,
        training=TrainingOptions(epochs=3, lr=0.1),
        loggers=["csv"],
    )
    for row in rows:
        if row.user == "all":
            continue
        method = METHODS[row.method]
        stage = f"test-{row.label}-{row.user}"
        (line,) = logged(tmp_path, stage, method.server)
        assert float(line["test/avg_acc"]) == pytest.approx(row.avg_acc / 100), stage
        assert ("test/forgetting" in line) == (row.forgetting is not None), stage
        if row.forgetting is not None:
            assert float(line["test/forgetting"]) == pytest.approx(row.forgetting / 100, abs=1e-6), stage
        if method.one_each:
            tested = {name for name in line if name.startswith("test/acc/")}
            assert tested == {f"test/acc/t{t}/task{t}" for t in (1, 2)}


def test_every_adaptation_in_double_precision(tmp_path):
    rows = call(
        tmp_path,
        network=with_norm,
        methods=["mean-IMM", "FIM-RACL", "LwF", "FT", "Joint"],
        adaptations=["last", "recalibrate", "AdaBN", "AdaBN-S"],
        trainer=TrainerOptions(accelerator="cpu", precision="64-true"),
    )
    assert len({row.label for row in rows}) == 20
    path = tmp_path / "merged" / "IMM" / "seed1" / "ann-mean-IMM+AdaBN-task1.safetensors"
    assert BatchNormStatistics.load(path)["1.running_mean"].dtype == torch.float64


def test_it_says_how_good_the_experts_are(tmp_path, capsys):
    call(tmp_path, methods=["mean-IMM", "Joint"], seeds=[1, 2])
    output = capsys.readouterr().out
    table = output[output.index("| task ") :].split("\n\n")[0]
    assert table in (tmp_path / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    for row, task in zip(rows[2:], (1, 2), strict=True):
        accuracies = [100 * stages[f"IMM/seed{seed}/train/task{task}"]["result"]["val_acc"] for seed in (1, 2)]
        assert row == [["a", "b"][task - 1], "2", "50.0", f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"]

    call(tmp_path, methods=["Joint"])
    assert "experts" not in capsys.readouterr().out


def test_it_says_where_models_are(tmp_path, capsys):
    call(tmp_path, methods=["FT"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Models:")]
    assert line == f"Models:      {tmp_path / 'checkpoints'}, {tmp_path / 'finetuned'} (for each user)"


def test_figures_of_an_earlier_call_do_not_stay(tmp_path: Path):
    call(tmp_path, methods=["MAS-IMM"])
    call(tmp_path, methods=["mean-IMM"])
    assert [path.name for path in (tmp_path / "figures").glob("matrix-*")] == ["matrix-mean-IMM.png"]
