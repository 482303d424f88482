"""Methods and adaptations of others: one registration each, then everything works by name."""

import csv
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, call, experiment, loaded, matrix, model, plain

from pl_personalize.adaptations import ADAPTATIONS, Adaptation
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.artifacts import ArtifactError
from pl_personalize.methods import METHODS, Method
from pl_personalize.methods.experts import ExpertsFamily, Merge
from pl_personalize.methods.sequence import SequenceFamily
from pl_personalize.modules import TaskLearner
from pl_personalize.runner import AdaptationOptions, MethodOptions
from pl_personalize.runner.server_run import load_adapted


@dataclass(frozen=True)
class BiasOfTheHead(Adaptation):
    """Adds a constant to the bias of the first class."""

    name, text, reads = "bias", "a constant added to the first logit", "nothing"
    constant: float = 100.0

    def adapt(self, network, device, received):
        return {"head.bias": network.head.bias + torch.tensor([self.constant, 0.0])}


@dataclass(frozen=True)
class ShrunkOptions:
    """Training with other steps."""

    factor: float = 0.5


class ShrunkFamily(SequenceFamily):
    """One model through all tasks, with shrunk learning rates after the first."""

    name, Options = "Shrunk", ShrunkOptions
    shares_first = True

    def learner(self, task, network, before):
        options = self.workspace.learner_options(task)
        factor = self.options.factor if task or not self.shares_first else 1.0
        return TaskLearner(network, l2_transfer=0.0, **(options | {"lr": options["lr"] * factor}))


@dataclass(frozen=True)
class OurOptions(MethodOptions):
    """The options of the package's methods and of ours."""

    shrunk: Any = field(default_factory=ShrunkOptions)


@contextmanager
def registration():
    ADAPTATIONS.register(BiasOfTheHead)
    METHODS.register(Method("Shrunk", ShrunkFamily, "shrunk steps"))
    try:
        yield
    finally:
        ADAPTATIONS.unregister("bias")
        METHODS.unregister("Shrunk")


@pytest.fixture
def registered():
    with registration():
        yield
    assert "bias" not in ADAPTATIONS
    assert "Shrunk" not in METHODS


@pytest.mark.usefixtures("registered")
def test_an_adaptation_of_somebody_else(tmp_path, capsys):
    methods, adaptations = ["mean-IMM", "FT", "LwF"], ["none", "bias", "FT+bias"]
    options = AdaptationOptions(ft=FineTune(epochs=1))
    rows = call(tmp_path, methods=methods, adaptations=adaptations, adaptation=options)
    assert {row.label for row in rows} == {m if a == "none" else f"{m}+{a}" for m in methods for a in adaptations}
    assert "bias: a constant added to the first logit" in capsys.readouterr().out
    data, names = Tiny(), {"mean-IMM": "experts", "FT": "experts", "LwF": "LwF"}
    for method, family in names.items():
        for adaptation in adaptations[1:]:
            for user in data.users:
                found = matrix(tmp_path, f"{family}/seed1/test/{method}+{adaptation}/{user}")
                shares = [float((data.user_split(user, task)[1].labels == 0).float().mean()) for task in (0, 1)]
                last = [found[k][k] for k in (0, 1)] if method == "FT" else found[-1]
                assert last == pytest.approx(shares)  # everything is the first class
    state = load_adapted(tmp_path / "adapted" / "experts" / "seed1" / "server-mean-IMM-bias.safetensors")
    assert all(set(entries) == {"head.bias"} for entries in state.values())


@pytest.mark.usefixtures("registered")
def test_a_method_of_somebody_else_with_its_own_options(tmp_path):
    rows = call(tmp_path, methods=["Shrunk", "Finetune"], method=OurOptions(shrunk=ShrunkOptions(0.0001)))
    assert {row.method for row in rows} == {"Shrunk", "Finetune"}
    start, still, moved = (model(tmp_path, family, t)["body.0.weight"] for family, t in
                           (("Shrunk", 1), ("Shrunk", 2), ("Finetune", 2)))  # fmt: skip
    assert (still - start).abs().max() < 1e-3 < (moved - start).abs().max()
    assert loaded(model(tmp_path, "Shrunk", 2)).num_classes == 2
    options = experiment(tmp_path, methods="Shrunk", method=OurOptions()).decisive_options()
    assert options["method.shrunk.factor"] == 0.5
    default = call(tmp_path / "default", methods=["Shrunk+bias"])  # its options have defaults
    assert {row.label for row in default} == {"Shrunk+bias"}


