"""The experts, and what the published code does otherwise."""

import pytest
import torch
from tiny_benchmark import Tiny, call, loaded, model

from pl_personalize import Importance, estimate_importance, merge
from pl_personalize.artifacts import TensorFile
from pl_personalize.callbacks import ParameterPenalty
from pl_personalize.methods import METHODS, Method
from pl_personalize.methods.experts import ExpertsFamily
from pl_personalize.modules import MergeModule, TaskLearner
from pl_personalize.runner import ImportanceOptions, TrainingOptions


def importance_of(folder, owner, kind, task):
    return Importance.load(folder / "importances" / "experts" / "seed1" / f"{owner}-{kind}-task{task}.safetensors")


def test_merges_weight_the_experts_by_the_importances_of_server_or_user(tmp_path):
    data, methods = (
        Tiny(),
        {"mean-IMM": None, "MAS-IMM": "mas", "FIM-IMM": "fisher", "MAS-RACL": "mas", "FIM-RACL": "fisher"},
    )
    call(tmp_path, data=data, methods=list(methods))
    experts = [loaded(model(tmp_path, "experts", task)) for task in (1, 2)]
    bodies, seen = [expert.body.state_dict() for expert in experts], []
    for method, kind in methods.items():
        for number, user in enumerate(data.users):
            images = [
                [data.user_split(number, task)[0].images]
                if METHODS[method].personal
                else [split.images for split in data.server_split(task)]
                for task in (0, 1)
            ]
            importances = kind and [
                estimate_importance(
                    expert, batches, kind, module="body", **({"draws": "all"} if kind == "fisher" else {})
                )
                for expert, batches in zip(experts, images, strict=True)
            ]
            merged = TensorFile(
                tmp_path / "merged" / "experts" / "seed1" / f"{user}-{method}.safetensors", kind="merged"
            )
            for name, value in merge(bodies, importances).items():
                torch.testing.assert_close(merged[f"body.{name}"], value, msg=f"{method}, {user}, {name}")
            seen.append(merged["body.0.weight"])
    assert len({tuple(one.flatten().tolist()) for one in seen}) == 3 + 2 * 2  # IMM is the same for both users


def test_published_fim_imm_adds_the_estimates_of_train_and_val(tmp_path, monkeypatch):
    data = Tiny()
    monkeypatch.setattr(torch, "multinomial", lambda chances, *args, **options: chances.argmax(1, keepdim=True))
    call(tmp_path, data=data, methods=["FIM-IMM"], importance=ImportanceOptions(reduction="batch"))

    for task in range(2):
        trained = loaded(model(tmp_path, "experts", task + 1))
        right = 0.0
        for split in ("train", "val"):
            squares = []
            for x, _ in data.server_dataloader(task, split):
                loss = torch.nn.functional.cross_entropy(trained(x), trained(x).argmax(1))
                squares.append(torch.autograd.grad(loss, trained.body[0].weight)[0].square())
            right = right + torch.stack(squares).mean(0)
        found = importance_of(tmp_path, "server", "fisher", task + 1)
        assert found.num_samples == 24
        torch.testing.assert_close(found["0.weight"], right + 1e-8)


def test_published_l2_transfer(tmp_path, monkeypatch):
    learners, penalties = [], []
    configure, penalty = TaskLearner.configure_optimizers, ParameterPenalty.__init__

    def spy(self):
        learners.append((self.hparams["task"], self.hparams["l2_transfer"], self.penalty is not None))
        return configure(self)

    monkeypatch.setattr(TaskLearner, "configure_optimizers", spy)

    def other_spy(self, *args, **options):
        penalties.append((args, options))
        penalty(self, *args, **options)

    monkeypatch.setattr(ParameterPenalty, "__init__", other_spy)
    training = TrainingOptions(epochs=1, lr=0.1, l2_transfer="reference")
    call(tmp_path, data=Tiny(tasks=3), methods=["Experts"], training=training)

    assert learners == [(0, 1.0, False), (1, 0.0, False), (2, 1.0, True)]
    assert [found for found in penalties if found[1]["module"] == "network.head"] == [
        ((1.0,), {"module": "network.head", "log_name": None})
    ]


@pytest.mark.parametrize(("reduction", "zero"), [("sample", "mean"), ("batch", "reference")])
def test_published_merges_have_zero_where_nothing_is_important(tmp_path, monkeypatch, reduction, zero):
    seen = []
    make = MergeModule.__init__

    def spy(self, *args, **options):
        seen.append(options.get("zero", "mean"))
        make(self, *args, **options)

    monkeypatch.setattr(MergeModule, "__init__", spy)
    call(tmp_path, methods=["MAS-IMM"], importance=ImportanceOptions(reduction=reduction))
    assert set(seen) == {zero}


def test_only_the_importances_that_methods_need_are_estimated(tmp_path):
    call(tmp_path, methods=["FIM-RACL", "mean-IMM", "Experts"])
    found = {path.stem for path in (tmp_path / "importances").rglob("*.safetensors")}
    assert found == {f"{user}-fisher-task{task}" for user in ("ann", "bob") for task in (1, 2)}


def test_the_methods_of_the_package():
    merges = ["MAS-RACL", "FIM-RACL", "MAS-IMM", "FIM-IMM", "mean-IMM"]
    assert list(METHODS) == [*merges, "MAS", "EWC", "LwF", "Finetune", "FT", "Experts", "Joint"]
    assert [name for name, method in METHODS.items() if method.merges] == merges
    assert [name for name, method in METHODS.items() if method.family is ExpertsFamily] == [*merges, "FT", "Experts"]
    assert all(isinstance(method, Method) and method.text and method.reference for method in METHODS.values())
