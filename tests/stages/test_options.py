import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_personalize.stages.options import ImportanceOptions, TrainerOptions, TrainingOptions


@pytest.mark.parametrize(
    ("options", "value", "message"),
    [
        (TrainingOptions, {"epochs": 0}, "training.epochs must be 1 or more; got 0"),
        (TrainingOptions, {"lr": 0.0}, r"training.lr must be positive; got 0\.0"),
        (TrainingOptions, {"momentum": 1.5}, r"training.momentum must be in \[0, 1\); got 1\.5"),
        (TrainingOptions, {"momentum": -0.1}, r"training.momentum must be in \[0, 1\); got -0\.1"),
        (TrainingOptions, {"weight_decay": -1}, "training.weight_decay must be 0 or more; got -1"),
        (TrainingOptions, {"l2_transfer": -1}, r"training.l2_transfer \(a number, or 'reference'\) must be 0 or more"),
        (TrainingOptions, {"l2_transfer": "refrence"}, "training.l2_transfer .* got 'refrence'"),
        (TrainingOptions, {"lr_patience": 0}, "training.lr_patience must be 1 or more; got 0"),
        (TrainingOptions, {"stop_patience": -1}, "training.stop_patience must be 1 or more; got -1"),
        (ImportanceOptions, {"fisher_draws": 0}, "importance.fisher_draws .* must be 1 or more; got 0"),
        (TrainerOptions, {"log_every_n_steps": 0}, "trainer.log_every_n_steps must be 1 or more; got 0"),
    ],
)
def test_values_out_of_range_are_refused(options, value, message):
    with pytest.raises(MisconfigurationException, match=message):
        options(**value)


def test_values_with_a_name_are_accepted():
    assert TrainingOptions(l2_transfer="reference").l2_transfer == "reference"
    assert ImportanceOptions(fisher_draws="all").fisher_draws == "all"


def test_a_trainer_has_the_options_and_others():
    trainer = TrainerOptions("cpu", precision="64-true", log_every_n_steps=7).trainer(max_epochs=3, logger=False)
    assert (trainer.precision, trainer.log_every_n_steps, trainer.max_epochs, trainer.num_devices) == (
        "64-true", 7, 3, 1
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"accelerator": "abacus"}, {"precision": "3-bit"}])
def test_what_lightning_does_not_support_is_refused(options):
    with pytest.raises(MisconfigurationException, match=f"trainer: .*{next(iter(options.values()))}"):
        TrainerOptions(**({"accelerator": "cpu"} | options)).trainer()