@pytest.mark.usefixtures("registered")
def test_a_new_entry_changes_no_default(tmp_path):
    made = experiment(tmp_path, methods=METHODS)
    assert "Shrunk" in made.methods
    assert "Shrunk" not in experiment(tmp_path).methods
    assert [v.label for v in experiment(tmp_path).variants(plain(2))] == ["mean-IMM"]
    assert "bias" not in str(experiment(tmp_path).decisive_options())


def test_results_of_what_is_no_longer_registered_are_passed_over(tmp_path):
    with registration():
        call(tmp_path, methods=["Finetune+bias"])
    rows = call(tmp_path, methods=["Finetune"], loggers=["csv"])
    assert {row.label for row in rows} == {"Finetune"}
    (results,) = csv.DictReader((tmp_path / "csv" / "Finetune-seed1" / "results" / "metrics.csv").open())
    assert set(results) >= {"Finetune/ann/avg_acc"}
    assert not [name for name in results if "bias" in name]


@dataclass(frozen=True)
class Curious(BiasOfTheHead):
    """Says that it reads nothing, and counts the user's images."""

    name = "curious"

    def adapt(self, network, device, received):
        return super().adapt(network, device, received) if list(device.images()) else {}


@pytest.fixture
def curious():
    ADAPTATIONS.register(Curious)
    yield
    ADAPTATIONS.unregister("curious")


@pytest.mark.usefixtures("curious")
def test_data_that_an_adaptation_does_not_declare_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="'curious' has reads='nothing', but uses images"):
        call(tmp_path, methods=["mean-IMM"], adaptations=["curious"])


def test_a_family_shares_its_first_model_only_if_it_says_so(tmp_path):
    class Apart(ShrunkFamily):
        name, shares_first = "Apart", False

    METHODS.register(Method("Apart", Apart, "shrunk steps from the beginning"))
    try:
        together = call(tmp_path / "together", methods=["Finetune", "Apart"])
        alone = call(tmp_path / "alone", methods=["Apart"])
    finally:
        METHODS.unregister("Apart")
    assert [row for row in together if row.method == "Apart"] == alone
    assert (tmp_path / "together" / "checkpoints" / "Apart" / "seed1" / "task1.safetensors").is_file()
    assert (tmp_path / "together" / "checkpoints" / "first" / "seed1" / "task1.safetensors").is_file()


def test_two_families_of_one_name_are_refused(tmp_path):
    class Namesake(ShrunkFamily):
        name = "Finetune"

    METHODS.register(Method("Namesake", Namesake, "another family of that name"))
    try:
        with pytest.raises(MisconfigurationException, match=r"Two families .* Finetune, Finetune"):
            experiment(tmp_path, methods=["Finetune", "Namesake"])
    finally:
        METHODS.unregister("Namesake")


@pytest.mark.parametrize("wrong", [{"rule": "weigted"}, {"kind": "mass"}])
def test_a_merge_of_an_unknown_rule_or_kind_is_refused_when_it_is_made(wrong):
    with pytest.raises(ValueError, match="did you mean"):
        Merge("merge", ExpertsFamily, "a merge", merges=True, **wrong)


def test_a_personal_merge_by_importances_that_need_labels_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="empirical_fisher importances need labels"):
        Merge("merge", ExpertsFamily, "a merge", merges=True, kind="empirical_fisher", personal=True)


def test_options_of_a_late_registration_are_decisive_once_it_is_used(tmp_path):
    with registration():
        call(tmp_path, methods=["mean-IMM"])  # the folder knows nothing of it
        call(tmp_path, methods=["mean-IMM"], adaptations=["bias"])

    @dataclass(frozen=True)
    class Stronger(BiasOfTheHead):
        constant: float = 200.0

    ADAPTATIONS.register(Stronger)
    try:
        call(tmp_path, methods=["mean-IMM"])
        with pytest.raises(ArtifactError, match=r"constant: 100[.]0 there, 200[.]0 now"):
            call(tmp_path, methods=["mean-IMM"], adaptations=["bias"])
    finally:
        ADAPTATIONS.unregister("bias")
