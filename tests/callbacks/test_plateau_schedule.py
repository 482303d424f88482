"""PlateauSchedule, on a module whose metric values are scripted."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from pl_personalize.callbacks import PlateauSchedule

LR = 1.0


class Script(LightningModule):
    """Logs a metric that is given for each validation, and notes the rates that each epoch was trained with."""

    def __init__(self, metric, *, groups=(LR,)):
        super().__init__()
        self.metric, self.groups = list(metric), groups
        self.weight = torch.nn.Parameter(torch.zeros(len(groups)))
        self.others = torch.nn.ParameterList(torch.zeros(1) for _ in groups)
        self.rates: dict[int, list[float]] = {}

    def training_step(self, batch, batch_idx):
        self.rates.setdefault(self.current_epoch, [g["lr"] for g in self.optimizers().param_groups])
        return sum(p.sum() for p in self.others)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking and self.metric:
            self.log("score", self.metric[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(self.others, self.groups, strict=True)])


def fit(module, tmp_path, *callbacks, ckpt_path=None, max_epochs=40, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=max_epochs,
        default_root_dir=tmp_path, callbacks=list(callbacks), **options,
    )  # fmt: skip
    loader = DataLoader(torch.zeros(2, 1))
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def rates(module) -> list[float]:
    assert list(module.rates) == list(range(len(module.rates)))
    return [round(rate, 9) for (rate,) in module.rates.values()]


def test_the_protocols_example(tmp_path):
    """No improvement after epoch 0: the rate drops before epoch 6, and training stops before epoch 12."""
    module = Script([0.5] * 40)
    schedule = PlateauSchedule("score")
    fit(module, tmp_path, schedule)

    assert rates(module) == [1.0] * 6 + [0.1] * 6
    assert (schedule.best, schedule.stagnant) == (0.5, 11)


def test_a_second_streak_drops_the_rate_again_and_it_is_never_raised(tmp_path):
    metric = [0.1, *[0.05] * 6, 0.2, *[0.15] * 40]  # best in epochs 0 and 7
    module = Script(metric)
    fit(module, tmp_path, PlateauSchedule("score"))

    assert rates(module) == [1.0] * 6 + [0.1] * 7 + [0.01] * 6


def test_steady_improvement_changes_nothing(tmp_path):
    module = Script([k / 20 for k in range(14)])
    fit(module, tmp_path, PlateauSchedule("score"), max_epochs=14)
    assert rates(module) == [1.0] * 14


def test_min_mode_and_other_numbers(tmp_path):
    module = Script([1.0, 0.9, 0.9, 2.0, 0.8, 0.8, 0.8, 0.8, 0.1])  # strict: an equal value is no improvement
    fit(module, tmp_path, PlateauSchedule("score", mode="min", lr_patience=2, stop_patience=3, factor=0.5))
    assert rates(module) == [1.0] * 4 + [0.5] * 3 + [0.25]


def test_every_parameter_group_is_lowered(tmp_path):
    module = Script([0.5] * 40, groups=(1.0, 0.2))
    fit(module, tmp_path, PlateauSchedule("score", lr_patience=1), max_epochs=3)
    assert [[round(rate, 9) for rate in pair] for pair in module.rates.values()] == [[1, 0.2], [1, 0.2], [0.1, 0.02]]


def test_a_check_is_a_validation_run(tmp_path):
    module = Script([0.5] * 40)
    fit(module, tmp_path, PlateauSchedule("score", lr_patience=1, stop_patience=2), check_val_every_n_epoch=3)
    assert rates(module) == [1.0] * 6 + [0.1] * 3


def test_a_first_value_that_is_not_a_number_is_no_best(tmp_path):
    module = Script([math.nan, 0.1, 0.2, 0.3, 0.4])
    schedule = PlateauSchedule("score", lr_patience=2, stop_patience=3)
    fit(module, tmp_path, schedule, max_epochs=5)
    assert rates(module) == [1.0] * 5
    assert schedule.best == pytest.approx(0.4)


def test_validation_and_sanity_check_outside_of_training_do_not_count(tmp_path):
    module, schedule = Script([0.5, 0.1]), PlateauSchedule("score", lr_patience=1, stop_patience=1)
    trainer = fit(module, tmp_path, schedule, max_epochs=1, num_sanity_val_steps=1)
    trainer.validate(module, DataLoader(torch.zeros(2, 1)), verbose=False)
    assert (schedule.best, schedule.stagnant) == (0.5, 0)


@pytest.mark.parametrize("last", [1, 4, 5, 8])
def test_a_resumed_run_keeps_the_streak(tmp_path, last):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Script([0.5] * 40), tmp_path, PlateauSchedule("score"), checkpoint, max_epochs=last + 1)
    module, schedule = Script([0.5] * 40), PlateauSchedule("score")
    fit(module, tmp_path, schedule, ckpt_path=tmp_path / f"epoch={last}.ckpt")

    wanted = [1.0] * 6 + [0.1] * 6
    assert {epoch: round(rate, 9) for epoch, (rate,) in module.rates.items()} == dict(
        enumerate(wanted[last + 1 :], last + 1)
    )
    assert schedule.stagnant == 11


def test_a_run_that_had_stopped_does_not_go_on_when_it_is_resumed(tmp_path):
    """Killed between the decision to stop and the end of the script: the weights must be those of epoch 11."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Script([0.5] * 40), tmp_path, PlateauSchedule("score"), checkpoint)
    module = Script([0.5] * 40)
    fit(module, tmp_path, PlateauSchedule("score"), ckpt_path=tmp_path / "epoch=11.ckpt")
    assert module.rates == {}


