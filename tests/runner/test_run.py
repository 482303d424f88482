"""Experiments from options to results: what is tested, written and printed."""

import csv
import json
from dataclasses import replace
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call, plain, with_norm
from torch import nn

from pl_personalize import ArtifactError
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.adaptations.reestimated_statistics import AdaBNSupervised
from pl_personalize.artifacts import TensorFile
from pl_personalize.methods import METHODS
from pl_personalize.models import TaskNetwork
from pl_personalize.runner import AdaptationOptions, TrainerOptions, TrainingOptions
from pl_personalize.runner.server_run import load_adapted

METHODS_OF_ALL_KINDS = ["mean-IMM", "FIM-RACL", "LwF", "FT", "Experts", "Joint"]
ADAPTATIONS = ["last", "average", "expert", "reference", "recalibrate", "AdaBN", "AdaBN-S"]
OPTIONS = {
    "data": Tiny(images=40),
    "network": with_norm,
    "methods": METHODS_OF_ALL_KINDS,
    "training": TrainingOptions(epochs=3, lr=0.1),
    "adaptation": AdaptationOptions(ft=FineTune(epochs=1, lr=0.1), adabn_s=AdaBNSupervised(epochs=1, lr=0.1)),
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every adaptation of methods of every kind."""
    folder = tmp_path_factory.mktemp("run")
    rows = call(folder, **OPTIONS, adaptations=ADAPTATIONS, loggers=["csv"])
    return SimpleNamespace(folder=folder, rows=rows)


def logged(folder, stage, family="experts") -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "csv" / f"{family}-seed1" / stage / "metrics.csv").open()))


def test_every_adaptation_that_applies_to_a_method_is_in_the_table(everything):
    own = [name for name in ADAPTATIONS if name not in ("average", "expert", "reference")]
    expected = {(m, a) for m in METHODS_OF_ALL_KINDS for a in (ADAPTATIONS if METHODS[m].merges else own)}
    assert {(row.method, row.adaptation) for row in everything.rows} == expected
    assert {row.user for row in everything.rows} == {"ann", "bob", "all"}
    assert (everything.folder / "figures" / "methods.png").is_file()
    assert len(list((everything.folder / "figures").glob("matrix-*.png"))) == len(expected)
    tables = (everything.folder / "results.md").read_text().splitlines()
    for title in ("all users", "user ann", "user bob"):
        header = next(line for line in tables if line.startswith(f"| {title} "))
        assert [cell.strip() for cell in header.split("|")[2:-1]] == ADAPTATIONS


def test_what_is_logged_of_a_test_is_what_the_table_has(everything):
    for row in everything.rows:
        if row.user == "all":
            continue
        method = METHODS[row.method]
        stage = f"test-{row.label}-{row.user}"
        (line,) = logged(everything.folder, stage, method.family.name)
        assert float(line["test/avg_acc"]) == pytest.approx(row.avg_acc / 100), stage
        assert ("test/forgetting" in line) == (row.forgetting is not None), stage
        if row.forgetting is not None:
            assert float(line["test/forgetting"]) == pytest.approx(row.forgetting / 100, abs=1e-6), stage
        if method.one_each:
            assert {name for name in line if name.startswith("test/acc/")} == {"test/acc/t1/task1", "test/acc/t2/task2"}
    (results,) = logged(everything.folder, "results")
    assert "mean-IMM+expert/bob/avg_acc" in results


def assert_same_without_forgetting(all_models, last):
    chosen = [row for row in all_models if row.label in {one.label for one in last}]
    assert [replace(row, forgetting=None) for row in chosen] == last
    assert any(row.forgetting is not None for row in chosen)


def test_the_last_models_alone_have_the_same_accuracy_and_no_forgetting(everything, tmp_path):
    last = call(tmp_path, **OPTIONS, adaptations=["last", "expert", "AdaBN-S"], models="last")
    assert_same_without_forgetting(everything.rows, last)
    with pytest.raises(ArtifactError, match="models: 'last' there, 'all' now"):
        call(tmp_path, **OPTIONS, adaptations=["last"])


def test_the_last_models_alone_without_batch_norm(tmp_path):
    options = OPTIONS | {"network": plain, "methods": ["mean-IMM", "Finetune", "FT", "Joint"]}
    found = [call(tmp_path / models, **options, models=models) for models in ("all", "last")]
    assert_same_without_forgetting(*found)


def test_batch_norm_is_adapted_by_default(tmp_path):
    rows = call(tmp_path, network=with_norm, methods=["MAS-IMM", "Experts"])
    assert {row.adaptation for row in rows} == {"AdaBN"}
    entries = load_adapted(tmp_path / "adapted" / "experts" / "seed1" / "ann-MAS-IMM-AdaBN.safetensors")
    assert set(entries) == {(0, 0), (1, 0), (1, 1)}
    assert {name for own in entries.values() for name in own} == {"body.1.running_mean", "body.1.running_var"}


def test_a_merged_model_has_the_average_statistics_whatever_adaptations_are_tested(tmp_path):
    path = tmp_path / "merged" / "experts" / "seed1" / "ann-mean-IMM.safetensors"
    rows, contents = [], []
    for adaptations in (["last"], ["average"], ["recalibrate", "last"]):
        rows.append(call(tmp_path, network=with_norm, adaptations=adaptations))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    assert [row for row in rows[2] if row.adaptation == "last"] == rows[0]
    experts = [tmp_path / "checkpoints" / place for place in ("first/seed1/task1", "experts/seed1/task2")]
    means = [TensorFile(f"{expert}.safetensors", kind="expert")["body.1.running_mean"] for expert in experts]
    torch.testing.assert_close(TensorFile(path, kind="merged")["body.1.running_mean"], (means[0] + means[1]) / 2)


def test_adaptations_in_double_precision(tmp_path):
    rows = call(
        tmp_path,
        network=with_norm,
        methods=["mean-IMM", "FIM-RACL", "LwF", "FT", "Joint"],
        adaptations=["recalibrate", "AdaBN-S"],
        adaptation=OPTIONS["adaptation"],
        trainer=TrainerOptions(accelerator="cpu", precision="64-true"),
    )
    assert len({row.label for row in rows}) == 10
    entries = load_adapted(tmp_path / "adapted" / "experts" / "seed1" / "ann-FT-FT+AdaBN-S.safetensors")
    assert {value.dtype for own in entries.values() for value in own.values() if value.ndim} == {torch.float64}


# Refused with the network and the data at hand


def frozen(classes):
    network = plain(classes)
    network.body.requires_grad_(False)
    return network


@pytest.mark.parametrize("method", ["MAS-RACL", "FIM-IMM", "MAS", "EWC"])
def test_a_frozen_body_has_no_importances_which_is_said_before_anything_is_done(tmp_path, method):
    with pytest.raises(MisconfigurationException, match=rf"no importances for {method}\. "):
        call(tmp_path, network=frozen, methods=[method, "Experts"])
    assert list(tmp_path.iterdir()) == []


def test_a_network_whose_state_is_more_than_tensors_is_refused_before_anything_is_done(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(MisconfigurationException, match=r"no tensors .* body\.0\._extra_state"):
        call(tmp_path, network=lambda classes: TaskNetwork(nn.Sequential(Counting(4, 5)), nn.Linear(5, classes)))
    assert not (tmp_path / "manifest.json").exists()


def test_a_frozen_body_is_no_obstacle_for_other_methods(tmp_path):
    methods = ["mean-IMM", "LwF", "Finetune", "FT", "Experts", "Joint"]
    assert {row.method for row in call(tmp_path, network=frozen, methods=methods)} == set(methods)


@pytest.mark.parametrize(("method", "adaptation"), [("FT", "none"), ("mean-IMM", "AdaBN-S")])
def test_an_adaptation_that_diverges_is_no_result(tmp_path, method, adaptation):
    options = AdaptationOptions(ft=FineTune(epochs=2, lr=1e30), adabn_s=AdaBNSupervised(epochs=4, lr=1e38))
    with pytest.raises(MisconfigurationException, match=r"/adapt/.* diverged .* learning rate of the adaptation"):
        call(tmp_path, network=with_norm, methods=[method], adaptations=adaptation, adaptation=options)


# Reports


def test_it_says_how_good_the_experts_are(tmp_path, capsys):
    call(tmp_path, methods=["mean-IMM", "Joint"], seeds=[1, 2])
    output = capsys.readouterr().out
    table = output[output.index("| task ") :].split("\n\n")[0]
    assert table in (tmp_path / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    for row, name, task in zip(rows[2:], ("first", "experts"), (1, 2), strict=True):
        accuracies = [100 * stages[f"{name}/seed{seed}/train/task{task}"]["result"]["val_acc"] for seed in (1, 2)]
        assert row == [["a", "b"][task - 1], "2", "50.0", f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"]

    call(tmp_path, methods=["Joint"], seeds=[1, 2])
    output = capsys.readouterr().out
    assert "experts" not in output.replace(str(tmp_path), "")
    assert "Every stage was finished before." in output


def test_it_says_where_files_are_and_removes_figures_of_earlier_calls(tmp_path, capsys):
    call(tmp_path, methods=["MAS-IMM"])
    capsys.readouterr()
    call(tmp_path, methods=["FT"])
    assert [path.name for path in (tmp_path / "figures").glob("matrix-*")] == ["matrix-FT.png"]
    lines = capsys.readouterr().out.splitlines()
    places = ", ".join(
        f"{tmp_path / name}{note}"
        for name, note in (("checkpoints", ""), ("merged", " (for each user)"), ("adapted", " (for each user)"))
    )
    assert f"Models:      {places}" in lines
    assert f"Results:     {tmp_path / 'results.csv'}, {tmp_path / 'results.md'}" in lines
    assert any(line.startswith("Time:        adapt ") and " test " in line and "the rest" in line for line in lines)
