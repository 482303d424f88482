"""Methods that train one model through all tasks: how they train, and with which heads they are tested."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Finished, KilledError, Tiny, accuracy, call, loaded, matrix, model

from pl_personalize import Importance, estimate_importance
from pl_personalize.callbacks import ParameterPenalty
from pl_personalize.functional.state_dicts import PrefixView
from pl_personalize.methods.lwf import LwFOptions
from pl_personalize.methods.penalties import EWCOptions, MASOptions
from pl_personalize.modules import LwFLearner
from pl_personalize.runner import ImportanceOptions, MethodOptions, TrainingOptions
from pl_personalize.stages.checkpoints import Checkpoints

LONGER = TrainingOptions(epochs=4, lr=0.1)


def test_without_strength_all_are_plain_finetuning(tmp_path):
    nothing = MethodOptions(mas=MASOptions(0.0), ewc=EWCOptions(0.0), lwf=LwFOptions(0.0))
    call(tmp_path, data=Tiny(tasks=3), methods=["MAS", "EWC", "LwF", "Finetune"], training=LONGER, method=nothing)

    for task in (2, 3):
        for name, value in model(tmp_path, "Finetune", task).items():
            for family in ("MAS", "EWC"):
                assert torch.equal(model(tmp_path, family, task)[name], value), (family, task, name)
            torch.testing.assert_close(model(tmp_path, "LwF", task)[name], value)


def test_all_methods_share_the_first_model_which_is_trained_once(tmp_path, monkeypatch):
    families = {"mean-IMM": "experts", "MAS": "MAS", "LwF": "LwF"}
    for method in families:  # each on its own
        call(tmp_path / method, methods=[method])
    finished = Finished(monkeypatch)
    for some in (["MAS"], list(families)):
        call(tmp_path / "all", methods=some)

    trained = [stage for stage in finished.stages if "/train/" in stage]
    assert trained == ["first/seed1/train/task1"] + [
        f"{family}/seed1/train/task2" for family in ("MAS", "experts", "LwF")
    ]
    for method, family in families.items():
        for task in (1, 2):
            alone = model(tmp_path / method, family, task)
            for name, value in model(tmp_path / "all", family, task).items():
                assert torch.equal(value, alone[name]), (family, task, name)


def test_the_first_model_is_taken_over_after_a_training_that_was_interrupted(tmp_path, monkeypatch):
    def killed(self, trainer, *args, **kwargs):
        trainer.save_checkpoint(self.resume)
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_train_batch_end", killed)
        with pytest.raises(KilledError):
            call(tmp_path, methods=["MAS"])
    interrupted = tmp_path / "checkpoints" / "first" / "seed1" / "task1"
    assert interrupted.is_dir()
    call(tmp_path, methods=["EWC"])
    assert not interrupted.exists()
    call(tmp_path, methods=["MAS"])
    call(tmp_path / "alone", methods=["MAS"])

    for name, value in model(tmp_path / "alone", "MAS", 2).items():
        assert torch.equal(model(tmp_path, "MAS", 2)[name], value)


@pytest.mark.parametrize(("reduction", "times"), [("sample", 1), ("batch", 4)])
@pytest.mark.parametrize(("family", "kind"), [("MAS", "mas"), ("EWC", "empirical_fisher")])
def test_each_model_is_pulled_to_the_last_one_by_the_importances_of_the_training_images(
    tmp_path, monkeypatch, family, kind, reduction, times
):
    made = []
    real = ParameterPenalty.__init__

    def spy(self, strength, importances, anchor, **options):
        made.append((strength, [Path(path).stem for path in importances], anchor))
        real(self, strength, importances, anchor, **options)

    monkeypatch.setattr(ParameterPenalty, "__init__", spy)
    data, strengths = Tiny(tasks=3), MethodOptions(ewc=EWCOptions(0.5), mas=MASOptions(0.5))
    call(tmp_path, data=data, methods=[family], method=strengths, importance=ImportanceOptions(reduction=reduction))

    assert [strength for strength, _, _ in made] == [0.5 * (times if family == "EWC" else 1)] * 2
    stems = [f"server-{kind}-task{task}" for task in (1, 2)]  # nothing is trained after the third
    assert [names for _, names, _ in made] == [stems[:1], stems]
    folder = tmp_path / "importances" / family / "seed1"
    assert sorted(file.stem for file in folder.iterdir()) == stems
    for task, (stem, (_, _, anchor)) in enumerate(zip(stems, made, strict=True)):
        trained = model(tmp_path, family, task + 1)
        assert all(torch.equal(value, trained[f"body.{name}"]) for name, value in anchor.items())
        batches = list(zip(*(tensor.split(4) for tensor in data.server_split(task)[0]), strict=True))
        right = estimate_importance(loaded(trained), batches, kind, reduction=reduction)
        found = Importance.load(folder / f"{stem}.safetensors")
        assert (found.kind, found.reduction, found.num_samples) == (kind, reduction, 12)
        for name, value in found.items():
            torch.testing.assert_close(value, right[f"body.{name}"])


def test_a_strong_penalty_keeps_what_was_important(tmp_path):
    call(tmp_path, methods=["MAS", "Finetune"], training=LONGER, method=MethodOptions(mas=MASOptions(5.0)))
    importance = Importance.load(tmp_path / "importances" / "MAS" / "seed1" / "server-mas-task1.safetensors")
    moved = {}
    for family in ("MAS", "Finetune"):
        first, second = model(tmp_path, family, 1), model(tmp_path, family, 2)
        moved[family] = sum(
            float((omega * (second[f"body.{name}"] - first[f"body.{name}"]).square()).sum())
            for name, omega in importance.items()
        )
    assert 0 < moved["MAS"] < 0.5 * moved["Finetune"]


def with_head(state, head):
    network = loaded(state)
    network.head.load_state_dict(head)
    return network


def test_lwf_tests_each_model_with_its_own_heads(tmp_path):
    data = Tiny(tasks=3, images=200)
    call(tmp_path, data=data, methods=["LwF"], training=TrainingOptions(epochs=10, lr=0.3))
    found = matrix(tmp_path, "LwF/seed1/test/LwF/ann")
    differing = set()
    for t in range(3):
        state = model(tmp_path, "LwF", t + 1)
        for i in range(t + 1):
            split = data.user_split(0, i)[1]
            own = accuracy(with_head(state, PrefixView(state, "head" if i == t else f"old_heads.{i}")), split)
            assert found[t][i] == pytest.approx(own)
            if own != accuracy(with_head(state, PrefixView(model(tmp_path, "LwF", i + 1), "head")), split):
                differing.add((t, i))
    assert differing  # else the heads that tasks began with would do
    assert not any(t == i for t, i in differing)


def test_finetuning_tests_earlier_tasks_with_the_heads_they_had(tmp_path):
    data = Tiny(images=40)
    call(tmp_path, data=data, methods=["Finetune"], training=LONGER)
    last, first = model(tmp_path, "Finetune", 2), model(tmp_path, "Finetune", 1)
    found = matrix(tmp_path, "Finetune/seed1/test/Finetune/bob")[1][0]
    assert found == pytest.approx(accuracy(with_head(last, PrefixView(first, "head")), data.user_split(1, 0)[1]))


def test_lwf_trains_with_its_options_and_the_heads_as_they_were(tmp_path, monkeypatch):
    made = []
    fit = LwFLearner.on_fit_start

    def spy(self):
        made.append((self.strength, self.temperature, [head.weight.detach().clone() for head in self.old_heads]))
        fit(self)

    monkeypatch.setattr(LwFLearner, "on_fit_start", spy)
    call(tmp_path, data=Tiny(tasks=3), methods=["LwF"], method=MethodOptions(lwf=LwFOptions(2.5, 3.5)), training=LONGER)

    assert [(strength, temperature) for strength, temperature, _ in made] == [(2.5, 3.5)] * 3
    second = model(tmp_path, "LwF", 2)
    assert [len(heads) for _, _, heads in made] == [0, 1, 2]
    assert torch.equal(made[1][2][0], model(tmp_path, "LwF", 1)["head.weight"])
    assert torch.equal(made[2][2][0], second["old_heads.0.weight"])
    assert torch.equal(made[2][2][1], second["head.weight"])


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        (MASOptions, {"strength": -1.0}, r"method\.mas\.strength must be 0 or more; got -1\.0"),
        (EWCOptions, {"strength": float("nan")}, r"method\.ewc\.strength must be 0 or more; got nan"),
        (LwFOptions, {"strength": -1.0}, r"method\.lwf\.strength must be 0 or more; got -1\.0"),
        (LwFOptions, {"temperature": 0.0}, r"method\.lwf\.temperature must be positive; got 0\.0"),
        (LwFOptions, {"temperature": float("inf")}, r"method\.lwf\.temperature must be positive; got inf"),
    ],
)
def test_options_out_of_range_are_refused(options, value, message):
    with pytest.raises(MisconfigurationException, match=message):
        options(**value)


@pytest.mark.parametrize(
    "options",
    [
        {"methods": "EWC", "method": MethodOptions(ewc=EWCOptions(1e30))},
        {"methods": "Finetune", "training": TrainingOptions(epochs=2, lr=1e30)},
    ],
)
def test_a_training_that_diverges_is_no_result(tmp_path, options):
    with pytest.raises(MisconfigurationException, match=r"diverged .* smaller training\.lr, or strength of a penalty"):
        call(tmp_path, **options)
    assert not (tmp_path / "results.csv").exists()
