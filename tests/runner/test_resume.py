"""Experiments that are killed and started again: the same results, no stage twice, and every step logged once."""

import csv

import pytest
from tiny_benchmark import Finished, KilledError, call, with_norm

from pl_personalize import ArtifactError
from pl_personalize.adaptations.fine_tune import FineTune
from pl_personalize.adaptations.reestimated_statistics import AdaBNSupervised
from pl_personalize.runner import AdaptationOptions, TrainerOptions, TrainingOptions
from pl_personalize.stages.checkpoints import Checkpoints

OPTIONS = {
    "network": with_norm,
    "methods": ["mean-IMM", "FT"],
    "adaptations": ["AdaBN-S", "recalibrate+AdaBN"],
    "adaptation": AdaptationOptions(adabn_s=AdaBNSupervised(epochs=1, lr=0.1), ft=FineTune(epochs=1)),
    "training": TrainingOptions(epochs=2, lr=0.1),
    "trainer": TrainerOptions("cpu", log_every_n_steps=1),
    "loggers": ["csv"],
}
TRAINING_ONLY = OPTIONS | {"methods": ["Experts"], "adaptations": ["none"]}


def logs(folder):
    """What the logger has of each stage: all values of each step."""
    found = {}
    for path in (folder / "csv").rglob("metrics.csv"):
        for row in csv.DictReader(path.open()):
            place = path.parent.name, row.get("step")
            found.setdefault(place, []).extend(sorted((key, value) for key, value in row.items() if value))
    return {place: sorted(set(values)) for place, values in found.items()}


def killed_call(folder, patch, **options):
    """A call that is killed, once something is patched."""
    with pytest.MonkeyPatch.context() as patched:
        patch_result = patch(patched)
        with pytest.raises(KilledError):
            call(folder, **options)
    return patch_result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        finished = Finished(patched)
        call(folder, **OPTIONS)
    assert len(set(finished.stages)) == len(finished.stages)
    return folder, finished.stages


@pytest.mark.parametrize(
    "death",
    [
        {"dies_after": "/train/task1"},
        {"dies_before": "/train/task2"},
        {"dies_before": "/adapt/mean-IMM/AdaBN-S/bob"},
        {"dies_after": "/adapt/mean-IMM/recalibrate/server"},
        {"dies_before": "/test/FT+AdaBN-S/ann"},
    ],
    ids=lambda death: "-".join(*death.items()),
)
def test_a_killed_experiment_ends_with_the_same_results(whole, tmp_path, monkeypatch, death):
    folder, stages = whole
    first = killed_call(tmp_path, lambda patched: Finished(patched, **death), **OPTIONS)
    second = Finished(monkeypatch)
    call(tmp_path, **OPTIONS)

    assert second.stages
    assert first.stages + second.stages == stages
    assert (tmp_path / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()
    assert logs(tmp_path) == logs(folder)


@pytest.mark.parametrize("step", [2, 5])
def test_a_training_that_was_killed_in_the_middle_resumes(tmp_path, monkeypatch, step):
    call(tmp_path / "whole", **TRAINING_ONLY)
    steps = []

    def killed(self, trainer, *args, **kwargs):
        steps.append(trainer.global_step)
        if len(steps) == step:
            trainer.save_checkpoint(self.resume)
        if len(steps) == step + 1:  # this step is logged, but not in the checkpoint
            raise KilledError

    run = tmp_path / "run"
    killed_call(run, lambda patched: patched.setattr(Checkpoints, "on_train_batch_end", killed), **TRAINING_ONLY)
    begun = []
    monkeypatch.setattr(
        Checkpoints, "on_train_batch_end", lambda self, trainer, *args: begun.append(trainer.global_step)
    )
    call(run, **TRAINING_ONLY)
    assert begun[0] == step + 1
    assert (run / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()
    assert logs(run) == logs(tmp_path / "whole")


def test_steps_are_logged_once(whole):
    (path,) = (whole[0] / "csv").rglob("train-task2/metrics.csv")
    assert [row["step"] for row in csv.DictReader(path.open()) if row["train/loss"]] == [str(k) for k in range(6)]


def test_a_damaged_checkpoint_is_never_replaced_by_a_beginning(tmp_path):
    call(tmp_path, methods=["Joint"])
    stage = tmp_path / "checkpoints" / "first" / "seed1" / "task1"
    stage.mkdir(parents=True)
    (stage / "last.ckpt").write_bytes(b"cut off")
    with pytest.raises(ArtifactError, match=r"task1/last\.ckpt cannot be read as a checkpoint"):
        call(tmp_path)


def test_later_methods_and_adaptations_come_into_the_same_folder(tmp_path, monkeypatch):
    call(tmp_path, methods=["mean-IMM"])
    finished = Finished(monkeypatch)
    call(tmp_path, methods=["mean-IMM", "Experts+FT"])
    assert {stage.split("/")[3] for stage in finished.stages} == {"Experts", "Experts+FT"}