def test_every_check_makes_the_same_collective_calls(tmp_path, monkeypatch):
    """Ranks whose metric differs (it was logged without ``sync_dist``) would else wait for each other for ever."""

    class Count(PlateauSchedule):
        calls = ()

        def on_validation_end(self, trainer, pl_module):
            made = []
            for name in ("reduce_boolean_decision", "reduce", "broadcast", "all_gather"):
                real = getattr(trainer.strategy, name)
                spy = lambda *args, name=name, real=real, **options: (made.append(name), real(*args, **options))[1]  # noqa: E731
                monkeypatch.setattr(trainer.strategy, name, spy)
            super().on_validation_end(trainer, pl_module)
            monkeypatch.undo()
            self.calls = (*self.calls, made)

    schedule = Count("score")
    fit(Script([0.1, 0.2, 0.15, 0.3]), tmp_path, schedule, max_epochs=4, num_sanity_val_steps=0)
    first, *rest = schedule.calls
    assert first
    assert rest == [first] * 3  # improving or not


def test_a_checkpoint_with_its_state_loads_with_weights_only(tmp_path):
    fit(
        Script([0.25, 0.5, 0.5]),
        tmp_path,
        PlateauSchedule("score"),
        ModelCheckpoint(tmp_path, filename="x"),
        max_epochs=3,
    )
    states = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    assert [state for key, state in states.items() if "PlateauSchedule" in key] == [{"best": 0.5, "stagnant": 1}]


def test_two_schedules_have_states_of_their_own():
    assert PlateauSchedule("a").state_key != PlateauSchedule("b").state_key
    assert PlateauSchedule("a").state_key != PlateauSchedule("a", mode="min").state_key


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'other', which was not logged; logged metrics: \['score'\]"):
        fit(Script([0.5] * 3), tmp_path, PlateauSchedule("other"), max_epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "maximum"}, "'maximum'"),
        ({"lr_patience": 0}, "got 0 and 11"),
        ({"stop_patience": 0}, "got 5 and 0"),
        ({"factor": 0.0}, r"got 0\.0"),
        ({"factor": 1.0}, r"got 1\.0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        PlateauSchedule(**options)
